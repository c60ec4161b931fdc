"""Nodes that give the logits under all masks: the closed form, or a loop over the masks.

The closed form here is one more attention of as many queries as masks. With M (T, T), whose rows
are the prefix's, all ones, and then the masks', level 0 of a token gives the score s_0 and the
value v_0, alike for all tokens, and where keys and values are projected affinely a level l gives
s_0 + l (s_1 - s_0) and v_0 + l (v_1 - v_0). So

    A = softmax(s_0 + M (s_1 - s_0)),    o = v_0 + (A M) (v_1 - v_0),

with the readout token's query for every row. It stands in for the attention's output, one token a
mask in as many tokens as there were; so a copy of the block's remaining nodes takes it as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np

import onnx
from onnx import helper
from vit_reciprocam.core.masks import Masking, mask_matrix
from vit_reciprocam.errors import ModelError
from vit_reciprocam.onnx.insert.attention import Part, SelfAttention
from vit_reciprocam.onnx.insert.branch import PREFIX, Branch
from vit_reciprocam.onnx.insert.graph import Graph
from vit_reciprocam.onnx.insert.read import Reading

__all__ = ["append_closed_form", "append_direct"]


def append_closed_form(
    branch: Branch, graph: Graph, reading: Reading, masking: Masking, *, rounded: bool
) -> str:
    """Logits (B, N, C) under all masks.

    Args:
        branch: Takes the nodes.
        graph: As it was read.
        reading: What was read.
        masking: The masks.
        rounded: Whether they are for a graph that rounds, whose queries, keys and values are then
            computed anew.

    Raises:
        ModelError: With the reason why the closed form does not hold.
    """
    attention, tail = reading.attention, reading.tail
    assert attention is not None
    assert tail is not None
    patches, prefix = reading.layout.grid[0] * reading.layout.grid[1], reading.layout.prefix
    joined = _masked_attention(branch, graph, reading, masking, rounded)
    rows: dict[str, str] = {}
    for token in sorted({each.token for each in tail.readouts.values()}):
        slots = branch.ints(*[token] * (prefix + patches))
        given = {attention.output.name: joined(token)}
        for name, axis in tail.tokens.items():
            given[name] = branch.op("Gather", name, slots, axis=axis)
        mine = {name: each for name, each in tail.readouts.items() if each.token == token}
        whole = {each.whole for each in mine.values()}
        copied = branch.copy(graph, graph.between(given, whole), given)
        for name, each in mine.items():
            chosen = branch.ints(*range(prefix, prefix + patches))
            masked = branch.op("Gather", copied[each.whole], chosen, axis=each.axis)
            if each.axis == 0:  # tokens before images
                perm = [1, 0, *range(2, len(each.shape) + 1)]
                masked = branch.op("Transpose", masked, perm=perm)
            rows[name] = branch.op("Reshape", masked, branch.ints(-1, *each.shape[1:]))
    head = graph.between(rows, [reading.logits])
    logits = branch.copy(graph, head, rows)[reading.logits]
    logits = branch.op("Cast", logits, to=onnx.TensorProto.FLOAT)
    return branch.op("Reshape", logits, branch.ints(-1, patches, reading.classes))


def _masked_attention(
    branch: Branch, graph: Graph, reading: Reading, masking: Masking, rounded: bool
) -> Callable[[int], str]:
    """From a readout token to the attention's output with the masks in the tokens' places.

    Raises:
        ModelError: If values are not projected affinely.
    """
    attention, prefix = reading.attention, reading.layout.prefix
    assert attention is not None
    scale = np.float32(attention.scale)
    at = functools.partial(_projected, graph, reading)
    query_0, key_0, value_0 = at(0.0)
    _, key_h, value_h = at(0.5)
    _, key_1, value_1 = at(1.0)
    loose = reading.tolerance
    if not _close(value_h, (value_0 + value_1) / 2, loose) or np.ptp(value_0, axis=2).any():
        raise ModelError("values are not projected affinely from the LayerNorm's output")
    value_0 = value_0[:, :, :1]
    if not np.ptp(key_0, axis=2).any():
        key_0 = key_0[:, :, :1]
    affine = _close(key_h, (key_0 + key_1) / 2, loose)
    rows = mask_matrix(reading.layout.grid, masking, prefix_tokens=prefix)
    masks = np.concatenate([np.ones((prefix, rows.shape[1])), rows]).astype(np.float32)
    mask = branch.floats(masks)
    names = {part.name: part.name for part in _parts(attention)}
    if rounded:
        between = graph.between([reading.normed], names)
        names = branch.copy(graph, between, {reading.normed: reading.normed})
    query = _as_heads(branch, attention.query, reading, names)
    key = _as_heads(branch, attention.key, reading, names, transposed=True)
    value = _as_heads(branch, attention.value, reading, names)
    if value_0.any():
        value = branch.op("Sub", value, branch.floats(value_0))
    keys = {1.0: key}
    if not affine:
        for level in sorted({float(level) for level in np.unique(masks)} - {0.0, 1.0}):
            keys[level] = _key_at(branch, graph, reading, level)
    transposed = branch.floats(np.swapaxes(key_0, -1, -2))
    if key_0.any():
        keys = {level: branch.op("Sub", key, transposed) for level, key in keys.items()}

    def joined(token: int) -> str:
        if masking.class_token:
            ends = (branch.ints(token), branch.ints(token + 1), branch.ints(2))
            asking = branch.op("Mul", branch.op("Slice", query, *ends), branch.floats(scale))
        else:
            asking = branch.floats(query_0[:, :, token : token + 1] * scale)
        scores = ""
        for level, key in keys.items():
            weight = mask if affine else branch.floats(masks == level)
            s = branch.op("Mul", branch.op("MatMul", asking, key), weight)
            scores = branch.op("Add", scores, s) if scores else s
        if key_0.shape[2] > 1:  # else s_0 is alike for all tokens, which softmax does not see
            scores = branch.op("Add", scores, branch.op("MatMul", asking, transposed))
        if attention.bias is not None:
            scores = branch.op("Add", scores, branch.floats(attention.bias[:, token : token + 1]))
        weights = branch.op("Mul", branch.op("Softmax", scores, axis=-1), mask)
        output = branch.op("MatMul", weights, value)
        if value_0.any():
            output = branch.op("Add", output, branch.floats(value_0))
        return _as_output(branch, output, reading)

    return joined


def _close(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    return bool(np.abs(a - b).max() <= tolerance * np.abs(b).max())


def _parts(attention: SelfAttention) -> tuple[Part, Part, Part]:
    return attention.query, attention.key, attention.value


def _projected(graph: Graph, reading: Reading, level: float) -> list[np.ndarray]:
    """Queries, keys and values (1, heads, T, d) of one image's tokens at a level."""
    attention = reading.attention
    assert attention is not None
    names = [part.name for part in _parts(attention)]
    entering = graph.entering(graph.between([reading.normed], names))
    given = {name: reading.values[name] for name in entering}
    normed = reading.values[reading.normed]
    given[reading.normed] = (normed * normed.dtype.type(level)).astype(normed.dtype)
    found = graph.run(given, names)
    arrays = []
    for part in _parts(attention):
        array = found[part.name].astype(np.float32)
        if part.weight is not None:
            array = array @ part.weight.astype(np.float32)
        if part.bias is not None:
            array = array + part.bias.astype(np.float32)
        shape, axes = _opened(part.axes, array.shape, attention.heads)
        arrays.append(array.reshape(shape).transpose([axes.index(a) for a in "bhtd"])[:1])
    return arrays


