"""The last self-attention of an ONNX graph, in whichever form an exporter or optimizer left it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import onnx
from onnx import helper
from vit_reciprocam.errors import ModelError
from vit_reciprocam.onnx.insert.find import FUSED, PRODUCTS, Found
from vit_reciprocam.onnx.insert.graph import Graph

__all__ = ["Part", "SelfAttention", "read_attention"]


_HARMLESS = frozenset(
    {
        "kv_num_heads",
        "mask_filter_value",
        "num_heads",
        "q_num_heads",
        "qk_matmul_output_mode",
        "qkv_hidden_sizes",
        "scale",
        "softmax_precision",
    }
)  # of fused attention


@dataclass(frozen=True)
class Part:
    """Queries, keys or values of all heads, as a value of the graph.

    Attributes:
        name: The value.
        axes: What its axes are: of b images, h heads, t tokens, d their width; "bh" and "hd" are
            two in one, the first outside.
        bias: Added to it first; (h·d,).
        weight: (D, h·d), applied first; None where the value is projected already.
    """

    name: str
    axes: tuple[str, ...]
    bias: np.ndarray | None = None
    weight: np.ndarray | None = None


@dataclass(frozen=True)
class SelfAttention:
    """softmax(scale · q kᵀ + bias) v.

    Attributes:
        query, key, value: Its parts.
        output: The joined result, a value of the graph, and its `axes`.
        heads: How many.
        scale: Of the scores.
        bias: (h or 1, t, t) or None.
        inputs: The values that it is computed from.
    """

    query: Part
    key: Part
    value: Part
    output: Part
    heads: int
    scale: float
    bias: np.ndarray | None
    inputs: tuple[str, ...]


def read_attention(
    graph: Graph,
    found: Found,
    values: Mapping[str, np.ndarray],
    batch: int,
    pixels: set[str],
) -> SelfAttention:
    """An attention by its parts.

    Args:
        graph: The graph.
        found: Where it is.
        values: All from its queries, keys and values to its output, from one run.
        batch: How many images the run had.
        pixels: The values that depend on the images.

    Raises:
        ModelError: If its scores are not scale · q kᵀ + bias.
    """
    node = graph.nodes[found.number]
    if node.op_type in FUSED:
        return _fused(graph, node, values, pixels)
    _, query, key, value, output = found
    if node.op_type == "QLinearSoftmax":
        raise ModelError("the last attention is computed in integers")
    shapes = [values[name].shape for name in found[1:]]
    leading = shapes[0][:-2]
    joined: tuple[str, ...]
    if len(leading) == 2 and leading[0] == batch:
        joined, heads = ("b", "h"), leading[1]
    elif len(leading) == 1 and leading[0] % batch == 0:
        joined, heads = ("bh",), leading[0] // batch
    else:
        raise ModelError(f"attention's heads have the unknown layout {shapes[0]}")
    product = graph.nodes[graph.maker[_scores(graph, node, query, key)]]
    flags = {each.name: helper.get_attribute_value(each) for each in product.attribute}
    if any(flags.get(flag) for flag in ("transA", "transBatchA", "transBatchB")):
        raise ModelError(f"stopped at {graph.describe(product.output[0])}: transposed queries")
    across = flags.get("transB", 0)
    scale, bias = _scale_and_bias(graph, node.input[0], query, key, values, bool(across), batch)
    return SelfAttention(
        query=Part(query, (*joined, "t", "d")),
        key=Part(key, (*joined, "t", "d") if across else (*joined, "d", "t")),
        value=Part(value, (*joined, "t", "d")),
        output=Part(output, (*joined, "t", "d")),
        heads=heads,
        scale=scale,
        bias=bias,
        inputs=(query, key, value),
    )


def _scores(graph: Graph, softmax: onnx.NodeProto, query: str, key: str) -> str:
    for number in graph.above([softmax.input[0]], until=[query, key]):
        node = graph.nodes[number]
        if node.op_type in PRODUCTS and list(node.input[:2]) == [query, key]:
            return str(node.output[0])
    raise ModelError(f"stopped at {graph.describe(softmax.input[0])}")


def _scale_and_bias(
    graph: Graph,
    scores: str,
    query: str,
    key: str,
    values: Mapping[str, np.ndarray],
    across: bool,
    batch: int,
) -> tuple[float, np.ndarray | None]:
    """What stands between q kᵀ and the softmax, found by asking the graph."""
    entering = graph.entering(graph.between([query, key], [scores]))
    given = {name: values[name] for name in entering}

    def ask(q: np.ndarray, k: np.ndarray) -> np.ndarray:
        return graph.run({**given, query: q, key: k}, [scores])[scores].astype(np.float64)

    q, k = values[query], values[key]
    added = ask(np.zeros_like(q), np.zeros_like(k))
    product = q.astype(np.float64) @ (np.swapaxes(k, -1, -2) if across else k).astype(np.float64)
    multiplied = ask(q, k) - added
    finite = np.isfinite(added) & np.isfinite(multiplied)
    scale = float((multiplied * product)[finite].sum() / (product[finite] ** 2).sum())
    off = np.abs(multiplied - scale * product)[finite].max()
    loose = 2e-2 if q.dtype == np.float16 else 1e-4
    if not off <= loose * np.abs(multiplied[finite]).max():
        raise ModelError(
            f"between {graph.describe(query)} and {graph.describe(scores)} stands more than a "
            "scale and a bias"
        )
    heads = added.reshape(batch, -1, *added.shape[-2:])
    return scale, _as_bias(heads)


def _fused(
    graph: Graph, node: onnx.NodeProto, values: Mapping[str, np.ndarray], pixels: set[str]
) -> SelfAttention:
    """The parts of a fused attention node: ONNX's own, or of ONNX Runtime's optimizer."""
    flags = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    given = [*node.input, *[""] * 8]
    output_axes: tuple[str, ...] = ("b", "t", "hd")
    mask = ""
    if node.domain in ("", "ai.onnx"):
        _refuse_extras(graph, node, flags, given[4:])
        parts, mask = _standard(graph, node, values), given[3]
        output_axes = parts[0].axes
        shape = values[given[0]].shape
        heads = shape[1] if len(shape) == 4 else flags["q_num_heads"]
    elif node.domain == "com.microsoft" and node.op_type == "MultiHeadAttention":
        _refuse_extras(graph, node, flags, [given[4], *given[6:]])
        parts, heads, mask = _multi_head(graph, node, values), flags["num_heads"], given[5]
    elif node.domain == "com.microsoft" and node.op_type == "Attention":
        _refuse_extras(graph, node, flags, given[3:])
        parts, heads = _projecting(graph, node, flags), flags["num_heads"]
    else:
        raise ModelError(f"stopped at {graph.describe(node.output[0])}: its kind is not known")
    query, key, value = parts
    if mask in pixels:
        raise ModelError(f"stopped at {graph.describe(node.output[0])}: a mask that varies")
    bias = _fixed(graph, mask, values)
    inner = values[query.name].shape[-1] if query.weight is None else query.weight.shape[1]
    width = inner if query.axes[-1] == "d" else inner // heads
    return SelfAttention(
        query=query,
        key=key,
        value=value,
        output=Part(node.output[0], output_axes),
        heads=heads,
        scale=float(flags.get("scale") or 1 / math.sqrt(width)),
        bias=None if bias is None else _as_bias(bias),
        inputs=tuple(dict.fromkeys(part.name for part in parts)),
    )


def _standard(graph: Graph, node: onnx.NodeProto, values: Mapping[str, np.ndarray]) -> list[Part]:
    """Of ONNX's Attention (opset 23): queries, keys and values by heads, or joined."""
    shape = values[node.input[0]].shape
    if values[node.input[1]].shape != shape:
        raise ModelError(f"stopped at {graph.describe(node.output[0])}: shared keys")
    axes = ("b", "h", "t", "d") if len(shape) == 4 else ("b", "t", "hd")
    return [Part(name, axes) for name in node.input[:3]]


