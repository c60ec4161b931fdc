"""Append a loop over the masks that computes the logits as the method defines them."""

from __future__ import annotations

import numpy as np

import onnx
from onnx import helper
from vit_reciprocam.core.masks import Masking
from vit_reciprocam.onnx.insert.branch import PREFIX, Branch
from vit_reciprocam.onnx.insert.graph import Graph
from vit_reciprocam.onnx.insert.read import Reading

__all__ = ["append_direct"]


def append_direct(branch: Branch, graph: Graph, reading: Reading, masking: Masking) -> str:
    """Append a loop that runs the nodes after F once per mask; return the logits (B, N, C)."""
    masks = reading.masks(masking)
    all_masks = branch.const(masks)
    body = branch.body()
    mask = body.op("Gather", all_masks, f"{PREFIX}number", axis=0)
    given = {reading.normed: body.op("Mul", reading.normed, mask)}
    numbers = graph.nodes_between(given, [reading.logits])
    logits = body.copy(graph, numbers, given)[reading.logits]
    logits = body.op("Cast", logits, to=onnx.TensorProto.FLOAT)
    go_on = body.op("Identity", f"{PREFIX}going")
    loop = helper.make_graph(
        body.nodes,
        f"{PREFIX}mask",
        [
            helper.make_tensor_value_info(f"{PREFIX}number", onnx.TensorProto.INT64, []),
            helper.make_tensor_value_info(f"{PREFIX}going", onnx.TensorProto.BOOL, []),
        ],
        [
            helper.make_tensor_value_info(go_on, onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info(logits, onnx.TensorProto.FLOAT, [None, reading.classes]),
        ],
    )
    count, always = branch.const(len(masks), np.int64), branch.const(True, np.bool_)
    stacked = branch.op("Loop", count, always, body=loop)  # (N, B, C)
    return branch.op("Transpose", stacked, perm=[1, 0, 2])
