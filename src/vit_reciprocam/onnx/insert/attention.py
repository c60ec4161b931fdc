"""Read the last self-attention of an ONNX graph, in any form that exporters and optimizers give it.

It is either a softmax between two products, whose scale and bias are found by running the nodes in
between, or one fused node, whose inputs and attributes mean what the operator's specification says:
ONNX's Operators.md for Attention, ONNX Runtime's ContribOperators.md for the domain com.microsoft.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import onnx
from onnx import helper
from vit_reciprocam.errors import ModelError
from vit_reciprocam.onnx.insert.find import FUSED, FoundAttention
from vit_reciprocam.onnx.insert.graph import Graph

__all__ = ["AttentionTensor", "SelfAttention", "read_attention"]

# The attributes of fused attention that are read here, or that change nothing if there are as many
# keys as queries and no further inputs. All others have to be 0.
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
)
_STANDARD = ("", "Attention")
_MULTI_HEAD = ("com.microsoft", "MultiHeadAttention")
# The numbers of the inputs that are read here; no node may have others.
_READ_INPUTS = {
    # Q, K, V, attn_mask; not past_key, past_value, nonpad_kv_seqlen
    _STANDARD: (0, 1, 2, 3),
    # query, key, value, bias, attention_bias; not key_padding_mask, past_key, past_value, …
    _MULTI_HEAD: (0, 1, 2, 3, 5),
    # input, weights, bias; not mask_index, past, attention_bias, …
    ("com.microsoft", "Attention"): (0, 1, 2),
}


class AttentionTensor(NamedTuple):
    """Queries, keys, values or the output of all heads, as a value of the graph."""

    name: str
    # What each axis means: b images, h heads, t tokens, d width of a head; "bh" and "hd" stand for
    # two axes joined into one, of which the first varies slower.
    axes: tuple[str, ...]
    bias: np.ndarray | None = None  # (h·d,), added after the weight
    weight: np.ndarray | None = None  # (D, h·d), if the value is still to be projected


class SelfAttention(NamedTuple):
    """softmax(scale · q kᵀ + bias) v."""

    query: AttentionTensor
    key: AttentionTensor
    value: AttentionTensor
    output: AttentionTensor
    heads: int
    scale: float
    bias: np.ndarray | None  # (h or 1, t, t)

    @property
    def operands(self) -> tuple[AttentionTensor, AttentionTensor, AttentionTensor]:
        """Queries, keys and values."""
        return self.query, self.key, self.value


def read_attention(
    graph: Graph, found: FoundAttention, values: Mapping[str, np.ndarray], batch: int
) -> SelfAttention:
    """Return an attention as the `values` of a run with `batch` images show it, or refuse it."""
    node = graph.nodes[found.number]
    if node.op_type in FUSED:
        return _read_fused(graph, node, values)
    if node.op_type == "QLinearSoftmax":
        raise ModelError("the last attention is computed in integers")
    _, query, key, value, output, product = found
    leading = values[query].shape[:-2]
    joined: tuple[str, ...]
    if len(leading) == 2 and leading[0] == batch:
        joined, heads = ("b", "h"), leading[1]
    elif len(leading) == 1 and leading[0] % batch == 0:
        joined, heads = ("bh",), leading[0] // batch
    else:
        raise ModelError(f"attention's heads have the unknown layout {values[query].shape}")
    if product is None or product.op_type.startswith("QLinear"):
        raise ModelError(f"stopped at {graph.describe(node.input[0])}")
    flags = _attributes(product)
    if any(flags.get(flag) for flag in ("transA", "transBatchA", "transBatchB")):
        raise ModelError(f"stopped at {graph.describe(product.output[0])}: transposed queries")
    # Keys come as (…, d, t) to be multiplied with; a FusedMatMul may transpose them itself.
    transposes = bool(flags.get("transB", 0))
    scale, bias = _measure_scale_and_bias(graph, found, values, transposes, batch)
    rows = (*joined, "t", "d")
    return SelfAttention(
        query=AttentionTensor(query, rows),
        key=AttentionTensor(key, rows if transposes else (*joined, "d", "t")),
        value=AttentionTensor(value, rows),
        output=AttentionTensor(output, rows),
        heads=heads,
        scale=scale,
        bias=bias,
    )


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def _measure_scale_and_bias(
    graph: Graph,
    found: FoundAttention,
    values: Mapping[str, np.ndarray],
    transposes: bool,
    batch: int,
) -> tuple[float, np.ndarray | None]:
    """Find the scale and bias between q kᵀ and the softmax by running the nodes there.

    If queries and keys are zeros, the scores are the bias. With the real ones, scores minus that
    bias must be a multiple of q kᵀ, and the factor is the scale.
    """
    scores, query, key = graph.nodes[found.number].input[0], found.query, found.key
    entering = graph.values_entering(graph.nodes_between([query, key], [scores]))
    given = {name: values[name] for name in entering}

    def scores_of(q: np.ndarray, k: np.ndarray) -> np.ndarray:
        return graph.run({**given, query: q, key: k}, [scores])[scores].astype(np.float64)

    q, k = values[query], values[key]
    added = scores_of(np.zeros_like(q), np.zeros_like(k))
    columns = (np.swapaxes(k, -1, -2) if transposes else k).astype(np.float64)
    product = q.astype(np.float64) @ columns
    multiplied = scores_of(q, k) - added
    finite = np.isfinite(added) & np.isfinite(multiplied)  # a mask adds -inf
    # the scale by least squares, and then how well it fits
    scale = float((multiplied * product)[finite].sum() / (product[finite] ** 2).sum())
    difference = np.abs(multiplied - scale * product)[finite].max()
    tolerance = 2e-2 if q.dtype == np.float16 else 1e-4
    if not difference <= tolerance * np.abs(multiplied[finite]).max():
        raise ModelError(
            f"between {graph.describe(query)} and {graph.describe(scores)} stands more than a "
            "scale and a bias"
        )
    return scale, _to_bias(added.reshape(batch, -1, *added.shape[-2:]))


def _read_fused(
    graph: Graph, node: onnx.NodeProto, values: Mapping[str, np.ndarray]
) -> SelfAttention:
    """Read a fused attention node: ONNX's own, or one that ONNX Runtime's optimizer wrote."""
    stopped = f"stopped at {graph.describe(node.output[0])}"
    kind = (node.domain.removeprefix("ai.onnx"), node.op_type)
    if kind not in _READ_INPUTS:
        raise ModelError(f"{stopped}: its kind is not known")
    flags = _attributes(node)
    extra = [name for name, value in flags.items() if name not in _HARMLESS and value]
    given = [*node.input, *[""] * 6]  # inputs left out at the end are empty names too
    if extra or any(name for n, name in enumerate(given) if n not in _READ_INPUTS[kind]):
        raise ModelError(
            f"{stopped}, which has options that are not known here: "
            f"{', '.join(extra) or 'further inputs'}"
        )
    axes: tuple[str, ...] = ("b", "t", "hd")
    mask = ""
    weights: Sequence[np.ndarray | None] = [None] * 3
    biases: Sequence[np.ndarray | None] = [None] * 3
    names, shape = given[:3], values[given[0]].shape
    if kind == _STANDARD:
        if values[given[1]].shape != shape:
            raise ModelError(f"{stopped}: shared keys")
        if len(shape) == 4:
            axes = ("b", "h", "t", "d")
        heads, mask = shape[1] if len(shape) == 4 else flags["q_num_heads"], given[3]
    elif kind == _MULTI_HEAD:
        # packed: queries, keys and values in one input (b, t, h, 3, d), or keys in (b, h, t, d)
        if any(values[name].ndim != 3 for name in names):
            raise ModelError(f"{stopped}: packed inputs")
        heads, mask, bias = flags["num_heads"], given[5], graph.constant(given[3])
        if bias is not None:
            biases = np.split(bias, 3)
    else:  # it projects its one input itself
        heads, weight, bias = flags["num_heads"], graph.constant(given[1]), graph.constant(given[2])
        if weight is None:
            raise ModelError(f"{stopped}: its weights vary")
        # those of queries, keys and values side by side, of the same width if no widths are given
        ends = np.cumsum(flags.get("qkv_hidden_sizes") or [weight.shape[1] // 3] * 3)[:2]
        names, weights = [given[0]] * 3, np.split(weight, ends, axis=1)
        if bias is not None:
            biases = np.split(bias, ends)
    if mask in graph.image_values:
        raise ModelError(f"{stopped}: a mask that varies")
    added = None if not mask else values[mask] if mask in values else graph.constant(mask)
    query, key, value = (
        AttentionTensor(name, axes, bias, weight)
        for name, bias, weight in zip(names, biases, weights, strict=True)
    )
    inner = shape[-1] if query.weight is None else query.weight.shape[1]
    width = inner if axes[-1] == "d" else inner // heads
    return SelfAttention(
        query=query,
        key=key,
        value=value,
        output=AttentionTensor(node.output[0], axes),
        heads=heads,
        scale=float(flags.get("scale") or 1 / math.sqrt(width)),  # 0 and absent mean the usual one
        bias=None if added is None else _to_bias(added),
    )


def _to_bias(mask: np.ndarray) -> np.ndarray | None:
    """Return a mask or bias as (h or 1, t, t) to add; None if it is 0 everywhere."""
    if mask.dtype == bool:  # true where a query may look
        mask = np.where(mask, 0.0, -np.inf)
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape).astype(np.float32)
    if not (mask == mask[:1]).all():
        raise ModelError("the last attention's mask differs between images")
    return mask[0] if mask.any() else None
