"""Remove the rounding of what flows through a quantised graph.

Under a mask the scores of a class often differ by less than a hundredth, which int8 would drown. So
the explanation of a graph with QuantizeLinear and DequantizeLinear nodes computes between them in
float, with the graph's own int8 weights, from the value that is masked on. Where only numbers from
0 on can be held, negative ones stay cut off: quantisers leave a ReLU to that.
"""

from __future__ import annotations

import numpy as np

import onnx
from onnx import helper
from vit_reciprocam.onnx.insert.graph import Graph

__all__ = ["remove_rounding"]


def remove_rounding(graph: Graph, pixels: set[str]) -> Graph:
    """Return a graph that takes each rounded value as it was before; itself if none is rounded.

    Args:
        graph: The graph.
        pixels: The values that depend on the images; weights stay rounded.
    """
    rounding = {
        node.output[0]: node
        for node in graph.nodes
        if node.op_type == "QuantizeLinear" and node.input[0] in pixels
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
    """Tell whether the zero of a QuantizeLinear node is its least number."""
    if len(node.input) < 3:
        return True  # uint8 from 0 on
    zero = graph.constant(node.input[2])
    return zero is not None and bool((zero == np.iinfo(zero.dtype).min).all())