def _opened(
    axes: tuple[str, ...], shape: tuple[int, ...], heads: int
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """A shape, and its axes, with heads as an axis of their own and the batch open."""
    if axes[0] == "bh":
        return (-1, heads, *shape[1:]), ("b", "h", *axes[1:])
    if axes[-1] == "hd":
        return (-1, shape[1], heads, shape[2] // heads), ("b", "t", "h", "d")
    return (-1, *shape[1:]), axes


def _as_heads(
    branch: Branch,
    part: Part,
    reading: Reading,
    names: Mapping[str, str],
    *,
    transposed: bool = False,
) -> str:
    """A part as (B, heads, T, d) float32, or (B, heads, d, T)."""
    assert reading.attention is not None
    heads, shape = reading.attention.heads, reading.values[part.name].shape
    name = names[part.name]
    if part.weight is not None:
        name = branch.op("MatMul", name, branch.const(part.weight))
        shape = (*shape[:-1], part.weight.shape[1])
    if part.bias is not None:
        name = branch.op("Add", name, branch.const(part.bias))
    if reading.values[part.name].dtype != np.float32:
        name = branch.op("Cast", name, to=onnx.TensorProto.FLOAT)
    opened, axes = _opened(part.axes, shape, heads)
    if len(opened) != len(shape):
        name = branch.op("Reshape", name, branch.ints(*opened))
    perm = [axes.index(axis) for axis in ("bhdt" if transposed else "bhtd")]
    return name if perm == [0, 1, 2, 3] else branch.op("Transpose", name, perm=perm)


def _key_at(branch: Branch, graph: Graph, reading: Reading, level: float) -> str:
    """Keys of all tokens at a level, by the graph's own nodes."""
    attention, normed = reading.attention, reading.normed
    assert attention is not None
    kind = reading.values[normed].dtype
    given = {normed: branch.op("Mul", normed, branch.const(level, kind.type))}
    numbers = graph.between([normed], [attention.key.name])
    names = branch.copy(graph, numbers, given)
    return _as_heads(branch, attention.key, reading, names, transposed=True)


def _as_output(branch: Branch, joined: str, reading: Reading) -> str:
    """(B, heads, T, d) float32 as the attention's output is laid out."""
    attention = reading.attention
    assert attention is not None
    part = attention.output
    value = reading.values[part.name]
    if part.axes[0] == "bh":
        joined = branch.op("Reshape", joined, branch.ints(-1, *value.shape[1:]))
    elif part.axes[-1] == "hd":
        joined = branch.op("Transpose", joined, perm=[0, 2, 1, 3])
        joined = branch.op("Reshape", joined, branch.ints(-1, *value.shape[1:]))
    if value.dtype != np.float32:
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        joined = branch.op("Cast", joined, to=kind)
    return joined


def append_direct(branch: Branch, graph: Graph, reading: Reading, masking: Masking) -> str:
    """Logits (B, N, C) under all masks, by a loop that runs the nodes below F once a mask."""
    normed = reading.values[reading.normed]
    masks = mask_matrix(reading.layout.grid, masking, prefix_tokens=reading.layout.prefix)
    first = reading.layout.axes[0]
    tokens = [normed.shape[axis] for axis in reading.layout.axes]
    after = normed.ndim - first - len(tokens)
    every = masks.reshape(len(masks), *[1] * first, *tokens, *[1] * after).astype(normed.dtype)
    stacked = branch.const(every)
    body = branch.body()
    mask = body.op("Gather", stacked, f"{PREFIX}number", axis=0)
    given = {reading.normed: body.op("Mul", reading.normed, mask)}
    numbers = graph.between(given, [reading.logits])
    logits = body.copy(graph, numbers, given)[reading.logits]
    logits = body.op("Cast", logits, to=onnx.TensorProto.FLOAT)
    goes_on = body.op("Identity", f"{PREFIX}going")
    loop = helper.make_graph(
        body.nodes,
        f"{PREFIX}mask",
        [
            helper.make_tensor_value_info(f"{PREFIX}number", onnx.TensorProto.INT64, []),
            helper.make_tensor_value_info(f"{PREFIX}going", onnx.TensorProto.BOOL, []),
        ],
        [
            helper.make_tensor_value_info(goes_on, onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info(logits, onnx.TensorProto.FLOAT, [None, reading.classes]),
        ],
    )
    count, always = branch.const(len(masks), np.int64), branch.const(True, np.bool_)
    stacked = branch.op("Loop", count, always, body=loop)  # (N, B, C)
    return branch.op("Transpose", stacked, perm=[1, 0, 2])
