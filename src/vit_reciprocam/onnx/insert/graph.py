"""An ONNX graph to look into: which nodes make and take each value, and pieces of it run alone.

Nodes stay the protobuf messages of the file. So what runs here, and what is copied later, is what
the file holds, and nothing that a translation may have changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

import onnx
from onnx import helper, numpy_helper
from vit_reciprocam.errors import ModelError
from vit_reciprocam.onnx.run.sessions import open_onnxruntime

__all__ = [
    "Graph",
    "inputs_among",
    "node_inputs",
    "open_unoptimized",
    "run_session",
    "subgraphs",
]


def subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """Return the graphs inside a node, as If and Loop have them."""
    # An attribute without a graph gives an empty one, which every caller passes over.
    return [body for attribute in node.attribute for body in (attribute.g, *attribute.graphs)]


def node_inputs(node: onnx.NodeProto) -> list[str]:
    """Return the values that a node takes, with those that its subgraphs take from outside."""
    names = [name for name in node.input if name]
    for body in subgraphs(node):
        own = {value.name for value in (*body.input, *body.initializer)}
        for inner in body.node:
            names += [name for name in node_inputs(inner) if name not in own]
            own.update(inner.output)
        names += [value.name for value in body.output if value.name not in own]
    return names


def inputs_among(node: onnx.NodeProto, names: Collection[str]) -> list[str]:
    """Return those of a node's inputs that are among some values, each once."""
    return [name for name in dict.fromkeys(node_inputs(node)) if name in names]


def open_unoptimized(model: onnx.ModelProto, folder: Path) -> onnxruntime.InferenceSession:
    """Open an ONNX Runtime session that runs each node as it stands.

    Raises:
        ModelError: If ONNX Runtime cannot run the model.
    """
    try:
        return open_onnxruntime(model.SerializeToString(), optimize=False, weights_folder=folder)
    except Exception as error:  # ONNX Runtime's own exceptions share no public base
        raise ModelError(f"ONNX Runtime cannot run this graph: {error}") from error


