"""Build the nodes, weights, inputs and outputs that are added to a graph."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import onnx
from onnx import helper, numpy_helper
from vit_reciprocam.onnx.insert.graph import Graph, subgraphs

__all__ = ["PREFIX", "Branch"]

PREFIX = "reciprocam/"


class Branch:
    """What is added to a graph; every name in it begins with PREFIX, except of inputs and outputs.

    Nodes lie in an order in which they can run.
    """

    def __init__(self, opset: int) -> None:
        """Start without nodes, for a version of ONNX's own operators."""
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self._numbers = itertools.count(1)

    def body(self) -> Branch:
        """Return a branch for the nodes inside a loop; its weights stay outside, in this one."""
        inner = Branch(self.opset)
        inner.weights, inner._numbers = self.weights, self._numbers
        return inner

    def new_name(self, what: str) -> str:
        """Return a new name that tells what it is for."""
        return f"{PREFIX}{what}_{next(self._numbers)}"

    def const(self, value: object, kind: type | None = None) -> str:
        """Add a weight and return its name."""
        name = self.new_name("const")
        self.weights.append(numpy_helper.from_array(np.asarray(value, dtype=kind), name))
        return name

    def ints(self, *values: int) -> str:
        """Add a weight of int64."""
        return self.const(values, np.int64)

    def floats(self, value: object) -> str:
        """Add a weight of float32."""
        return self.const(value, np.float32)

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Add a node with one of ONNX's own operators and return the name of its output."""
        output = name or self.new_name(kind)
        node_name = self.new_name(f"{kind}_node")
        self.nodes.append(helper.make_node(kind, inputs, [output], name=node_name, **attributes))
        return output

    def reduce(self, kind: str, value: str, *axes: int) -> str:
        """Add a ReduceMax or ReduceMin that keeps the axes, which are an input since opset 18."""
        if self.opset >= 18:
            return self.op(kind, value, self.ints(*axes), keepdims=1)
        return self.op(kind, value, axes=list(axes), keepdims=1)

    def copy(
        self, graph: Graph, numbers: Sequence[int], given: Mapping[str, str]
    ) -> dict[str, str]:
        """Add copies of some of a graph's nodes that use other values than the originals.

        These are `given` as name in the graph -> name in the branch; the names of all that the
        copies compute are returned with them.
        """
        names = dict(given)
        prefix = self.new_name("copy")
        for number in numbers:
            node = onnx.NodeProto()
            node.CopyFrom(graph.nodes[number])
            for name in node.output:
                if name and name not in given:
                    names[name] = f"{prefix}/{name}"
            _rename(node, names)
            node.name = f"{prefix}/{node.name or number}"
            self.nodes.append(node)
        return names


def _rename(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Rename the values of a node, including those that its subgraphs use from outside."""
    node.input[:] = [names.get(name, name) for name in node.input]
    node.output[:] = [names.get(name, name) for name in node.output]
    for body in subgraphs(node):
        # A subgraph's own value hides a value outside that has the same name.
        own = {value.name for value in (*body.input, *body.initializer)}
        own |= {name for inner in body.node for name in inner.output}
        outer = {old: new for old, new in names.items() if old not in own}
        for inner in body.node:
            _rename(inner, outer)
        for value in body.output:
            value.name = outer.get(value.name, value.name)
