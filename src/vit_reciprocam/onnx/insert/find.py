"""Find the last attention of an ONNX graph, and the LayerNorm's output that it is computed from.

Only values that depend on the images are followed (`Graph.image_values`): masks, position tables
and learned queries are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import onnx
from vit_reciprocam.errors import ModelError
from vit_reciprocam.onnx.insert.graph import Graph, node_inputs

__all__ = [
    "FUSED",
    "PRODUCTS",
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
# Nodes that only rearrange numbers, on the way from a value to its projections and their heads.
_VIEWS = _KEEP | {
    "DynamicQuantizeLinear",
    "Reshape",
    "Flatten",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Split",
    "Gather",
    "Expand",
}
PRODUCTS = frozenset({"MatMul", "FusedMatMul", "QLinearMatMul"})
_PROJECTIONS = PRODUCTS | {
    "Gemm",
    "FusedGemm",
    "Conv",
    "FusedConv",
    "MatMulInteger",
    "QGemm",
    "QLinearConv",
    "ConvInteger",
    "MatMulNBits",
    "DynamicQuantizeMatMul",
    "MatMulIntegerToFloat",
}
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


class FoundAttention(NamedTuple):
    """An attention: the number of its fused node or its softmax, and the names of its values."""

    number: int
    query: str
    key: str
    value: str
    output: str


def find_attention(graph: Graph) -> Iterator[FoundAttention]:
    """Yield the attentions, the last one first, except those whose queries are learned vectors."""
    for number in reversed(range(len(graph.nodes))):
        node = graph.nodes[number]
        found = None
        if node.op_type in FUSED:
            query = node.input[0]
            # ONNX Runtime's Attention, QAttention and PackedAttention project one input themselves.
            projects = node.domain == "com.microsoft" and node.op_type != "MultiHeadAttention"
            key, value = (query, query) if projects else (node.input[1], node.input[2])
            found = FoundAttention(number, query, key, value, node.output[0])
        elif node.op_type in ("Softmax", "QLinearSoftmax"):
            found = _read_softmax(graph, number)
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
        mixes = node.op_type in FUSED or node.op_type in ("Softmax", "QLinearSoftmax")
        if not mixes or number in above or number == found.number:
            continue
        if node.op_type not in FUSED and node.output[0] in graph.walk_up(logits, _KEEP):
            continue
        other = _read_softmax(graph, number)
        query = node.input[0] if node.op_type in FUSED else other and other.query
        if query is None or query in graph.image_values:
            raise ModelError(
                f"besides the last attention that could be read, {graph.describe(found.output)}, "
                f"images reach the logits through {graph.describe(node.output[0])}; target_node= "
                "(--target-node) names the value to mask all the same"
            )


def _read_softmax(graph: Graph, number: int) -> FoundAttention | None:
    """Return the attention that a softmax belongs to: softmax(queries · keys) · values."""
    node = graph.nodes[number]
    weights, products = [node.output[0]], set()
    for name in weights:  # each cast and guard adds its output to the list
        for consumer in graph.consumers.get(name, []):
            after = graph.nodes[consumer]
            if after.op_type in PRODUCTS:
                products.add(consumer)
            elif after.op_type in _KEEP | _GUARDS:
                weights += [each for each in after.output if each not in weights]
    if len(products) != 1:
        return None
    after = graph.nodes[products.pop()]
    if after.input[0] not in weights or _factor(after) not in graph.image_values:
        return None
    before = _find_product(graph, node.input[0])
    if before is None:
        return None
    return FoundAttention(number, before.input[0], _factor(before), _factor(after), after.output[0])


def _find_product(graph: Graph, name: str) -> onnx.NodeProto | None:
    """Return the product of queries and keys above a softmax, past scale, bias and casts."""
    while (node := graph.producer(name)) is not None:
        if node.op_type in PRODUCTS and _factor(node) in graph.image_values:
            return node
        above = graph.image_inputs(node)
        if len(above) != 1:
            return None
        name = above[0]
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
    waiting, seen = list(names), set()
    found: dict[str, None] = {}
    while waiting:
        name = waiting.pop()
        node = graph.producer(name)
        if name in seen or node is None:
            continue
        seen.add(name)
        # A product of two values that both depend on the images, such as a gate, does not project.
        # A dynamic quantiser splits a value into numbers, scale and zero point, which are then
        # projected: its input counts.
        if node.op_type == "DynamicQuantizeLinear" or (
            node.op_type in _PROJECTIONS and _factor(node) not in graph.image_values
        ):
            found[node.input[0]] = None
        else:
            waiting += graph.image_inputs(node)
    return list(found)


def _factor(node: onnx.NodeProto) -> str:
    """Return the second factor of a product, input 3 for QLinear... and else input 1."""
    return str(node.input[3] if node.op_type.startswith("QLinear") else node.input[1])


def _is_norm(graph: Graph, name: str) -> bool:
    """Tell whether a value comes from a LayerNorm, written as one node or as single operators."""
    waiting, seen = [name], 0
    while waiting and seen < 16:  # a LayerNorm of single operators has about ten
        node = graph.producer(waiting.pop(0))
        if node is None:
            continue
        seen += 1
        if node.op_type in _NORMS:
            return True
        above = [each for each in node_inputs(node) if each in graph.image_values]
        residual = node.op_type == "Add" and len(above) > 1
        if not residual and node.op_type not in _PROJECTIONS:
            waiting += above
    return False


def has_head(graph: Graph, logits: str) -> bool:
    """Tell whether a projection stands between the last LayerNorm and the logits."""
    waiting, seen = [logits], set()
    while waiting:
        number = graph.number_of.get(waiting.pop())
        if number is None or number in seen:
            continue
        seen.add(number)
        node = graph.nodes[number]
        if node.op_type in _PROJECTIONS:
            return True
        if node.op_type not in _NORMS:
            waiting += graph.image_inputs(node)
    return False
