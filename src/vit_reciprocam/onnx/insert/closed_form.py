"""Append nodes that give the logits under all masks at once: the closed form as one more attention.

This attention has one row per mask, and the readout token's query in every row. The level of a
token is the number that a mask multiplies it with. M (T, T) holds all levels: rows of ones for the
prefix tokens, then one row per patch, its mask. A token at level l has the score s_l and the value
v_l. If keys and values are projected affinely, these are s_0 + l (s_1 - s_0) and
v_0 + l (v_1 - v_0), with the same v_0 for all tokens. So the output is

    o = v_0 + (A * M) (v_1 - v_0),    A = softmax(s_0 + M * (s_1 - s_0)),

where * multiplies element by element, and one row s holds for all rows of M. If keys are not
affine, because they are normalised after the projection, each level of the masks has scores of its
own: the argument of the softmax is s_0 + Σ over the levels l of [M = l] * (s_l - s_0).

The T rows stand in the places of T tokens: a copy of the block's remaining nodes takes them as the
block takes the attention's output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

import onnx
from onnx import helper
from vit_reciprocam.core.masks import Masking, mask_matrix
from vit_reciprocam.errors import ModelError
from vit_reciprocam.onnx.insert.attention import AttentionTensor, SelfAttention
from vit_reciprocam.onnx.insert.branch import Branch
from vit_reciprocam.onnx.insert.graph import Graph
from vit_reciprocam.onnx.insert.read import Reading

__all__ = ["append_closed_form"]


def append_closed_form(
    branch: Branch, graph: Graph, reading: Reading, masking: Masking, *, rounded: bool
) -> str:
    """Append the logits (B, N, C) under all masks and return their name.

    Args:
        branch: What takes the nodes.
        graph: The graph as it was read.
        reading: What was read.
        masking: The masks.
        rounded: Whether the file's graph rounds; its queries, keys and values are then computed
            anew, without rounding.

    Raises:
        ModelError: If the closed form does not hold; says why.
    """
    attention, head = reading.attention, reading.head
    assert attention is not None
    assert head is not None
    patches, prefix = reading.layout.grid[0] * reading.layout.grid[1], reading.layout.prefix
    rows = mask_matrix(reading.layout.grid, masking, prefix_tokens=prefix)
    masks = np.concatenate([np.ones((prefix, rows.shape[1])), rows]).astype(np.float32)
    operands = _append_operands(branch, graph, reading, attention, masks, rounded=rounded)
    values: dict[str, str] = {}
    for token in sorted({read.token for read in head.reads.values()}):
        slots = branch.ints(*[token] * (prefix + patches))
        output = _append_attention(branch, attention, operands, token, masking.class_token)
        given = {attention.output.name: _join_heads(branch, output, reading, attention.output)}
        # What enters beside the attention's output, as the skip path does, is not masked: the
        # readout token's own, once per mask.
        for name, axis in head.sides.items():
            given[name] = branch.op("Gather", name, slots, axis=axis)
        reads = {name: read for name, read in head.reads.items() if read.token == token}
        sources = {read.source for read in reads.values()}
        copied = branch.copy(graph, graph.nodes_between(given, sources), given)
        for name, read in reads.items():
            # Masks become images: (B, T, …) is cut to (B, N, …) and then to (B N, …).
            chosen = branch.ints(*range(prefix, prefix + patches))
            masked = branch.op("Gather", copied[read.source], chosen, axis=read.axis)
            if read.axis == 0:  # tokens before images
                perm = [1, 0, *range(2, len(read.shape) + 1)]
                masked = branch.op("Transpose", masked, perm=perm)
            values[name] = branch.op("Reshape", masked, branch.ints(-1, *read.shape[1:]))
    rest = graph.nodes_between(values, [reading.logits])
    logits = branch.copy(graph, rest, values)[reading.logits]
    logits = branch.op("Cast", logits, to=onnx.TensorProto.FLOAT)
    return branch.op("Reshape", logits, branch.ints(-1, patches, reading.classes))


@dataclass(frozen=True)
class _Level0:
    """What the last attention makes of a token at level 0, the same for every image.

    Attributes:
        query: Queries (1, h, T, d).
        key: Keys (1, h, T, d), or (1, h, 1, d) where they are alike for all tokens.
        value: Values (1, h, 1, d).
        affine: Whether keys at other levels lie on the line between level 0 and level 1.
    """

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    affine: bool


def _read_level_0(graph: Graph, reading: Reading, attention: SelfAttention) -> _Level0:
    """Run the projections at levels 0, 1/2 and 1."""
    query_0, key_0, value_0 = _project(graph, reading, attention, 0.0)
    _, key_half, value_half = _project(graph, reading, attention, 0.5)
    _, key_1, value_1 = _project(graph, reading, attention, 1.0)
    loose = reading.tolerance
    if not _close(value_half, (value_0 + value_1) / 2, loose) or np.ptp(value_0, axis=2).any():
        raise ModelError("values are not projected affinely from the LayerNorm's output")
    if not np.ptp(key_0, axis=2).any():  # else turned by the token's position, as rotary keys are
        key_0 = key_0[:, :, :1]
    affine = _close(key_half, (key_0 + key_1) / 2, loose)
    return _Level0(query_0, key_0, value_0[:, :, :1], affine)


def _close(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    return bool(np.abs(a - b).max() <= tolerance * np.abs(b).max())


def _project(
    graph: Graph, reading: Reading, attention: SelfAttention, level: float
) -> list[np.ndarray]:
    """Return queries, keys and values (1, h, T, d) of one image's tokens at a level."""
    names = [operand.name for operand in attention.operands]
    entering = graph.values_entering(graph.nodes_between([reading.normed], names))
    given = {name: reading.values[name] for name in entering}
    normed = reading.values[reading.normed]
    given[reading.normed] = (normed * normed.dtype.type(level)).astype(normed.dtype)
    found = graph.run(given, names)
    arrays = []
    for operand in attention.operands:
        array = found[operand.name].astype(np.float32)
        if operand.weight is not None:
            array = array @ operand.weight.astype(np.float32)
        if operand.bias is not None:
            array = array + operand.bias.astype(np.float32)
        shape, axes = _open_heads(operand.axes, array.shape, attention.heads)
        arrays.append(array.reshape(shape).transpose([axes.index(a) for a in "bhtd"])[:1])
    return arrays