def run_session(
    session: onnxruntime.InferenceSession, feeds: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    """Run a session and return all its outputs.

    Raises:
        ModelError: If a node fails.
    """
    try:
        outputs: list[np.ndarray] = session.run(None, dict(feeds))
    except Exception as error:  # ONNX Runtime's own exceptions share no public base
        raise ModelError(f"ONNX Runtime cannot run this graph: {error}") from error
    return outputs


def _all_names(graph: onnx.GraphProto) -> set[str]:
    """Return the names of all values and nodes in a graph and in its subgraphs."""
    found = {value.name for value in (*graph.input, *graph.initializer)}
    for node in graph.node:
        found.update((node.name, *node.input, *node.output))
        for body in subgraphs(node):
            found |= _all_names(body)
    return found


def _sort(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the nodes in an order in which they can run; some tools write them in another.

    Raises:
        ModelError: If there is no such order.
    """
    awaited = {name for node in graph.node for name in node.output if name}
    ordered: list[onnx.NodeProto] = []
    left = list(graph.node)
    while left:  # one pass is enough where the order is right already
        waiting = []
        for node in left:
            if awaited.isdisjoint(node_inputs(node)):
                ordered.append(node)
                awaited.difference_update(node.output)
            else:
                waiting.append(node)
        if len(waiting) == len(left):
            raise ModelError(f"node {waiting[0].name!r} depends on itself")
        left = waiting
    return ordered


class Graph:
    """A model's main graph, its nodes in an order in which they can run.

    Values are known by their names, nodes by their numbers in that order.

    Attributes:
        model: The model; never changed.
        folder: The folder that its external data lie in.
        nodes: The nodes of the main graph.
        number_of: Value -> the number of the node that makes it.
        weights: Initializers by name.
        inputs: The graph's inputs that are not initializers.
    """

    def __init__(self, model: onnx.ModelProto, folder: Path) -> None:
        """Look into a model without functions of its own."""
        self.model = model
        self.folder = folder
        self.nodes = _sort(model.graph)
        self._taken = [node_inputs(node) for node in self.nodes]
        self.number_of = {
            name: number for number, node in enumerate(self.nodes) for name in node.output if name
        }
        self.weights = {value.name: value for value in model.graph.initializer}
        self.inputs: list[onnx.ValueInfoProto] = [
            value for value in model.graph.input if value.name not in self.weights
        ]

    @functools.cached_property
    def names(self) -> set[str]:
        """The names of all values and nodes, also in subgraphs."""
        return _all_names(self.model.graph)

    @functools.cached_property
    def consumers(self) -> dict[str, list[int]]:
        """Value -> the numbers of the nodes that take it."""
        consumers: dict[str, list[int]] = {}
        for number, taken in enumerate(self._taken):
            for name in dict.fromkeys(taken):
                consumers.setdefault(name, []).append(number)
        return consumers

    def producer(self, name: str) -> onnx.NodeProto | None:
        """Return the node that makes a value; None for inputs and initializers."""
        return self.nodes[self.number_of[name]] if name in self.number_of else None

    def dependents(self, source: str) -> set[str]:
        """Return the values that depend on what a value holds, not only on its shape."""
        found = {source}
        for node, taken in zip(self.nodes, self._taken, strict=True):
            if node.op_type not in ("Shape", "Size") and not found.isdisjoint(taken):
                found.update(name for name in node.output if name)
        return found

    def nodes_above(self, names: Iterable[str], *, until: Iterable[str] = ()) -> list[int]:
        """Return the nodes that make some values, back to given ones, in order."""
        stop, found, waiting = set(until), set(), list(names)
        while waiting:
            name = waiting.pop()
            number = self.number_of.get(name)
            if name in stop or number is None or number in found:
                continue
            found.add(number)
            waiting += self._taken[number]
        return sorted(found)

    def nodes_between(self, start: Iterable[str], end: Iterable[str]) -> list[int]:
        """Return the nodes on a way from some values to others, in order."""
        start = list(start)
        values, found = set(start), []
        for number in self.nodes_above(end, until=start):
            if not values.isdisjoint(self._taken[number]):
                found.append(number)
                values.update(self.nodes[number].output)
        return found

    def values_entering(self, numbers: Sequence[int]) -> list[str]:
        """Return what some nodes take from other nodes or from the graph's inputs."""
        made = {name for number in numbers for name in self.nodes[number].output}
        taken = dict.fromkeys(name for number in numbers for name in self._taken[number])
        outside = self.number_of.keys() | {value.name for value in self.inputs}
        return [name for name in taken if name not in made and name in outside]

    def constant(self, name: str) -> np.ndarray | None:
        """Return a value that no input of the graph changes, or None if one does."""
        inputs = {value.name for value in self.inputs}
        numbers = self.nodes_above([name])
        if any(not inputs.isdisjoint(self._taken[number]) for number in numbers):
            return None
        if name in self.weights and not self.weights[name].external_data:
            return np.asarray(numpy_helper.to_array(self.weights[name]))
        return self.run({}, [name])[name] if numbers or name in self.weights else None

    def run(self, given: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
        """Compute values from other values, by the nodes between them alone, in ONNX Runtime.

        Raises:
            ModelError: If ONNX Runtime cannot run these nodes.
        """
        return self.prepare(given, wanted)(given)

    def prepare(
        self, given: Mapping[str, np.ndarray], wanted: Sequence[str]
    ) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
        """Return what `run` does as a function, to call with other values of the same shapes."""
        model = self._piece(given, wanted)
        session = open_unoptimized(model, self.folder)
        needed = [value.name for value in model.graph.input]

        def run(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            outputs = run_session(session, {name: given[name] for name in needed})
            return dict(zip(wanted, outputs, strict=True))

        return run

    def _piece(self, given: Mapping[str, np.ndarray], wanted: Sequence[str]) -> onnx.ModelProto:
        """Return the nodes from some values to others as a model."""
        numbers = self.nodes_above(wanted, until=given)
        taken = {name for number in numbers for name in self._taken[number]} | set(wanted)
        made = {name for number in numbers for name in self.nodes[number].output}
        inputs = [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
            )
            for name, value in given.items()
            if name in taken
        ]
        # What is given, or a weight, cannot be an output of a graph by itself.
        ends = [name if name in made else f"{name}/seen" for name in wanted]
        seen = [
            helper.make_node("Identity", [name], [end])
            for name, end in zip(wanted, ends, strict=True)
            if name != end
        ]
        graph = helper.make_graph(
            [*(self.nodes[number] for number in numbers), *seen],
            "piece",
            inputs,
            [onnx.ValueInfoProto(name=end) for end in ends],
            [value for name, value in self.weights.items() if name in taken - given.keys()],
        )
        model = helper.make_model(graph, opset_imports=self.model.opset_import)
        model.ir_version = max(self.model.ir_version, 4)  # 3 asks for weights among the inputs
        return model

    def describe(self, name: str) -> str:
        """Return what messages call the node that makes a value."""
        node = self.producer(name)
        return f"input {name!r}" if node is None else f"{node.op_type} node {node.name or name!r}"

    def walk_up(self, name: str, through: Collection[str], among: set[str]) -> Iterator[str]:
        """Yield a value and those above it, as long as there is one way up.

        The way goes through nodes of the kinds `through` that have one input in `among`.
        """
        while True:
            yield name
            node = self.producer(name)
            if node is None or node.op_type not in through:
                return
            above = inputs_among(node, among)
            if len(above) != 1:
                return
            name = above[0]
