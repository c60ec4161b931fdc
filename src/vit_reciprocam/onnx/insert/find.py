"""Find the last attention of an ONNX graph, and the LayerNorm's output that it is computed from.

Only values that depend on the images are followed (`Graph.image_values`): masks, position tables
and learned queries are not.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import onnx
from vit_reciprocam.errors import ModelError
from vit_reciprocam.onnx.insert.graph import Graph

__all__ = [
    "CONVOLUTIONS",
    "FUSED",
    "FoundAttention",
    "find_attention",
    "find_normed",
    "has_head",
    "refuse_other_attention",
]

# Besides ONNX's own kinds of nodes, these sets hold those that ONNX Runtime's optimizers and
# quantisers write instead: Fused..., QLinear..., ...Integer, Skip..., and those of com.microsoft.

# Nodes that leave every number in its place; the Relu may come from `remove_rounding`.
_KEEP = frozenset({"Cast", "Relu", "Identity", "Dropout", "QuantizeLinear", "DequantizeLinear"})
# Nodes that put 0 in place of the NaN that softmax gives for rows that are masked as a whole.
_GUARDS = frozenset({"IsNaN", "Where"})
_RESHAPES = frozenset({"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Expand"})
_PICKS = frozenset({"Slice", "Split", "Gather"})
# Nodes that only rearrange numbers, on the way from a value to its projections and their heads.
_VIEWS = _KEEP | _RESHAPES | _PICKS | {"DynamicQuantizeLinear"}
_PRODUCTS = frozenset({"MatMul", "FusedMatMul", "QLinearMatMul"})
_PRODUCTS_OF_INTEGERS = frozenset(
    {"MatMulInteger", "MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
)
_SUMS_OF_PRODUCTS = frozenset({"Gemm", "FusedGemm", "QGemm"})
CONVOLUTIONS = frozenset({"Conv", "FusedConv", "QLinearConv", "ConvInteger"})
_PROJECTIONS = _PRODUCTS | _PRODUCTS_OF_INTEGERS | _SUMS_OF_PRODUCTS | CONVOLUTIONS
# ReduceMean stands for a LayerNorm that was written as single operators, before opset 17.
_NORMS = frozenset(
    {
        "LayerNormalization",
        "RMSNormalization",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "ReduceMean",
    }
)
FUSED = frozenset({"Attention", "MultiHeadAttention", "QAttention", "PackedAttention"})
_SOFTMAXES = frozenset({"Softmax", "QLinearSoftmax"})


class FoundAttention(NamedTuple):
    """An attention: the number of its fused node or its softmax, and the names of its values."""

    number: int
    query: str
    key: str
    value: str
    output: str
    product: onnx.NodeProto | None = None  # queries times keys, unless the attention is fused


def find_attention(graph: Graph) -> Iterator[FoundAttention]:
    """Yield the attentions, the last one first, except those whose queries are learned vectors."""
    for number in reversed(range(len(graph.nodes))):
        found = _read_node(graph, number)
        if found and found.query in graph.image_values:
            yield found


def refuse_other_attention(graph: Graph, found: FoundAttention, normed: str, logits: str) -> None:
    """Refuse a graph in which images reach the logits through yet another attention.

    Attentions above F are allowed. So are, after it, those whose queries are learned vectors, and a
    softmax of the logits.
    """
    above = set(graph.nodes_above([normed]))
    for number in graph.nodes_above([logits]):
        node = graph.nodes[number]
        if node.op_type not in FUSED | _SOFTMAXES or number in above or number == found.number:
            continue
        if node.op_type in _SOFTMAXES and node.output[0] in graph.walk_up(logits, _KEEP):
            continue
        other = _read_node(graph, number)
        if other is None or other.query in graph.image_values:
            raise ModelError(
                f"besides the last attention that could be read, {graph.describe(found.output)}, "
                f"images reach the logits through {graph.describe(node.output[0])}; target_node= "
                "(--target-node) names the value to mask all the same"
            )


def _read_node(graph: Graph, number: int) -> FoundAttention | None:
    """Return the attention that a node is, or to which it belongs as the softmax."""
    node = graph.nodes[number]
    if node.op_type in FUSED:
        query = node.input[0]
        # ONNX Runtime's Attention, QAttention and PackedAttention project one input themselves.
        projects = node.domain == "com.microsoft" and node.op_type != "MultiHeadAttention"
        key, value = (query, query) if projects else (node.input[1], node.input[2])
        return FoundAttention(number, query, key, value, node.output[0])
    if node.op_type not in _SOFTMAXES:
        return None
    weights, products = [node.output[0]], set()
    for name in weights:  # each cast and guard adds its output to the list
        for consumer in graph.consumers(name):
            after = graph.nodes[consumer]
            if after.op_type in _PRODUCTS:
                products.add(consumer)
            elif after.op_type in _KEEP | _GUARDS:
                weights += [each for each in after.output if each not in weights]
    if len(products) != 1:
        return None
    after = graph.nodes[products.pop()]
    if after.input[0] not in weights or _factor(after) not in graph.image_values:
        return None
    for name in graph.walk_up(node.input[0]):  # past scale, bias and casts
        before = graph.producer(name)
        if (
            before is not None
            and before.op_type in _PRODUCTS
            and _factor(before) in graph.image_values
        ):
            key, value = _factor(before), _factor(after)
            return FoundAttention(number, before.input[0], key, value, after.output[0], before)
    return None


def find_normed(graph: Graph, found: FoundAttention) -> str:
    """Return the name of F: the LayerNorm's output that queries, keys and values come from."""
    operands = [found.query, found.key, found.value]
    projects_itself = len(set(operands)) == 1
    projected = [found.query] if projects_itself else _find_projected(graph, operands)
    ways = [list(graph.walk_up(name, _VIEWS)) for name in projected]
    if not ways:
        raise ModelError("no projection of queries, keys and values was found")
    shared = [name for name in ways[0] if all(name in way for way in ways)]
    if not shared:
        raise ModelError(
            "queries, keys and values of the last attention come from different values: stopped at "
            + ", ".join(sorted({graph.describe(way[-1]) for way in ways}))
        )
    # The uppermost shared value is the LayerNorm's output; below it are the same tokens in other
    # shapes, or quantised.
    normed = shared[-1]
    if not _is_norm(graph, normed):
        raise ModelError(
            f"the last attention's input is not a LayerNorm's output: stopped at "
            f"{graph.describe(normed)}; target_node= (--target-node) names the value to mask"
        )
    return normed


