"""Append nodes that turn the logits under all masks into the outputs of an explained file."""

from __future__ import annotations

import numpy as np

import onnx
from onnx import helper
from vit_reciprocam.onnx.contract import check_file_targets
from vit_reciprocam.onnx.insert.branch import Branch
from vit_reciprocam.onnx.insert.read import Reading

__all__ = ["append_outputs"]


def append_outputs(
    branch: Branch, reading: Reading, logits: str, *, targets: str, raw: bool
) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    """Append scores, maps and classes as `vit_reciprocam.onnx.contract` names them.

    `logits` is the name of the logits (B, N, C) under all masks; `targets` and `raw` are those of
    `insert`. The result is the inputs and the outputs to add to the graph's own.
    """
    top = check_file_targets(targets)
    batch = reading.batch or "batch"
    inputs, outputs = [], []
    probabilities = logits if reading.is_softmax else branch.op("Softmax", logits, axis=-1)
    count: int | str = reading.classes
    if targets != "all":
        count = top or "targets"
        chosen = helper.make_tensor_value_info("targets", onnx.TensorProto.INT64, [batch, count])
        if top:
            most = branch.op("Cast", reading.logits, to=onnx.TensorProto.FLOAT)
            branch.top(most, top, indices="classes")
            chosen.name = "classes"
            outputs.append(chosen)
        else:
            inputs.append(chosen)
        index = branch.op("Reshape", chosen.name, branch.ints(0, 1, -1))
        patches = reading.layout.grid[0] * reading.layout.grid[1]
        index = branch.op("Expand", index, branch.ints(1, patches, 1))
        probabilities = branch.op("GatherElements", probabilities, index, axis=2)
    dims = [batch, count, *reading.layout.grid]
    # In this order a runtime copies the scores of all classes only once, into the output.
    opened = branch.op("Reshape", probabilities, branch.ints(0, *reading.layout.grid, -1))
    scores = branch.op("Transpose", opened, perm=[0, 3, 1, 2], name="scores")
    outputs.insert(0, helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, dims))
    if not raw:
        _append_maps(branch, scores)
        outputs.insert(0, helper.make_tensor_value_info("saliency", onnx.TensorProto.FLOAT, dims))
    return inputs, outputs


def _append_maps(branch: Branch, scores: str) -> None:
    """Append maps in [0, 1]; a map is 0 everywhere if its scores differ by rounding only."""
    low, high = (branch.reduce(each, scores, 2, 3) for each in ("ReduceMin", "ReduceMax"))
    spread = branch.op("Sub", high, low)
    least = branch.op("Mul", high, branch.floats(4 * np.finfo(np.float32).eps))
    differs = branch.op("Greater", spread, least)
    stretch = branch.op("Reciprocal", spread)
    stretch = branch.op("Where", differs, stretch, branch.floats(0.0))
    branch.op("Mul", branch.op("Sub", scores, low), stretch, name="saliency")
