"""Where the last attention stands in an ONNX graph, and the LayerNorm's output before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import onnx
from vit_reciprocam.errors import ModelError
from vit_reciprocam.onnx.insert.graph import Graph, taken

__all__ = [
    "FUSED",
    "PRODUCTS",
    "Found",
    "find_attention",
    "find_normed",
    "has_head",
    "refuse_others",
]

_PASS = frozenset({"Cast", "Relu", "Identity", "Dropout", "QuantizeLinear", "DequantizeLinear"})
_GUARDS = frozenset({"IsNaN", "Where"})  # of rows that are masked whole
_VIEWS = _PASS | {
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


class Found(NamedTuple):
    """An attention: the number of its softmax's or fused node, and its values."""

    number: int
    query: str
    key: str
    value: str
    output: str


def find_attention(graph: Graph, pixels: set[str]) -> Iterator[Found]:
    """Attentions whose queries depend on the images, from the last one on.

    One that learned vectors ask, as in pooling heads, is passed over.
    """
    for number in reversed(range(len(graph.nodes))):
        node = graph.nodes[number]
        found = None
        if node.op_type in FUSED:
            query = node.input[0]
            alone = node.domain == "com.microsoft" and node.op_type != "MultiHeadAttention"
            key, value = (query, query) if alone else (node.input[1], node.input[2])
            found = Found(number, query, key, value, node.output[0])
        elif node.op_type in ("Softmax", "QLinearSoftmax"):
            found = _around_softmax(graph, number, pixels)
        if found and found.query in pixels:
            yield found


def refuse_others(graph: Graph, found: Found, normed: str, logits: str, pixels: set[str]) -> None:
    """Refuse a graph in which images reach the logits through another attention beside or below.

    Attention that learned vectors ask may stand below, and a softmax of the logits.

    Raises:
        ModelError: Naming the other one.
    """
    above = set(graph.above([normed]))
    for number in graph.above([logits]):
        node = graph.nodes[number]
        mixes = node.op_type in FUSED or node.op_type in ("Softmax", "QLinearSoftmax")
        if not mixes or number in above or number == found.number:
            continue
        if node.op_type not in FUSED and node.output[0] in graph.walk_up(logits, _PASS, pixels):
            continue
        other = _around_softmax(graph, number, pixels)
        asking = node.input[0] if node.op_type in FUSED else other and other.query
        if asking is None or asking in pixels:
            raise ModelError(
                f"besides the last attention that could be read, {graph.describe(found.output)}, "
                f"images reach the logits through {graph.describe(node.output[0])}; target_node= "
                "(--target-node) names the value to mask all the same"
            )


def _around_softmax(graph: Graph, number: int, pixels: set[str]) -> Found | None:
    node = graph.nodes[number]
    weights, products = [node.output[0]], set()
    for name in weights:
        for taker in graph.takers.get(name, []):
            after = graph.nodes[taker]
            if after.op_type in PRODUCTS:
                products.add(taker)
            elif after.op_type in _PASS | _GUARDS:
                weights += [each for each in after.output if each not in weights]
    if len(products) != 1:
        return None
    after = graph.nodes[products.pop()]
    if after.input[0] not in weights or _factor(after) not in pixels:
        return None
    scores = _product_above(graph, node.input[0], pixels)
    if scores is None:
        return None
    before = graph.nodes[graph.maker[scores]]
    return Found(number, before.input[0], _factor(before), _factor(after), after.output[0])


def _product_above(graph: Graph, name: str, pixels: set[str]) -> str | None:
    """The product of queries and keys above a softmax's input, past scale, bias and casts."""
    while name in graph.maker:
        node = graph.nodes[graph.maker[name]]
        above = [each for each in dict.fromkeys(taken(node)) if each in pixels]
        if node.op_type in PRODUCTS and _factor(node) in pixels:
            return name
        if len(above) != 1:
            return None
        name = above[0]
    return None


def find_normed(graph: Graph, found: Found, pixels: set[str]) -> str:
    """F: the value that queries, keys and values are all projected from.

    Raises:
        ModelError: If there is none, or a LayerNorm does not make it; names the node.
    """
    parts = [found.query, found.key, found.value]
    alone = len(set(parts)) == 1  # projects by itself
    projected = [found.query] if alone else _projected_from(graph, parts, pixels)
    ways = [list(graph.walk_up(name, _VIEWS, pixels)) for name in projected]
    if not ways:
        raise ModelError("no projection of queries, keys and values was found")
    shared = [name for name in ways[0] if all(name in way for way in ways)]
    if not shared:
        raise ModelError(
            "queries, keys and values of the last attention come from different values: stopped at "
            + ", ".join(sorted({graph.describe(way[-1]) for way in ways}))
        )
    normed = shared[-1]
    near = graph.nodes[graph.maker[normed]] if normed in graph.maker else None
    if near is None or not _is_norm(graph, normed, pixels):
        raise ModelError(
            f"the last attention's input is not a LayerNorm's output: stopped at "
            f"{graph.describe(normed)}; target_node= (--target-node) names the value to mask"
        )
    return normed


def _projected_from(graph: Graph, parts: list[str], pixels: set[str]) -> list[str]:
    waiting, seen = list(parts), set()
    found: dict[str, None] = {}
    while waiting:
        name = waiting.pop()
        if name in seen or name not in graph.maker:
            continue
        seen.add(name)
        node = graph.nodes[graph.maker[name]]
        above = [each for each in dict.fromkeys(taken(node)) if each in pixels]
        if node.op_type == "DynamicQuantizeLinear" or (
            node.op_type in _PROJECTIONS and _factor(node) not in pixels
        ):
            found[node.input[0]] = None
        else:
            waiting += above
    return list(found)


def _factor(node: onnx.NodeProto) -> str:
    """The second factor of a product."""
    return str(node.input[3] if node.op_type.startswith("QLinear") else node.input[1])


def _is_norm(graph: Graph, name: str, pixels: set[str]) -> bool:
    """Whether a LayerNorm, fused or in its parts, makes a value."""
    waiting, seen = [name], 0
    while waiting and seen < 16:
        number = graph.maker.get(waiting.pop(0))
        if number is None:
            continue
        node, seen = graph.nodes[number], seen + 1
        if node.op_type in _NORMS:
            return True
        above = [each for each in taken(node) if each in pixels]
        residual = node.op_type == "Add" and len(above) > 1
        if not residual and node.op_type not in _PROJECTIONS:
            waiting += above
    return False


def has_head(graph: Graph, logits: str, pixels: set[str]) -> bool:
    """Whether a projection stands between the last LayerNorm and the logits."""
    waiting, seen = [logits], set()
    while waiting:
        number = graph.maker.get(waiting.pop())
        if number is None or number in seen:
            continue
        seen.add(number)
        node = graph.nodes[number]
        if node.op_type in _PROJECTIONS:
            return True
        if node.op_type not in _NORMS:
            waiting += [name for name in taken(node) if name in pixels]
    return False
