"""Append nodes that give the logits under all masks by the definition: a loop over the masks."""

from __future__ import annotations

import numpy as np

import onnx
from onnx import helper
from vit_reciprocam.core.masks import Masking, mask_matrix
from vit_reciprocam.onnx.insert.branch import PREFIX, Branch
from vit_reciprocam.onnx.insert.graph import Graph
from vit_reciprocam.onnx.insert.read import Reading

__all__ = ["append_direct"]


def append_direct(branch: Branch, graph: Graph, reading: Reading, masking: Masking) -> str:
    """Append the logits (B, N, C) under all masks; a loop runs the nodes after F once per mask.

    Args:
        branch: What takes the nodes.
        graph: The graph as it was read.
        reading: What was read.
        masking: The masks.
    """
    normed = reading.values[reading.normed]
    masks = mask_matrix(reading.layout.grid, masking, prefix_tokens=reading.layout.prefix)
    first = reading.layout.axes[0]
    tokens = [normed.shape[axis] for axis in reading.layout.axes]
    after = normed.ndim - first - len(tokens)
    shape = (len(masks), *[1] * first, *tokens, *[1] * after)  # each one to multiply F with
    stacked = branch.const(masks.reshape(shape).astype(normed.dtype))
    body = branch.body()
    mask = body.op("Gather", stacked, f"{PREFIX}number", axis=0)
    given = {reading.normed: body.op("Mul", reading.normed, mask)}
    numbers = graph.nodes_between(given, [reading.logits])
    logits = body.copy(graph, numbers, given)[reading.logits]
    logits = body.op("Cast", logits, to=onnx.TensorProto.FLOAT)
    goes_on = body.op("Identity", f"{PREFIX}going")
    loop = helper.make_graph(
        body.nodes,
        f"{PREFIX}mask",
        [
            helper.make_tensor_value_info(f"{PREFIX}number", onnx.TensorProto.INT64, []),
            helper.make_tensor_value_info(f"{PREFIX}going", onnx.TensorProto.BOOL, []),
        ],
        [
            helper.make_tensor_value_info(goes_on, onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info(logits, onnx.TensorProto.FLOAT, [None, reading.classes]),
        ],
    )
    count, always = branch.const(len(masks), np.int64), branch.const(True, np.bool_)
    stacked = branch.op("Loop", count, always, body=loop)  # (N, B, C)
    return branch.op("Transpose", stacked, perm=[1, 0, 2])
