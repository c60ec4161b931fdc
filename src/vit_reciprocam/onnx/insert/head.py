"""Find which tokens reach the logits after the last attention, and where the head picks them.

The closed form holds if these are single prefix tokens, each picked from a value with all tokens.
Exporters write that in many ways (Gather, Slice, Split and others). So the kinds of nodes do not
count, only which values change when a token is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vit_reciprocam.errors import ModelError
from vit_reciprocam.onnx.insert.attention import SelfAttention
from vit_reciprocam.onnx.insert.graph import Graph, node_inputs
from vit_reciprocam.onnx.insert.layout import Layout

__all__ = ["HeadReads", "SingleTokenRead", "read_head"]


class SingleTokenRead(NamedTuple):
    """A value after the last attention that depends on one token."""

    token: int
    source: str  # name of the value with all tokens, from which the token is picked
    axis: int  # token axis of `source`
    shape: tuple[int, ...]  # shape of the value with one token


class HeadReads(NamedTuple):
    """How the head reads prefix tokens."""

    # The values with all tokens that are used beside the attention's output, such as the skip path:
    # name -> token axis.
    sides: Mapping[str, int]
    # The values that depend on one token each: name -> which token, and where it is picked. The
    # logits depend on tokens only through these values.
    reads: Mapping[str, SingleTokenRead]


def read_head(
    graph: Graph,
    attention: SelfAttention,
    logits: str,
    values: Mapping[str, np.ndarray],
    layout: Layout,
) -> HeadReads:
    """Return how the head reads prefix tokens; refuse one for which the closed form fails.

    The `values`, all of one run, are the attention's output and what else nodes after it use.
    """
    output = attention.output.name
    prefix, count = layout.prefix, layout.prefix + layout.grid[0] * layout.grid[1]
    if prefix == 0 or len(layout.axes) != 1:
        raise ModelError("the model has no prefix tokens")
    numbers = graph.nodes_between([output], [logits])
    inputs = [name for name in graph.values_entering(numbers) if name != output]
    given = {name: values[name] for name in (output, *inputs)}
    axes = {output: _token_axis(values[output].shape, count, attention.output.axes)}
    axes |= {
        name: _token_axis(values[name].shape, count)
        for name in inputs
        if name in graph.image_values
    }
    made = [name for number in numbers for name in graph.nodes[number].output if name]
    moved_by, shapes = _prepare_changes(graph, given, axes, made)
    by_patches = moved_by(slice(prefix, count)) | axes.keys()
    if logits in by_patches:
        raise ModelError("the head reads all tokens, not prefix tokens alone")
    by_prefix = [moved_by(slice(token, token + 1)) for token in range(prefix)]
    reads: dict[str, SingleTokenRead] = {}
    for number in numbers:
        node = graph.nodes[number]
        # A node that picks a token uses a value which patches change, and computes one which they
        # do not. If no prefix token changes that one either, it is a shape or a constant.
        sources = [name for name in node_inputs(node) if name in by_patches]
        for name in node.output:
            tokens = [token for token in range(prefix) if name in by_prefix[token]]
            if not sources or name in by_patches or not tokens:
                continue
            if len(tokens) > 1:
                raise ModelError(f"{graph.describe(name)} reads {len(tokens)} tokens at once")
            axis = _token_axis(shapes[sources[0]], count)
            reads[name] = SingleTokenRead(tokens[0], sources[0], axis, shapes[name])
    if not reads:
        raise ModelError("no value of the head that is made from one token was found")
    return HeadReads({name: axis for name, axis in axes.items() if name != output}, reads)


def _prepare_changes(
    graph: Graph, given: Mapping[str, np.ndarray], axes: Mapping[str, int], made: Sequence[str]
) -> tuple[Callable[[slice], set[str]], dict[str, tuple[int, ...]]]:
    """Return a function from tokens to the names of values they change, and all values' shapes.

    The function changes these tokens in the `given` values that have a token axis in `axes`, and
    returns which of the values `made` from them are different then.
    """
    run = graph.prepare(given, made)
    before = run(given)
    draw = np.random.default_rng(2)

    def moved_by(tokens: slice) -> set[str]:
        moved: set[str] = set()
        # One change could miss a dependence. A ReLU or a clip may be flat around the usual values:
        # strong noise gets through it and weak noise does not. And no noise moves the mean of many
        # numbers by much, so all numbers are also shifted together: once far up, once far down.
        for size, shift in ((1, 0), (10, 0), (1, 5), (1, -5)):
            changed = dict(given)
            for name, axis in axes.items():
                value = given[name].copy()
                part = value[(slice(None),) * axis + (tokens,)]
                noise = size * draw.standard_normal(part.shape) + shift
                part += noise.astype(part.dtype)
                changed[name] = value
            after = run(changed)
            for name in made:
                floats = np.issubdtype(before[name].dtype, np.floating)
                if not np.array_equal(before[name], after[name], equal_nan=floats):
                    moved.add(name)
        return moved

    shapes = {name: value.shape for name, value in (*given.items(), *before.items())}
    return moved_by, shapes


def _token_axis(shape: tuple[int, ...], count: int, axes: tuple[str, ...] = ()) -> int:
    """Return the token axis of a value, which has that length and, if `axes` are given, is "t"."""
    found = [n for n, size in enumerate(shape) if size == count and (not axes or axes[n] == "t")]
    if not found:
        raise ModelError(f"a value {shape} beside the last attention has no axis of all tokens")
    return 1 if 1 in found else found[0]
