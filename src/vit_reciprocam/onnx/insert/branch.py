"""Build what is added to a graph: nodes and weights, the direct path's loop, and the outputs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import onnx
from onnx import helper, numpy_helper
from vit_reciprocam.core.masks import Masking
from vit_reciprocam.onnx.contract import check_file_targets
from vit_reciprocam.onnx.insert.graph import Graph, subgraphs
from vit_reciprocam.onnx.insert.read import Reading

__all__ = ["PREFIX", "Branch", "append_direct", "append_outputs"]

PREFIX = "reciprocam/"

_LEAST = float(np.finfo(np.float32).tiny)  # stands for 0 in a denominator
_info = helper.make_tensor_value_info
_FLOAT, _INT64, _BOOL = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.BOOL


class Branch:
    """What is added to a graph; all names but those of inputs and outputs begin with PREFIX."""

    def __init__(self, opset: int) -> None:
        """Start without nodes, for a version of ONNX's own operators."""
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []  # in an order in which they can run
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


def append_direct(
    branch: Branch, graph: Graph, reading: Reading, masking: Masking, *, null: bool
) -> str:
    """Append a loop that runs the nodes after F once per mask; return the logits (B, N, C).

    If `null`, those under the all-null mask come first, (B, 1 + N, C).
    """
    masks = reading.masks(masking, null=null)
    all_masks = branch.const(masks)
    body = branch.body()
    mask = body.op("Gather", all_masks, f"{PREFIX}number", axis=0)
    given = {reading.normed: body.op("Mul", reading.normed, mask)}
    numbers = graph.nodes_between(given, [reading.logits])
    logits = body.copy(graph, numbers, given)[reading.logits]
    logits = body.op("Cast", logits, to=_FLOAT)
    go_on = body.op("Identity", f"{PREFIX}going")
    loop = helper.make_graph(
        body.nodes,
        f"{PREFIX}mask",
        [_info(f"{PREFIX}number", _INT64, []), _info(f"{PREFIX}going", _BOOL, [])],
        [_info(go_on, _BOOL, []), _info(logits, _FLOAT, [None, reading.classes])],
    )
    count, always = branch.const(len(masks), np.int64), branch.const(True, np.bool_)
    stacked = branch.op("Loop", count, always, body=loop)  # (N, B, C)
    return branch.op("Transpose", stacked, perm=[1, 0, 2])


def append_outputs(
    branch: Branch, reading: Reading, logits: str, *, targets: str, raw: bool, null: bool
) -> None:
    """Append scores, maps and classes, as `onnx.contract` names them, from logits (B, N, C).

    If `null`, logits (B, 1 + N, C) begin with those under the all-null mask, and the scores are the
    evidence over it.
    """
    top = check_file_targets(targets)
    batch = reading.batch or "batch"
    if null and reading.is_softmax:
        least = branch.floats(np.finfo(np.float32).tiny)
        values = branch.op("Log", branch.op("Max", logits, least))
    elif reading.is_softmax:
        values = logits
    else:
        values = branch.op("LogSoftmax" if null else "Softmax", logits, axis=-1)
    count: int | str = reading.classes
    if targets != "all":
        count = top or "targets"
        chosen = _info("targets", _INT64, [batch, count])
        if top:
            most = branch.op("Cast", reading.logits, to=_FLOAT)
            found = [branch.new_name("TopK"), "classes"]
            node = helper.make_node("TopK", [most, branch.ints(top)], found, axis=-1)
            branch.nodes.append(node)
            chosen.name = "classes"
            branch.outputs.append(chosen)
        else:
            branch.inputs.append(chosen)
        index = branch.op("Reshape", chosen.name, branch.ints(0, 1, -1))
        patches = reading.layout.grid[0] * reading.layout.grid[1]
        index = branch.op("Expand", index, branch.ints(1, null + patches, 1))
        values = branch.op("GatherElements", values, index, axis=2)
    if null:
        ends = branch.ints(0), branch.ints(1), branch.ints(1)
        none = branch.op("Slice", values, *ends)
        rest = branch.ints(1), branch.ints(np.iinfo(np.int64).max), branch.ints(1)
        values = branch.op("Sub", branch.op("Slice", values, *rest), none)
    dims = [batch, count, *reading.layout.grid]
    # In this order a runtime copies the scores of all classes only once, into the output.
    opened = branch.op("Reshape", values, branch.ints(0, *reading.layout.grid, -1))
    scores = branch.op("Transpose", opened, perm=[0, 3, 1, 2], name="scores")
    branch.outputs.insert(0, _info("scores", _FLOAT, dims))
    if not raw:
        _append_maps(branch, scores, null)
        branch.outputs.insert(0, _info("saliency", _FLOAT, dims))


def _append_maps(branch: Branch, scores: str, null: bool) -> None:
    """Append maps in [0, 1]; a map is 0 everywhere if its scores differ by rounding only.

    Of evidence, which has a zero of its own (`null`), a map is the positive part.
    """

    def reduce(kind: str, values: str) -> str:  # the axes are an input since opset 18
        if branch.opset >= 18:
            return branch.op(kind, values, branch.ints(2, 3), keepdims=1)
        return branch.op(kind, values, axes=[2, 3], keepdims=1)

    if null:
        positive = branch.op("Relu", scores)
        most = branch.op("Max", reduce("ReduceMax", positive), branch.floats(_LEAST))
        branch.op("Div", positive, most, name="saliency")
        return
    low, high = reduce("ReduceMin", scores), reduce("ReduceMax", scores)
    spread = branch.op("Sub", high, low)
    least = branch.op("Mul", high, branch.floats(4 * np.finfo(np.float32).eps))
    differs = branch.op("Greater", spread, least)
    stretch = branch.op("Reciprocal", spread)
    stretch = branch.op("Where", differs, stretch, branch.floats(0.0))
    branch.op("Mul", branch.op("Sub", scores, low), stretch, name="saliency")
