"""Append the loop of the direct path, and what turns logits under all masks into outputs."""

from __future__ import annotations

import numpy as np

import onnx
from onnx import helper
from vit_reciprocam.core.masks import Masking
from vit_reciprocam.onnx.contract import check_file_targets
from vit_reciprocam.onnx.insert.branch import PREFIX, Branch
from vit_reciprocam.onnx.insert.graph import Graph
from vit_reciprocam.onnx.insert.read import Reading

__all__ = ["append_direct", "append_outputs"]

_info = helper.make_tensor_value_info
_FLOAT, _INT64, _BOOL = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.BOOL


def append_direct(branch: Branch, graph: Graph, reading: Reading, masking: Masking) -> str:
    """Append a loop that runs the nodes after F once per mask; return the logits (B, N, C)."""
    masks = reading.masks(masking)
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
    branch: Branch, reading: Reading, logits: str, *, targets: str, raw: bool
) -> None:
    """Append scores, maps and classes as `vit_reciprocam.onnx.contract` names them.

    `logits` is the name of the logits (B, N, C) under all masks; `targets` and `raw` are those of
    `insert`.
    """
    top = check_file_targets(targets)
    batch = reading.batch or "batch"
    probabilities = logits if reading.is_softmax else branch.op("Softmax", logits, axis=-1)
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
        index = branch.op("Expand", index, branch.ints(1, patches, 1))
        probabilities = branch.op("GatherElements", probabilities, index, axis=2)
    dims = [batch, count, *reading.layout.grid]
    # In this order a runtime copies the scores of all classes only once, into the output.
    opened = branch.op("Reshape", probabilities, branch.ints(0, *reading.layout.grid, -1))
    scores = branch.op("Transpose", opened, perm=[0, 3, 1, 2], name="scores")
    branch.outputs.insert(0, _info("scores", _FLOAT, dims))
    if not raw:
        _append_maps(branch, scores)
        branch.outputs.insert(0, _info("saliency", _FLOAT, dims))


def _append_maps(branch: Branch, scores: str) -> None:
    """Append maps in [0, 1]; a map is 0 everywhere if its scores differ by rounding only."""
    low, high = (branch.reduce(each, scores, 2, 3) for each in ("ReduceMin", "ReduceMax"))
    spread = branch.op("Sub", high, low)
    least = branch.op("Mul", high, branch.floats(4 * np.finfo(np.float32).eps))
    differs = branch.op("Greater", spread, least)
    stretch = branch.op("Reciprocal", spread)
    stretch = branch.op("Where", differs, stretch, branch.floats(0.0))
    branch.op("Mul", branch.op("Sub", scores, low), stretch, name="saliency")
