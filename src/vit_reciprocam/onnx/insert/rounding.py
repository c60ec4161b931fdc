"""Remove the rounding of the values that a quantised graph computes from the images.

Under a mask the scores of a class often change by less than a hundredth, which the rounding to int8
would drown. So in a graph with QuantizeLinear and DequantizeLinear nodes the explanation computes
in float from the masked value on, with the graph's own int8 weights. If a QuantizeLinear can hold
no negative numbers, they are still cut off, because quantisers fold a ReLU into such a node.
"""

from __future__ import annotations

import numpy as np

import onnx
from onnx import helper
from vit_reciprocam.onnx.insert.graph import Graph

__all__ = ["remove_rounding"]


def remove_rounding(graph: Graph) -> Graph:
    """Return the graph without rounding, except of its weights; itself if it has none to remove."""
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
            kind = "Relu" if _holds_no_negative(graph, first) else "Identity"
            node.CopyFrom(helper.make_node(kind, first.input[:1], node.output, node.name))
    return Graph(model, graph.folder)


def _holds_no_negative(graph: Graph, node: onnx.NodeProto) -> bool:
    """Tell whether the zero point of a QuantizeLinear node is the smallest number of its type."""
    if len(node.input) < 3:
        return True  # uint8 from 0 on
    zero = graph.constant(node.input[2])
    return zero is not None and bool((zero == np.iinfo(zero.dtype).min).all())