def _open_heads(
    axes: tuple[str, ...], shape: tuple[int, ...], heads: int
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return a shape, and its axes, with the heads as an axis of their own and the batch open."""
    if axes[0] == "bh":
        return (-1, heads, *shape[1:]), ("b", "h", *axes[1:])
    if axes[-1] == "hd":
        return (-1, shape[1], heads, shape[2] // heads), ("b", "t", "h", "d")
    return (-1, *shape[1:]), axes


@dataclass(frozen=True)
class _Operands:
    """What the attentions of all readout tokens share: float32 values of the branch, by name.

    Attributes:
        query: Queries (B, h, T, d).
        keys: Level of the masks -> keys at it less keys at level 0, (B, h, d, T); level 1 alone
            where keys are affine.
        key_0: Keys at level 0, (1, h, d, T or 1).
        value: Values less those at level 0, (B, h, T, d).
        mask: M (T, T).
        masks: M as an array.
        zero: What a token at level 0 gives, as arrays.
    """

    query: str
    keys: Mapping[float, str]
    key_0: str
    value: str
    mask: str
    masks: np.ndarray
    zero: _Level0


def _append_operands(
    branch: Branch,
    graph: Graph,
    reading: Reading,
    attention: SelfAttention,
    masks: np.ndarray,
    *,
    rounded: bool,
) -> _Operands:
    """Append the projections of F, less what level 0 gives."""
    heads, zero = attention.heads, _read_level_0(graph, reading, attention)
    mask = branch.floats(masks)
    names = {operand.name: operand.name for operand in attention.operands}
    if rounded:
        between = graph.nodes_between([reading.normed], names)
        names = branch.copy(graph, between, {reading.normed: reading.normed})
    query = _split_heads(branch, attention.query, reading, heads, names)
    key = _split_heads(branch, attention.key, reading, heads, names, transposed=True)
    value = _split_heads(branch, attention.value, reading, heads, names)
    if zero.value.any():
        value = branch.op("Sub", value, branch.floats(zero.value))
    keys = {1.0: key}
    if not zero.affine:
        for level in sorted({float(level) for level in np.unique(masks)} - {0.0, 1.0}):
            keys[level] = _append_keys(branch, graph, reading, attention, level)
    key_0 = branch.floats(np.swapaxes(zero.key, -1, -2))
    if zero.key.any():
        keys = {level: branch.op("Sub", key, key_0) for level, key in keys.items()}
    return _Operands(query, keys, key_0, value, mask, masks, zero)


def _append_attention(
    branch: Branch, attention: SelfAttention, operands: _Operands, token: int, class_token: bool
) -> str:
    """Append a readout token's attention under all masks, (B, h, T, d) with masks in T."""
    zero, scale = operands.zero, np.float32(attention.scale)
    if class_token:
        ends = (branch.ints(token), branch.ints(token + 1), branch.ints(2))
        query = branch.op("Slice", operands.query, *ends)
        query = branch.op("Mul", query, branch.floats(scale))
    else:  # the readout token is masked too, so it asks at level 0, whatever the image
        query = branch.floats(zero.query[:, :, token : token + 1] * scale)
    scores = ""
    for level, key in operands.keys.items():
        weight = operands.mask if zero.affine else branch.floats(operands.masks == level)
        s = branch.op("Mul", branch.op("MatMul", query, key), weight)
        scores = branch.op("Add", scores, s) if scores else s
    if zero.key.shape[2] > 1:  # else s_0 is alike for all tokens, which softmax does not see
        scores = branch.op("Add", scores, branch.op("MatMul", query, operands.key_0))
    if attention.bias is not None:
        scores = branch.op("Add", scores, branch.floats(attention.bias[:, token : token + 1]))
    weights = branch.op("Mul", branch.op("Softmax", scores, axis=-1), operands.mask)
    output = branch.op("MatMul", weights, operands.value)
    return branch.op("Add", output, branch.floats(zero.value)) if zero.value.any() else output


def _split_heads(
    branch: Branch,
    operand: AttentionTensor,
    reading: Reading,
    heads: int,
    names: Mapping[str, str],
    *,
    transposed: bool = False,
) -> str:
    """Append an operand as (B, h, T, d) float32, or (B, h, d, T)."""
    shape = reading.values[operand.name].shape
    name = names[operand.name]
    if operand.weight is not None:
        name = branch.op("MatMul", name, branch.const(operand.weight))
        shape = (*shape[:-1], operand.weight.shape[1])
    if operand.bias is not None:
        name = branch.op("Add", name, branch.const(operand.bias))
    if reading.values[operand.name].dtype != np.float32:
        name = branch.op("Cast", name, to=onnx.TensorProto.FLOAT)
    opened, axes = _open_heads(operand.axes, shape, heads)
    if len(opened) != len(shape):
        name = branch.op("Reshape", name, branch.ints(*opened))
    perm = [axes.index(axis) for axis in ("bhdt" if transposed else "bhtd")]
    return name if perm == [0, 1, 2, 3] else branch.op("Transpose", name, perm=perm)


def _append_keys(
    branch: Branch, graph: Graph, reading: Reading, attention: SelfAttention, level: float
) -> str:
    """Append the keys of all tokens at a level, by the graph's own nodes."""
    normed = reading.normed
    kind = reading.values[normed].dtype
    given = {normed: branch.op("Mul", normed, branch.const(level, kind.type))}
    numbers = graph.nodes_between([normed], [attention.key.name])
    names = branch.copy(graph, numbers, given)
    return _split_heads(branch, attention.key, reading, attention.heads, names, transposed=True)


def _join_heads(branch: Branch, joined: str, reading: Reading, output: AttentionTensor) -> str:
    """Append (B, h, T, d) float32 in the layout and type of the attention's output."""
    axes, value = output.axes, reading.values[output.name]
    if axes[0] == "bh":
        joined = branch.op("Reshape", joined, branch.ints(-1, *value.shape[1:]))
    elif axes[-1] == "hd":
        joined = branch.op("Transpose", joined, perm=[0, 2, 1, 3])
        joined = branch.op("Reshape", joined, branch.ints(-1, *value.shape[1:]))
    if value.dtype != np.float32:
        joined = branch.op("Cast", joined, to=helper.np_dtype_to_tensor_dtype(value.dtype))
    return joined
