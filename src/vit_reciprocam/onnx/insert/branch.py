"""Nodes and weights to come beside a graph's own."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import onnx
from onnx import helper, numpy_helper
from vit_reciprocam.onnx.insert.graph import Graph

__all__ = ["PREFIX", "Branch"]

PREFIX = "reciprocam/"


class Branch:
    """Nodes and weights that come beside a graph's own.

    Attributes:
        nodes, weights: What has been added.
        opset: Of the graph.
    """

    def __init__(self, opset: int) -> None:
        """Begin with nothing."""
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._numbers = itertools.count(1)

    def body(self) -> Branch:
        """For the nodes inside a loop: weights stay outside."""
        inner = Branch(self.opset)
        inner.weights, inner._numbers = self.weights, self._numbers
        return inner

    def fresh(self, what: str) -> str:
        """A name of its own."""
        return f"{PREFIX}{what}_{next(self._numbers)}"

    def const(self, value: object, kind: type | None = None) -> str:
        """A weight."""
        name = self.fresh("const")
        self.weights.append(numpy_helper.from_array(np.asarray(value, dtype=kind), name))
        return name

    def ints(self, *values: int) -> str:
        """A weight of int64."""
        return self.const(values, np.int64)

    def floats(self, value: object) -> str:
        """A weight of float32."""
        return self.const(value, np.float32)

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """A node of ONNX's own operators, with one output."""
        output = name or self.fresh(kind)
        self.nodes.append(
            helper.make_node(kind, inputs, [output], name=self.fresh(f"{kind}_node"), **attributes)
        )
        return output

    def top(self, values: str, count: int, *, indices: str) -> None:
        """The indices of the largest values along the last axis, the largest first."""
        outputs = [self.fresh("TopK"), indices]
        self.nodes.append(helper.make_node("TopK", [values, self.ints(count)], outputs, axis=-1))

    def reduce(self, kind: str, value: str, *axes: int) -> str:
        """ReduceMax or ReduceMin that keeps the axes."""
        if self.opset >= 18:
            return self.op(kind, value, self.ints(*axes), keepdims=1)
        return self.op(kind, value, axes=list(axes), keepdims=1)

    def copy(
        self, graph: Graph, numbers: Sequence[int], given: Mapping[str, str]
    ) -> dict[str, str]:
        """Nodes once more, with other values for some that enter: old name -> new name."""
        names = dict(given)
        copy_number = self.fresh("copy")
        for number in numbers:
            node = onnx.NodeProto()
            node.CopyFrom(graph.nodes[number])
            for name in node.output:
                if name and name not in given:
                    names[name] = f"{copy_number}/{name}"
            rename(node, names)
            node.name = f"{copy_number}/{node.name or number}"
            self.nodes.append(node)
        return names


def rename(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Give a node's values, also those that its subgraphs take from outside, other names."""
    node.input[:] = [names.get(name, name) for name in node.input]
    node.output[:] = [names.get(name, name) for name in node.output]
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs):
            own = {value.name for value in (*body.input, *body.initializer)}
            own |= {name for inner in body.node for name in inner.output}
            outer = {old: new for old, new in names.items() if old not in own}
            for inner in body.node:
                rename(inner, outer)
            for value in body.output:
                value.name = outer.get(value.name, value.name)
