"""Find the token axes and the patch grid of F, and check that its tokens lie row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vit_reciprocam.errors import ModelError
from vit_reciprocam.onnx.insert.graph import Graph

__all__ = ["Layout", "check_layout", "find_layout"]

_MOST_PREFIX_TOKENS = 32
# Share of the changed patches that must have changed their own token most. In a wrong order about
# one of eight does so by chance.
_ENOUGH = 0.7


class Layout(NamedTuple):
    """The places of tokens in a value."""

    axes: tuple[int, ...]  # the token axis, or the two axes of a grid
    grid: tuple[int, int]  # (h, w)
    prefix: int  # number of tokens before the patches


def find_layout(
    shape: tuple[int, ...],
    batch: int,
    convolutions: Sequence[tuple[int, ...]],
    given: tuple[int, int] | None,
) -> Layout:
    """Return the layout of F from its shape; refuse one that is not known or that no grid fits.

    One of the `convolutions` above F, whose output shapes are here, embeds the patches. A grid that
    is `given` is taken instead.
    """
    if len(shape) == 4:  # (B, h, w, D)
        found = (shape[1], shape[2])
        if given not in (None, found):
            raise ModelError(f"the tokens lie on a grid of {found}, not {given}")
        return Layout((1, 2), found, 0)
    if len(shape) != 3 or batch not in shape[:2]:
        raise ModelError(
            f"the tokens' layout {shape} is not known: expected (batch, tokens, width)"
        )
    axis = 0 if shape[1] == batch and shape[0] != batch else 1
    tokens = shape[axis]
    if given is None:
        grids = [(int(each[2]), int(each[3])) for each in convolutions if len(each) == 4]
        fitting = [
            (h, w) for h, w in grids if h * w > 1 and 0 <= tokens - h * w <= _MOST_PREFIX_TOKENS
        ]
        if not fitting:
            raise ModelError(
                f"the patch grid of {tokens} tokens was not found: grid= (--grid) gives its rows "
                "and columns"
            )
        # the last of those that leave the fewest prefix tokens
        given = min(reversed(fitting), key=lambda each: tokens - each[0] * each[1])
    prefix = tokens - given[0] * given[1]
    if prefix < 0:
        raise ModelError(f"a grid of {given} has more patches than there are tokens, {tokens}")
    return Layout((axis,), given, prefix)


def check_layout(
    graph: Graph,
    images: str,
    pictures: np.ndarray,
    normed: str,
    shape: Sequence[int],
    layout: Layout,
) -> None:
    """Refuse a graph in which F, of that shape, does not have its tokens row by row.

    Attention mixes tokens, so a changed patch may change the token of another patch most. So the
    test has two steps: from pixels to the tokens before any attention, and from there to F with a
    whole token changed at a time.
    """
    grid, cells = layout.grid, _choose_cells(layout.grid)
    rows = [round(y * pictures.shape[2] / grid[0]) for y in range(grid[0] + 1)]
    columns = [round(x * pictures.shape[3] / grid[1]) for x in range(grid[1] + 1)]
    patches = [np.s_[:, :, rows[y] : rows[y + 1], columns[x] : columns[x + 1]] for y, x in cells]
    given = {images: pictures}
    early = _find_early_tokens(graph, given, shape)
    right = _count_own(graph, given, images, patches, early or normed, layout)
    if right < _ENOUGH * len(cells):
        raise ModelError(
            f"the tokens do not lie as {layout.prefix} prefix tokens and a grid of {grid}, row by "
            f"row: of {len(cells)} patches changed, {right} moved their own token most; grid= "
            "(--grid) gives other rows and columns"
        )
    if early is None:
        return
    entering = graph.values_entering(graph.nodes_between([early], [normed]))
    given = graph.run(given, [*dict.fromkeys([early, *entering])])
    before = (slice(None),) * layout.axes[0]
    if len(layout.axes) == 1:
        tokens = [(*before, layout.prefix + y * grid[1] + x) for y, x in cells]
    else:
        tokens = [(*before, y, x) for y, x in cells]
    right = _count_own(graph, given, early, tokens, normed, layout)
    if right < _ENOUGH * len(cells):
        raise ModelError(
            f"the tokens change places between {graph.describe(early)} and "
            f"{graph.describe(normed)}: of {len(cells)} changed, {right} moved themselves most"
        )


def _choose_cells(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the (row, column) of up to eight random patches to change, the same every time.

    A patch that has the same number counted row by row and column by column, such as the first,
    cannot tell these two orders apart. So it is left out if there are others.
    """
    height, width = grid
    every = [(y, x) for y in range(height) for x in range(width)]
    others = [(y, x) for y, x in every if y * width + x != x * height + y]
    chosen = np.random.default_rng(1).permutation(len(others or every))[:8]
    return [(others or every)[number] for number in chosen]


def _count_own(
    graph: Graph,
    given: Mapping[str, np.ndarray],
    changed: str,
    regions: Sequence[Any],
    tokens: str,
    layout: Layout,
) -> int:
    """Return how many cells move their own token more than any other cell moves it."""
    run = graph.prepare(given, [tokens])
    base = run(given)[tokens].astype(np.float64)
    others = tuple(axis for axis in range(base.ndim) if axis not in layout.axes)
    places = [layout.prefix + y * layout.grid[1] + x for y, x in _choose_cells(layout.grid)]
    moved = []  # by each cell in turn: how far it moved each cell's token
    for region in regions:
        value = given[changed].copy()
        value[region] *= -1  # each cell has a region of the value `changed`
        move = np.abs(run({**given, changed: value})[tokens] - base)
        moved.append(move.sum(axis=others).reshape(-1)[places])
    # Tokens are not compared with one another: after attention some move more than all others,
    # whichever cell is changed.
    return int((np.argmax(moved, axis=0) == np.arange(len(places))).sum())


def _find_early_tokens(
    graph: Graph, given: Mapping[str, np.ndarray], shape: Sequence[int]
) -> str | None:
    """Return the first value with F's shape before any attention, if there is one."""
    names = []
    for node in graph.nodes:
        if "Softmax" in node.op_type or "Attention" in node.op_type:
            break
        names += [name for name in node.output if name in graph.image_values]
    # A value that is not a tensor, such as a sequence, has no shape.
    found = graph.run(given, names).items()
    return next((name for name, value in found if getattr(value, "shape", None) == shape), None)