def _multi_head(graph: Graph, node: onnx.NodeProto, values: Mapping[str, np.ndarray]) -> list[Part]:
    """Of ONNX Runtime's MultiHeadAttention: joined heads, and their biases in one."""
    names = list(node.input[:3])
    if any(values[name].ndim != 3 for name in names):
        raise ModelError(f"stopped at {graph.describe(node.output[0])}: packed inputs")
    bias = graph.constant(node.input[3]) if node.input[3:] and node.input[3] else None
    biases = [None] * 3 if bias is None else np.split(bias, 3)
    return [Part(name, ("b", "t", "hd"), b) for name, b in zip(names, biases, strict=True)]


def _projecting(graph: Graph, node: onnx.NodeProto, flags: Mapping[str, Any]) -> list[Part]:
    """Of ONNX Runtime's Attention, which projects its input itself."""
    weight = graph.constant(node.input[1])
    if weight is None:
        raise ModelError(f"stopped at {graph.describe(node.output[0])}: its weights vary")
    ends = np.cumsum(flags.get("qkv_hidden_sizes") or [weight.shape[1] // 3] * 3)[:2]
    bias = graph.constant(node.input[2]) if node.input[2:] and node.input[2] else None
    biases = [None] * 3 if bias is None else np.split(bias, ends)
    weights = np.split(weight, ends, axis=1)
    pairs = zip(biases, weights, strict=True)
    return [Part(node.input[0], ("b", "t", "hd"), b, w) for b, w in pairs]


def _fixed(graph: Graph, name: str, values: Mapping[str, np.ndarray]) -> np.ndarray | None:
    if not name:
        return None
    return values[name] if name in values else graph.constant(name)


def _as_bias(mask: np.ndarray) -> np.ndarray | None:
    """A mask or bias, the same for every image, as (h or 1, t, t) to add; None where it adds 0."""
    if mask.dtype == bool:
        mask = np.where(mask, 0.0, -np.inf)
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape).astype(np.float32)
    if not (mask == mask[:1]).all():
        raise ModelError("the last attention's mask differs between images")
    return mask[0] if mask.any() else None


def _refuse_extras(
    graph: Graph, node: onnx.NodeProto, flags: Mapping[str, object], inputs: Sequence[str]
) -> None:
    """Refuse options of a fused attention that change what it computes."""
    extra = [name for name, value in flags.items() if name not in _HARMLESS and value]
    if extra or any(inputs):
        raise ModelError(
            f"stopped at {graph.describe(node.output[0])}, which has options that are not known "
            f"here: {', '.join(extra) or 'further inputs'}"
        )
