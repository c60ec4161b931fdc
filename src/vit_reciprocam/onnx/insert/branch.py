"""Make the nodes and weights that come beside a graph's own."""

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
    """Nodes and weights that come beside a graph's own.

    Every name in it begins with PREFIX, but for outputs that are named on purpose.

    Attributes:
        opset: The graph's version of ONNX's own operators.
        nodes: The nodes added so far, in an order in which they can run.
        weights: The weights added so far.
    """

    def __init__(self, opset: int) -> None:
        """Begin with nothing."""
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._numbers = itertools.count(1)

    def body(self) -> Branch:
        """Return a branch for the nodes inside a loop; its weights stay outside, in this one."""
        inner = Branch(self.opset)
        inner.weights, inner._numbers = self.weights, self._numbers
        return inner

    def new_name(self, what: str) -> str:
        """Return a name that nothing else has."""
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
        """Add a node of ONNX's own operators and return its one output."""
        output = name or self.new_name(kind)
        node_name = self.new_name(f"{kind}_node")
        self.nodes.append(helper.make_node(kind, inputs, [output], name=node_name, **attributes))
        return output

    def top(self, values: str, count: int, *, indices: str) -> None:
        """Add the indices of the largest values along the last axis, the largest first."""
        outputs = [self.new_name("TopK"), indices]
        self.nodes.append(helper.make_node("TopK", [values, self.ints(count)], outputs, axis=-1))

    def reduce(self, kind: str, value: str, *axes: int) -> str:
        """Add ReduceMax or ReduceMin that keeps the axes; opset 18 made these an input."""
        if self.opset >= 18:
            return self.op(kind, value, self.ints(*axes), keepdims=1)
        return self.op(kind, value, axes=list(axes), keepdims=1)

    def copy(
        self, graph: Graph, numbers: Sequence[int], given: Mapping[str, str]
    ) -> dict[str, str]:
        """Add some of a graph's nodes once more, taking other values than they take there.

        Args:
            graph: The graph.
            numbers: The nodes, in order.
            given: Value in the graph -> what the copies take for it.

        Returns:
            Value in the graph -> its name in the branch, for `given` and for all that is made.
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
    """Give a node's values, also those that its subgraphs take from outside, other names."""
    node.input[:] = [names.get(name, name) for name in node.input]
    node.output[:] = [names.get(name, name) for name in node.output]
    for body in subgraphs(node):
        # A subgraph's own value may have the name of one outside, which it then hides.
        own = {value.name for value in (*body.input, *body.initializer)}
        own |= {name for inner in body.node for name in inner.output}
        outer = {old: new for old, new in names.items() if old not in own}
        for inner in body.node:
            _rename(inner, outer)
        for value in body.output:
            value.name = outer.get(value.name, value.name)