def _find_projected(graph: Graph, names: list[str]) -> list[str]:
    """Return the inputs of the nearest projections above some values."""

    # A product of two values that both depend on the images, such as a gate, does not project.
    # A dynamic quantiser splits a value into numbers, scale and zero point, which are then
    # projected: its input counts.
    def projects(node: onnx.NodeProto) -> bool:
        return node.op_type == "DynamicQuantizeLinear" or (
            node.op_type in _PROJECTIONS and _factor(node) not in graph.image_values
        )

    found = (node.input[0] for node in graph.search_up(names, until=projects) if projects(node))
    return [*dict.fromkeys(found)]


def _factor(node: onnx.NodeProto) -> str:
    """Return the second factor of a product, input 3 for QLinear... and else input 1."""
    return str(node.input[3] if node.op_type.startswith("QLinear") else node.input[1])


def _is_norm(graph: Graph, name: str) -> bool:
    """Tell whether a value comes from a LayerNorm, written as one node or as single operators."""

    def ends(node: onnx.NodeProto) -> bool:
        residual = node.op_type == "Add" and len(graph.image_inputs(node)) > 1
        return residual or node.op_type in _PROJECTIONS

    # A LayerNorm of single operators has about ten.
    nodes = itertools.islice(graph.search_up([name], until=ends), 16)
    return any(node.op_type in _NORMS for node in nodes)


def has_head(graph: Graph, logits: str) -> bool:
    """Tell whether a projection stands between the last LayerNorm and the logits."""
    nodes = graph.search_up([logits], until=lambda node: node.op_type in _NORMS)
    return any(node.op_type in _PROJECTIONS for node in nodes)
