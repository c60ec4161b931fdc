"""From the last attention's output to the logits: which tokens the head reads, and where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vit_reciprocam.errors import ModelError
from vit_reciprocam.onnx.insert.attention import SelfAttention
from vit_reciprocam.onnx.insert.graph import Graph, taken
from vit_reciprocam.onnx.insert.layout import Layout

__all__ = ["Readout", "Tail", "read_tail"]


@dataclass(frozen=True)
class Readout:
    """A value of the head that is made from one token.

    Attributes:
        token: Which.
        whole: The value with all tokens that it is taken from, and its token axis.
        shape: Its own.
    """

    token: int
    whole: str
    axis: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Tail:
    """From the last attention's output to the logits, where the head reads prefix tokens only.

    Attributes:
        tokens: Values that enter besides the attention's output -> their token axis.
        readouts: Values of the head, each made from one token.
    """

    tokens: Mapping[str, int]
    readouts: Mapping[str, Readout]


def read_tail(
    graph: Graph,
    attention: SelfAttention,
    logits: str,
    values: Mapping[str, np.ndarray],
    layout: Layout,
    pixels: set[str],
) -> Tail:
    """Ask the graph which tokens the head reads, and where it takes them.

    Raises:
        ModelError: With the reason why the closed form does not hold.
    """
    output = attention.output.name
    prefix, count = layout.prefix, layout.prefix + layout.grid[0] * layout.grid[1]
    if prefix == 0 or len(layout.axes) != 1:
        raise ModelError("the model has no prefix tokens")
    numbers = graph.between([output], [logits])
    inputs = [name for name in graph.entering(numbers) if name != output]
    given = {name: values[name] for name in (output, *inputs)}
    sides = {output: _token_axis(values[output].shape, count, attention.output.axes)}
    for name in inputs:
        if name in pixels:
            sides[name] = _token_axis(values[name].shape, count)
    made = [name for number in numbers for name in graph.nodes[number].output if name]
    run = graph.part(given, made)
    plain = run(given)
    draw = np.random.default_rng(2)

    def moved_by(tokens: slice) -> set[str]:
        """What changes with tokens: by noise, weak and strong, and all one way or the other."""
        moved: set[str] = set()
        for size, shift in ((1, 0), (10, 0), (1, 5), (1, -5)):
            changed = dict(given)
            for name, axis in sides.items():
                value = given[name].copy()
                part = value[(slice(None),) * axis + (tokens,)]
                noise = size * draw.standard_normal(part.shape) + shift
                part += noise.astype(part.dtype)
                changed[name] = value
            after = run(changed)
            moved |= {name for name in made if not _same(plain[name], after[name])}
        return moved

    full = moved_by(slice(prefix, count)) | sides.keys()
    if logits in full:
        raise ModelError("the head reads all tokens, not prefix tokens alone")
    by_prefix = [moved_by(slice(token, token + 1)) for token in range(prefix)]
    readouts: dict[str, Readout] = {}
    for number in numbers:
        node = graph.nodes[number]
        whole = [name for name in taken(node) if name in full]
        for name in node.output:
            tokens = [token for token in range(prefix) if name in by_prefix[token]]
            if not whole or name in full or not tokens:
                continue
            if len(tokens) > 1:
                raise ModelError(f"{graph.describe(name)} reads {len(tokens)} tokens at once")
            shape = plain[whole[0]].shape if whole[0] in plain else given[whole[0]].shape
            axis = _token_axis(shape, count)
            readouts[name] = Readout(tokens[0], whole[0], axis, plain[name].shape)
    if not readouts:
        raise ModelError("no value of the head that is made from one token was found")
    return Tail({name: axis for name, axis in sides.items() if name != output}, readouts)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.array_equal(a, b, equal_nan=np.issubdtype(a.dtype, np.floating)))


def _token_axis(shape: tuple[int, ...], count: int, axes: tuple[str, ...] | None = None) -> int:
    if axes is not None:
        axis = axes.index("t")
        found = [axis] if shape[axis] == count else []
    else:
        found = [axis for axis, size in enumerate(shape) if size == count]
        found = [1] if 1 in found else found
    if not found:
        raise ModelError(f"a value {shape} beside the last attention has no axis of all tokens")
    return found[0]
