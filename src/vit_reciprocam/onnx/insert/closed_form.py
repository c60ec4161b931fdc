"""Append the closed form: one more attention, which gives the logits under all masks at once.

This attention has one row per mask, and the readout token's query in every row. The level of a
token is the number that a mask multiplies it with. M (T, T) holds all levels: rows of ones for the
prefix tokens, then the mask of each patch as one row. A token at level l has the score s_l and the
value v_l. If keys and values are projected affinely, these are s_0 + l (s_1 - s_0) and
v_0 + l (v_1 - v_0), with the same v_0 for all tokens. So the output is

    o = v_0 + (A * M) (v_1 - v_0),    A = softmax(s_0 + M * (s_1 - s_0)),

where * multiplies element by element, and the row s is the same for all rows of M. If keys are not
affine, because they are normalised after the projection, each level of the masks has scores of its
own: the argument of the softmax is s_0 + Σ over the levels l of [M = l] * (s_l - s_0).

The T rows stand in the places of T tokens, so that a copy of the block's remaining nodes can use
them like the attention's output.
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

    If the file rounds its values (`rounded`), its queries, keys and values are computed anew by the
    nodes of `graph`, which does not round.
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
        # What the nodes use beside the attention's output, such as the skip path, is not masked:
        # every row is that of the readout token.
        for name, axis in head.sides.items():
            given[name] = branch.op("Gather", name, slots, axis=axis)
        reads = {name: read for name, read in head.reads.items() if read.token == token}
        sources = {read.source for read in reads.values()}
        copied = branch.copy(graph, graph.nodes_between(given, sources), given)
        for name, read in reads.items():
            # From here on each mask is an image of its own: (B, T, …) -> (B, N, …) -> (B N, …).
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
    """The projections of a token at level 0, the same for every image.

    Attributes:
        query: Queries (1, h, T, d).
        key: Keys (1, h, T, d), or (1, h, 1, d) if all tokens have the same.
        value: Values (1, h, 1, d).
        affine: Whether keys at other levels lie on the line between those at levels 0 and 1.
    """

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    affine: bool


def _read_level_0(graph: Graph, reading: Reading, attention: SelfAttention) -> _Level0:
    """Run the projections at levels 0, 1/2 and 1, and refuse values that are not affine."""
    query_0, key_0, value_0 = _project(graph, reading, attention, 0.0)
    _, key_half, value_half = _project(graph, reading, attention, 0.5)
    _, key_1, value_1 = _project(graph, reading, attention, 1.0)
    tolerance = reading.tolerance
    if not _close(value_half, (value_0 + value_1) / 2, tolerance) or np.ptp(value_0, axis=2).any():
        raise ModelError("values are not projected affinely from the LayerNorm's output")
    if not np.ptp(key_0, axis=2).any():  # rotary keys do differ, by the token's position
        key_0 = key_0[:, :, :1]
    affine = _close(key_half, (key_0 + key_1) / 2, tolerance)
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
        shape, axes = _give_heads_an_axis(operand.axes, array.shape, attention.heads)
        arrays.append(array.reshape(shape).transpose([axes.index(a) for a in "bhtd"])[:1])
    return arrays


def _give_heads_an_axis(
    axes: tuple[str, ...], shape: tuple[int, ...], heads: int
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return a shape, and its axes, with an axis for the heads alone; -1 stands for the batch."""
    if axes[0] == "bh":
        return (-1, heads, *shape[1:]), ("b", "h", *axes[1:])
    if axes[-1] == "hd":
        return (-1, shape[1], heads, shape[2] // heads), ("b", "t", "h", "d")
    return (-1, *shape[1:]), axes


@dataclass(frozen=True)
class _Operands:
    """What the attentions of all readout tokens share: names of float32 values in the branch.

    Attributes:
        query: Queries (B, h, T, d).
        keys: Level of the masks -> keys at that level minus keys at level 0, (B, h, d, T); only
            level 1 if keys are affine.
        key_0: Keys at level 0, (1, h, d, T or 1).
        value: Values minus those at level 0, (B, h, T, d).
        mask: M (T, T).
        masks: M as an array.
        level_0: The projections at level 0 as arrays.
    """

    query: str
    keys: Mapping[float, str]
    key_0: str
    value: str
    mask: str
    masks: np.ndarray
    level_0: _Level0


def _append_operands(
    branch: Branch,
    graph: Graph,
    reading: Reading,
    attention: SelfAttention,
    masks: np.ndarray,
    *,
    rounded: bool,
) -> _Operands:
    """Append queries, keys and values, the last two minus those at level 0, and the masks."""
    heads, level_0 = attention.heads, _read_level_0(graph, reading, attention)
    mask = branch.floats(masks)
    names = {operand.name: operand.name for operand in attention.operands}
    if rounded:
        between = graph.nodes_between([reading.normed], names)
        names = branch.copy(graph, between, {reading.normed: reading.normed})
    query = _split_heads(branch, attention.query, reading, heads, names)
    key = _split_heads(branch, attention.key, reading, heads, names, transposed=True)
    value = _split_heads(branch, attention.value, reading, heads, names)
    if level_0.value.any():
        value = branch.op("Sub", value, branch.floats(level_0.value))
    keys = {1.0: key}
    if not level_0.affine:
        for level in sorted({float(level) for level in np.unique(masks)} - {0.0, 1.0}):
            keys[level] = _append_keys(branch, graph, reading, attention, level)
    key_0 = branch.floats(np.swapaxes(level_0.key, -1, -2))
    if level_0.key.any():
        keys = {level: branch.op("Sub", key, key_0) for level, key in keys.items()}
    return _Operands(query, keys, key_0, value, mask, masks, level_0)


def _append_attention(
    branch: Branch, attention: SelfAttention, operands: _Operands, token: int, class_token: bool
) -> str:
    """Append a readout token's attention under all masks, (B, h, T, d) with masks in T."""
    level_0, scale = operands.level_0, np.float32(attention.scale)
    if class_token:
        ends = (branch.ints(token), branch.ints(token + 1), branch.ints(2))
        query = branch.op("Slice", operands.query, *ends)
        query = branch.op("Mul", query, branch.floats(scale))
    else:  # the readout token is masked too: its query is that at level 0 for every image
        query = branch.floats(level_0.query[:, :, token : token + 1] * scale)
    scores = ""
    for level, key in operands.keys.items():
        weight = operands.mask if level_0.affine else branch.floats(operands.masks == level)
        s = branch.op("Mul", branch.op("MatMul", query, key), weight)
        scores = branch.op("Add", scores, s) if scores else s
    if level_0.key.shape[2] > 1:  # else s_0 is the same for all tokens, and softmax ignores it
        scores = branch.op("Add", scores, branch.op("MatMul", query, operands.key_0))
    if attention.bias is not None:
        scores = branch.op("Add", scores, branch.floats(attention.bias[:, token : token + 1]))
    weights = branch.op("Mul", branch.op("Softmax", scores, axis=-1), operands.mask)
    output = branch.op("MatMul", weights, operands.value)
    return branch.op("Add", output, branch.floats(level_0.value)) if level_0.value.any() else output


def _split_heads(
    branch: Branch,
    operand: AttentionTensor,
    reading: Reading,
    heads: int,
    names: Mapping[str, str],
    *,
    transposed: bool = False,
) -> str:
    """Append an operand as (B, h, T, d) float32, or as (B, h, d, T) if transposed."""
    shape = reading.values[operand.name].shape
    name = names[operand.name]
    if operand.weight is not None:
        name = branch.op("MatMul", name, branch.const(operand.weight))
        shape = (*shape[:-1], operand.weight.shape[1])
    if operand.bias is not None:
        name = branch.op("Add", name, branch.const(operand.bias))
    if reading.values[operand.name].dtype != np.float32:
        name = branch.op("Cast", name, to=onnx.TensorProto.FLOAT)
    opened, axes = _give_heads_an_axis(operand.axes, shape, heads)
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


def _join_heads(branch: Branch, value: str, reading: Reading, output: AttentionTensor) -> str:
    """Append a value (B, h, T, d) float32 in the layout and type of the attention's output."""
    axes, original = output.axes, reading.values[output.name]
    if axes[0] == "bh":
        value = branch.op("Reshape", value, branch.ints(-1, *original.shape[1:]))
    elif axes[-1] == "hd":
        value = branch.op("Transpose", value, perm=[0, 2, 1, 3])
        value = branch.op("Reshape", value, branch.ints(-1, *original.shape[1:]))
    if original.dtype != np.float32:
        value = branch.op("Cast", value, to=helper.np_dtype_to_tensor_dtype(original.dtype))
    return value
