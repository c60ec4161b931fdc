"""Quantised graphs without the rounding of what flows through them.

Under a mask the scores of a class often differ by less than a hundredth, which int8 would drown. So
the explanation of a graph with QuantizeLinear and DequantizeLinear nodes computes between them in
float, with the graph's own int8 weights, from the value that is masked on.
"""

from __future__ import annotations

import onnx
from onnx import helper

from vit_reciprocam.onnx.foreign.graph import Graph

__all__ = ["without_rounding"]


def without_rounding(graph: Graph, pixels: set[str]) -> Graph:
    """The graph with each rounded value taken as it was before, or itself if nothing is rounded."""
    before = {
        node.output[0]: node.input[0]
        for node in graph.nodes
        if node.op_type == "QuantizeLinear" and node.input[0] in pixels
    }
    if not before:
        return graph
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in before:
            plain = helper.make_node("Identity", [before[node.input[0]]], node.output, node.name)
            node.CopyFrom(plain)
    return Graph(model, graph.folder)
