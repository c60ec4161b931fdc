"""An ONNX graph to look into: who makes and who takes each value, and parts of it run alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

import onnx
from onnx import helper, numpy_helper
from vit_reciprocam.errors import ModelError

__all__ = ["Graph", "open_unoptimized", "run_session", "taken"]

_FOLDER = "session.model_external_initializers_file_folder_path"


def taken(node: onnx.NodeProto) -> list[str]:
    """The values that a node takes, with those that its subgraphs take from outside."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs):
            own = {value.name for value in (*body.input, *body.initializer)}
            for inner in body.node:
                names += [name for name in taken(inner) if name not in own]
                own.update(inner.output)
            names += [value.name for value in body.output if value.name not in own]
    return names


def open_unoptimized(model: onnx.ModelProto, folder: Path) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session that runs each node as it stands.

    Raises:
        ModelError: If ONNX Runtime cannot run the model.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry(_FOLDER, str(folder.resolve()))
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime's own exceptions share no public base
        raise ModelError(f"ONNX Runtime cannot run this graph: {error}") from error


def run_session(
    session: onnxruntime.InferenceSession, feeds: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    """All outputs of a session.

    Raises:
        ModelError: If a node fails.
    """
    try:
        outputs: list[np.ndarray] = session.run(None, dict(feeds))
    except Exception as error:  # ONNX Runtime's own exceptions share no public base
        raise ModelError(f"ONNX Runtime cannot run this graph: {error}") from error
    return outputs


def _names(graph: onnx.GraphProto) -> set[str]:
    """Of a graph and the graphs in its nodes."""
    found = {value.name for value in (*graph.input, *graph.initializer)}
    for node in graph.node:
        found.update((node.name, *node.input, *node.output))
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                found |= _names(body)
    return found


def _sorted(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Nodes in an order in which they can run; some tools write them in another.

    Raises:
        ModelError: If there is none.
    """
    made = {name for node in graph.node for name in node.output if name}
    ordered: list[onnx.NodeProto] = []
    left = list(graph.node)
    while left:
        waiting = []
        for node in left:
            if made.isdisjoint(taken(node)):
                ordered.append(node)
                made.difference_update(node.output)
            else:
                waiting.append(node)
        if len(waiting) == len(left):
            raise ModelError(f"node {waiting[0].name!r} depends on itself")
        left = waiting
    return ordered


class Graph:
    """A model's main graph, its nodes in an order in which they can run.

    Attributes:
        model: The model; never changed.
        folder: Where its external data lie.
        nodes: Of the main graph.
        maker: Value -> the number of the node that makes it.
        weights: Initializers by name.
    """

    def __init__(self, model: onnx.ModelProto, folder: Path) -> None:
        """Look into a model without functions of its own."""
        self.model = model
        self.folder = folder
        self.nodes = _sorted(model.graph)
        self.maker = {
            name: number for number, node in enumerate(self.nodes) for name in node.output if name
        }
        self.weights = {value.name: value for value in model.graph.initializer}
        self.inputs: list[onnx.ValueInfoProto] = [
            value for value in model.graph.input if value.name not in self.weights
        ]

    @functools.cached_property
    def names(self) -> set[str]:
        """All names of values and nodes."""
        return _names(self.model.graph)

    @functools.cached_property
    def takers(self) -> dict[str, list[int]]:
        """Value -> the numbers of the nodes that take it."""
        takers: dict[str, list[int]] = {}
        for number, node in enumerate(self.nodes):
            for name in dict.fromkeys(taken(node)):
                takers.setdefault(name, []).append(number)
        return takers

    def varying(self, source: str) -> set[str]:
        """The values that depend on what a value holds, not only on its shape."""
        found = {source}
        for node in self.nodes:
            if node.op_type not in ("Shape", "Size") and not found.isdisjoint(taken(node)):
                found.update(name for name in node.output if name)
        return found

    def above(self, names: Iterable[str], *, until: Iterable[str] = ()) -> list[int]:
        """The nodes that make these values, back to given ones, in order."""
        stop, found, waiting = set(until), set(), list(names)
        while waiting:
            name = waiting.pop()
            number = self.maker.get(name)
            if name in stop or number is None or number in found:
                continue
            found.add(number)
            waiting += taken(self.nodes[number])
        return sorted(found)

    def between(self, start: Iterable[str], end: Iterable[str]) -> list[int]:
        """The nodes on a way from some values to others, in order."""
        start = list(start)
        values, found = set(start), []
        for number in self.above(end, until=start):
            node = self.nodes[number]
            if not values.isdisjoint(taken(node)):
                found.append(number)
                values.update(node.output)
        return found

    def entering(self, numbers: Sequence[int]) -> list[str]:
        """What these nodes take from other nodes or from the graph's inputs."""
        made = {name for number in numbers for name in self.nodes[number].output}
        given = {name: None for number in numbers for name in taken(self.nodes[number])}
        graph_inputs = {value.name for value in self.inputs}
        return [
            name
            for name in given
            if name not in made and (name in self.maker or name in graph_inputs)
        ]

    def constant(self, name: str) -> np.ndarray | None:
        """A value that no input changes, or None where it is none."""
        inputs = {value.name for value in self.inputs}
        numbers = self.above([name])
        if any(not inputs.isdisjoint(taken(self.nodes[number])) for number in numbers):
            return None
        if name in self.weights and not self.weights[name].external_data:
            return np.asarray(numpy_helper.to_array(self.weights[name]))
        return self.run({}, [name])[name] if numbers or name in self.weights else None

    def run(self, given: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
        """Values from other values, by the nodes between them alone, in ONNX Runtime.

        Raises:
            ModelError: If ONNX Runtime cannot run these nodes.
        """
        return self.part(given, wanted)(given)

    def part(
        self, given: Mapping[str, np.ndarray], wanted: Sequence[str]
    ) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
        """As `run`, to be called again with other values of the same shapes."""
        numbers = self.above(wanted, until=given)
        wired = {name for number in numbers for name in taken(self.nodes[number])} | set(wanted)
        made = {name for number in numbers for name in self.nodes[number].output}
        inputs = [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
            )
            for name, value in given.items()
            if name in wired
        ]
        ends = [name if name in made else f"{name}/seen" for name in wanted]
        seen = [
            helper.make_node("Identity", [name], [end])
            for name, end in zip(wanted, ends, strict=True)
            if name != end
        ]
        graph = helper.make_graph(
            [*(self.nodes[number] for number in numbers), *seen],
            "part",
            inputs,
            [onnx.ValueInfoProto(name=end) for end in ends],
            [value for name, value in self.weights.items() if name in wired - given.keys()],
        )
        model = helper.make_model(graph, opset_imports=self.model.opset_import)
        model.ir_version = max(self.model.ir_version, 4)
        session = open_unoptimized(model, self.folder)

        def run(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            feeds = {value.name: given[value.name] for value in inputs}
            return dict(zip(wanted, run_session(session, feeds), strict=True))

        return run

    def describe(self, name: str) -> str:
        """A value's node, for messages."""
        if name not in self.maker:
            return f"input {name!r}"
        node = self.nodes[self.maker[name]]
        return f"{node.op_type} node {node.name or name!r}"

    def walk_up(self, name: str, through: frozenset[str], varying: set[str]) -> Iterator[str]:
        """A value, and those above it through nodes of some kinds with one varying input."""
        while True:
            yield name
            node = self.nodes[self.maker[name]] if name in self.maker else None
            if node is None or node.op_type not in through:
                return
            above = [each for each in dict.fromkeys(taken(node)) if each in varying]
            if len(above) != 1:
                return
            name = above[0]
