"""Append the closed form: one more attention, which gives the logits under all masks at once.

This attention has one row per mask, and the readout token's query in every row. The level of a
token is the number that a mask multiplies it with. M (T, T) holds all levels: rows of ones for the
prefix tokens, then the mask of each patch as one row. For evidence, the all-null mask takes the
place of the last row of ones. A token at level l has the score s_l and the
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

from collections.abc import Callable, Mapping

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
    branch: Branch, graph: Graph, reading: Reading, masking: Masking, *, null: bool, rounded: bool
) -> str:
    """Append the logits (B, N, C) under all masks and return their name.

    If `null`, those under the all-null mask come first, (B, 1 + N, C).
    If the file rounds its values (`rounded`), its queries, keys and values are computed anew by the
    nodes of `graph`, which does not round.
    """
    attention, head = reading.attention, reading.head
    assert attention is not None
    assert head is not None
    patches, prefix = reading.layout.grid[0] * reading.layout.grid[1], reading.layout.prefix
    attend = _prepare_attention(branch, graph, reading, attention, masking, null, rounded)
    values: dict[str, str] = {}
    for token in sorted({read.token for read in head.reads.values()}):
        slots = branch.ints(*[token] * (prefix + patches))
        given = {
            attention.output.name: _join_heads(branch, attend(token), reading, attention.output)
        }
        # What the nodes use beside the attention's output, such as the skip path, is not masked:
        # every row is that of the readout token.
        for name, axis in head.sides.items():
            given[name] = branch.op("Gather", name, slots, axis=axis)
        reads = {name: read for name, read in head.reads.items() if read.token == token}
        sources = {read.source for read in reads.values()}
        copied = branch.copy(graph, graph.nodes_between(given, sources), given)
        for name, read in reads.items():
            # From here on each mask is an image of its own: (B, T, …) -> (B, N, …) -> (B N, …).
            chosen = branch.ints(*range(prefix - null, prefix + patches))
            masked = branch.op("Gather", copied[read.source], chosen, axis=read.axis)
            if read.axis == 0:  # tokens before images
                perm = [1, 0, *range(2, len(read.shape) + 1)]
                masked = branch.op("Transpose", masked, perm=perm)
            values[name] = branch.op("Reshape", masked, branch.ints(-1, *read.shape[1:]))
    rest = graph.nodes_between(values, [reading.logits])
    logits = branch.copy(graph, rest, values)[reading.logits]
    logits = branch.op("Cast", logits, to=onnx.TensorProto.FLOAT)
    return branch.op("Reshape", logits, branch.ints(-1, null + patches, reading.classes))


def _prepare_attention(
    branch: Branch,
    graph: Graph,
    reading: Reading,
    attention: SelfAttention,
    masking: Masking,
    null: bool,
    rounded: bool,
) -> Callable[[int], str]:
    """Append what the attentions of all readout tokens share, in float32: operands and masks M.

    The function that is returned appends the attention of one readout token, (B, h, T, d) with
    masks in T. The keys and values are those at level 1 minus those at level 0.
    """
    normed, heads, scale = reading.normed, attention.heads, np.float32(attention.scale)
    query_0, key_0, value_0, affine = _read_level_0(graph, reading, attention)
    prefix = reading.layout.prefix
    rows = mask_matrix(reading.layout.grid, masking, prefix_tokens=prefix, null=null)
    masks = np.concatenate([np.ones((prefix - null, rows.shape[1])), rows]).astype(np.float32)
    mask = branch.floats(masks)
    names = {operand.name: operand.name for operand in attention.operands}
    if rounded:
        names = branch.copy(graph, graph.nodes_between([normed], names), {normed: normed})

    def split_heads(operand: AttentionTensor, names: Mapping[str, str], axes: str) -> str:
        return _split_heads(branch, operand, names[operand.name], reading, heads, axes)

    query = split_heads(attention.query, names, "bhtd")
    keys = {1.0: split_heads(attention.key, names, "bhdt")}
    value = split_heads(attention.value, names, "bhtd")
    if value_0.any():
        value = branch.op("Sub", value, branch.floats(value_0))
    if not affine:  # the keys of each level, by the graph's own nodes
        for level in sorted({float(level) for level in np.unique(masks)} - {0.0, 1.0}):
            factor = branch.const(level, reading.values[normed].dtype.type)
            given = {normed: branch.op("Mul", normed, factor)}
            copied = branch.copy(graph, graph.nodes_between(given, [attention.key.name]), given)
            keys[level] = split_heads(attention.key, copied, "bhdt")
    columns_0 = branch.floats(np.swapaxes(key_0, -1, -2))
    if key_0.any():
        keys = {level: branch.op("Sub", key, columns_0) for level, key in keys.items()}

    def attend(token: int) -> str:
        if masking.class_token:
            ends = (branch.ints(token), branch.ints(token + 1), branch.ints(2))
            row = branch.op("Mul", branch.op("Slice", query, *ends), branch.floats(scale))
        else:  # the readout token is masked too: its query is that at level 0 for every image
            row = branch.floats(query_0[:, :, token : token + 1] * scale)
        scores = ""
        for level, key in keys.items():
            weight = mask if affine else branch.floats(masks == level)
            s = branch.op("Mul", branch.op("MatMul", row, key), weight)
            scores = branch.op("Add", scores, s) if scores else s
        if key_0.shape[2] > 1:  # else s_0 is the same for all tokens, and softmax ignores it
            scores = branch.op("Add", scores, branch.op("MatMul", row, columns_0))
        if attention.bias is not None:
            scores = branch.op("Add", scores, branch.floats(attention.bias[:, token : token + 1]))
        weights = branch.op("Mul", branch.op("Softmax", scores, axis=-1), mask)
        output = branch.op("MatMul", weights, value)
        return branch.op("Add", output, branch.floats(value_0)) if value_0.any() else output

    return attend


def _read_level_0(
    graph: Graph, reading: Reading, attention: SelfAttention
) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """Return queries, keys and values of all images' tokens at level 0, and if keys are affine.

    They are (1, h, T, d), with T = 1 for values, and for keys if all tokens have the same. Keys are
    affine if those at other levels lie on the line between those at levels 0 and 1; values that
    are not are refused.
    """
    names = [operand.name for operand in attention.operands]
    entering = graph.values_entering(graph.nodes_between([reading.normed], names))
    given = {name: reading.values[name] for name in entering}
    normed = reading.values[reading.normed]

    def project(level: float) -> list[np.ndarray]:
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

    def is_middle(half: np.ndarray, zero: np.ndarray, one: np.ndarray) -> bool:
        off = np.abs(half - (zero + one) / 2).max()
        return bool(off <= reading.tolerance * np.abs((zero + one) / 2).max())

    query_0, key_0, value_0 = project(0.0)
    _, key_half, value_half = project(0.5)
    _, key_1, value_1 = project(1.0)
    if not is_middle(value_half, value_0, value_1) or np.ptp(value_0, axis=2).any():
        raise ModelError("values are not projected affinely from the LayerNorm's output")
    affine = is_middle(key_half, key_0, key_1)
    if not np.ptp(key_0, axis=2).any():  # rotary keys do differ, by the token's position
        key_0 = key_0[:, :, :1]
    return query_0, key_0, value_0[:, :, :1], affine


def _give_heads_an_axis(
    axes: tuple[str, ...], shape: tuple[int, ...], heads: int
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return a shape, and its axes, with an axis for the heads alone; -1 stands for the batch."""
    if axes[0] == "bh":
        return (-1, heads, *shape[1:]), ("b", "h", *axes[1:])
    if axes[-1] == "hd":
        return (-1, shape[1], heads, shape[2] // heads), ("b", "t", "h", "d")
    return (-1, *shape[1:]), axes


def _split_heads(
    branch: Branch, operand: AttentionTensor, name: str, reading: Reading, heads: int, axes: str
) -> str:
    """Append an operand, of which `name` is the value, as float32 with `axes` "bhtd" or "bhdt"."""
    shape = reading.values[operand.name].shape
    if operand.weight is not None:
        name = branch.op("MatMul", name, branch.const(operand.weight))
        shape = (*shape[:-1], operand.weight.shape[1])
    if operand.bias is not None:
        name = branch.op("Add", name, branch.const(operand.bias))
    if reading.values[operand.name].dtype != np.float32:
        name = branch.op("Cast", name, to=onnx.TensorProto.FLOAT)
    opened, given = _give_heads_an_axis(operand.axes, shape, heads)
    if len(opened) != len(shape):
        name = branch.op("Reshape", name, branch.ints(*opened))
    perm = [given.index(axis) for axis in axes]
    return name if perm == [0, 1, 2, 3] else branch.op("Transpose", name, perm=perm)


def _join_heads(branch: Branch, value: str, reading: Reading, output: AttentionTensor) -> str:
    """Append a value (B, h, T, d) float32 in the layout and type of the attention's output."""
    axes, original = output.axes, reading.values[output.name]
    if axes[-1] == "hd":
        value = branch.op("Transpose", value, perm=[0, 2, 1, 3])
    if len(axes) == 3:
        value = branch.op("Reshape", value, branch.ints(-1, *original.shape[1:]))
    if original.dtype != np.float32:
        value = branch.op("Cast", value, to=helper.np_dtype_to_tensor_dtype(original.dtype))
    return value
