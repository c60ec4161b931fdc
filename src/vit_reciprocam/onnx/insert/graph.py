"""An ONNX graph that tells which nodes compute and use each value, and runs pieces of itself.

Nodes stay the protobuf messages of the file, so that what runs here, and what is copied later, is
exactly what the file holds.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

import onnx
from onnx import helper
from vit_reciprocam.errors import ModelError
from vit_reciprocam.onnx.run.sessions import open_onnxruntime

__all__ = ["Graph", "node_inputs", "open_unoptimized", "remove_rounding", "subgraphs"]


def subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """Return the graphs inside a node, such as the branches of an If or the body of a Loop."""
    # An attribute without a graph gives an empty one, which every caller passes over.
    return [body for attribute in node.attribute for body in (attribute.g, *attribute.graphs)]


def node_inputs(node: onnx.NodeProto) -> list[str]:
    """Return the values that a node uses, including those that its subgraphs use from outside."""
    names = [name for name in node.input if name]
    for body in subgraphs(node):
        own = {value.name for value in (*body.input, *body.initializer)}
        for inner in body.node:
            names += [name for name in node_inputs(inner) if name not in own]
            own.update(inner.output)
        names += [value.name for value in body.output if value.name not in own]
    return names


@contextlib.contextmanager
def _wrap_runtime_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # ONNX Runtime's own exceptions share no public base
        raise ModelError(f"ONNX Runtime cannot run this graph: {error}") from error


def open_unoptimized(
    model: onnx.ModelProto, folder: Path
) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """Return a function from a model's inputs to its outputs; each node runs as it stands."""
    with _wrap_runtime_errors():
        content = model.SerializeToString()
        session = open_onnxruntime(content, optimize=False, weights_folder=folder)
    outputs = [value.name for value in session.get_outputs()]

    @_wrap_runtime_errors()
    def run(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        feeds = {value.name: given[value.name] for value in session.get_inputs()}
        return dict(zip(outputs, session.run(None, feeds), strict=True))

    return run


def _sort(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the nodes in an order in which they can run; not every tool writes them so."""
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
    """A model's main graph. Values are known by their names, nodes by their numbers in `nodes`.

    Attributes:
        model: The model; never changed.
        folder: The folder of its external weights.
        nodes: The nodes of the main graph, in an order in which they can run.
        number_of: Value -> the number of the node that computes it.
        weights: Initializers by name.
        inputs: The graph's inputs by name, without those that are initializers.
    """

    def __init__(self, model: onnx.ModelProto, folder: Path) -> None:
        """Index a model that has no functions of its own."""
        self.model = model
        self.folder = folder
        self.nodes = _sort(model.graph)
        self._used = [node_inputs(node) for node in self.nodes]
        self.number_of = {
            name: number for number, node in enumerate(self.nodes) for name in node.output if name
        }
        self.weights = {value.name: value for value in model.graph.initializer}
        self.inputs: dict[str, onnx.ValueInfoProto] = {
            value.name: value for value in model.graph.input if value.name not in self.weights
        }

    @property
    def names(self) -> set[str]:
        """The names of all values and nodes, including those in subgraphs."""
        found: set[str] = set()
        graphs = [self.model.graph]
        for graph in graphs:  # subgraphs are appended on the way
            found.update(value.name for value in (*graph.input, *graph.initializer))
            for node in graph.node:
                found.update((node.name, *node.input, *node.output))
                graphs += subgraphs(node)
        return found

    def consumers(self, name: str) -> list[int]:
        """Return the numbers of the nodes that use a value."""
        return [number for number, used in enumerate(self._used) if name in used]

    def producer(self, name: str) -> onnx.NodeProto | None:
        """Return the node that computes a value; None for inputs and initializers."""
        return self.nodes[self.number_of[name]] if name in self.number_of else None

    @functools.cached_property
    def image_values(self) -> set[str]:
        """The values that depend on the images; masks and learned queries, for example, do not."""
        return self.dependents(*self.inputs)

    def dependents(self, *sources: str) -> set[str]:
        """Return the values that depend on what some values hold, not only on their shapes."""
        found = set(sources)
        for node, used in zip(self.nodes, self._used, strict=True):
            if node.op_type not in ("Shape", "Size") and not found.isdisjoint(used):
                found.update(name for name in node.output if name)
        return found

    def nodes_above(self, names: Iterable[str], *, until: Iterable[str] = ()) -> list[int]:
        """Return the nodes that compute some values, as far up as the values `until`, in order."""
        stop, found, waiting = set(until), set(), list(names)
        while waiting:
            name = waiting.pop()
            number = self.number_of.get(name)
            if name in stop or number is None or number in found:
                continue
            found.add(number)
            waiting += self._used[number]
        return sorted(found)

    def nodes_between(self, start: Iterable[str], end: Iterable[str]) -> list[int]:
        """Return the nodes on any path from some values to others, in order."""
        start = list(start)
        values, found = set(start), []
        for number in self.nodes_above(end, until=start):
            if not values.isdisjoint(self._used[number]):
                found.append(number)
                values.update(self.nodes[number].output)
        return found

    def values_entering(self, numbers: Sequence[int]) -> list[str]:
        """Return the values that some nodes use from other nodes or from the graph's inputs."""
        made = {name for number in numbers for name in self.nodes[number].output}
        used = dict.fromkeys(name for number in numbers for name in self._used[number])
        outside = (self.number_of.keys() | self.inputs.keys()) - made
        return [name for name in used if name in outside]

    def constant(self, name: str) -> np.ndarray | None:
        """Return the content of a value, or None if it depends on an input of the graph."""
        above = self.nodes_above([name])
        if any(not self.inputs.keys().isdisjoint(self._used[number]) for number in above):
            return None
        return self.run({}, [name])[name] if above or name in self.weights else None

    def run(self, given: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
        """Compute values from other values in ONNX Runtime, by the nodes between them alone."""
        return self.prepare(given, wanted)(given)

    def prepare(
        self, given: Mapping[str, np.ndarray], wanted: Sequence[str]
    ) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
        """Return what `run` does as a function, to call with other values of the same shapes."""
        numbers = self.nodes_above(wanted, until=given)
        used = {name for number in numbers for name in self._used[number]} | set(wanted)
        inputs = [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
            )
            for name, value in given.items()
            if name in used
        ]
        # An input or a weight of a graph cannot also be its output: an Identity copies it.
        seen = [helper.make_node("Identity", [name], [f"{name}/seen"]) for name in wanted]
        graph = helper.make_graph(
            [*(self.nodes[number] for number in numbers), *seen],
            "piece",
            inputs,
            [onnx.ValueInfoProto(name=node.output[0]) for node in seen],
            [value for name, value in self.weights.items() if name in used - given.keys()],
        )
        model = helper.make_model(graph, opset_imports=self.model.opset_import)
        model.ir_version = max(self.model.ir_version, 4)  # 3 wants weights among the inputs
        run = open_unoptimized(model, self.folder)
        return lambda given: dict(zip(wanted, run(given).values(), strict=True))

    def describe(self, name: str) -> str:
        """Return how messages name the node that computes a value."""
        node = self.producer(name)
        return f"input {name!r}" if node is None else f"{node.op_type} node {node.name or name!r}"

    def image_inputs(self, node: onnx.NodeProto) -> list[str]:
        """Return the inputs of a node that depend on the images, each once."""
        return [name for name in dict.fromkeys(node_inputs(node)) if name in self.image_values]

    def walk_up(self, name: str, through: Collection[str] | None = None) -> Iterator[str]:
        """Yield a value and those above it, while nodes of the kinds `through` compute them."""
        above = [name]
        while len(above) == 1:  # exactly one input depends on the images
            yield above[0]
            node = self.producer(above[0])
            if node is None or (through is not None and node.op_type not in through):
                return
            above = self.image_inputs(node)

    def search_up(
        self, names: Iterable[str], *, until: Callable[[onnx.NodeProto], bool]
    ) -> Iterator[onnx.NodeProto]:
        """Yield the nodes that compute values from the images, nearest first, up to `until`."""
        waiting, seen = list(names), set()
        for name in waiting:  # what comes next is appended on the way
            node = self.producer(name)
            if node is None or self.number_of[name] in seen:
                continue
            seen.add(self.number_of[name])
            yield node
            if not until(node):
                waiting += self.image_inputs(node)


def remove_rounding(graph: Graph) -> Graph:
    """Return a quantised graph that does not round what it computes; other graphs as they are.

    Under a mask the scores of a class often change by less than a hundredth, which the rounding to
    int8 would drown. So in a graph with QuantizeLinear and DequantizeLinear nodes the explanation
    computes in float from the masked value on, with the graph's own int8 weights.
    """
    rounding = {
        node.output[0]: node
        for node in graph.nodes
        if node.op_type == "QuantizeLinear" and node.input[0] in graph.image_values
    }
    if not rounding:
        return graph
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in rounding:
            first = rounding[node.input[0]]
            # Quantisers fold a ReLU into a node that can hold no negative numbers.
            kind = "Relu" if _holds_no_negative(graph, first) else "Identity"
            node.CopyFrom(helper.make_node(kind, first.input[:1], node.output, node.name))
    return Graph(model, graph.folder)


def _holds_no_negative(graph: Graph, node: onnx.NodeProto) -> bool:
    """Tell whether the zero point of a QuantizeLinear node is the smallest number of its type."""
    if len(node.input) < 3:
        return True  # uint8 from 0 on
    zero = graph.constant(node.input[2])
    return zero is not None and bool((zero == np.iinfo(zero.dtype).min).all())
