"""Find where the tokens of F are: on which axes, on which grid, and whether they lie row by row.

Axes and grid follow from shapes. The order of the tokens does not, so it is tested: patches of a
picture are changed one by one, and each has to move its own token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vit_reciprocam.errors import ModelError
from vit_reciprocam.onnx.insert.graph import Graph

__all__ = ["Layout", "check_layout", "find_layout"]

_MOST_PREFIX_TOKENS = 32
_ENOUGH = 0.7  # share of the patches changed; in a wrong order one of eight is right by chance


@dataclass(frozen=True)
class Layout:
    """The places of a value's tokens.

    Attributes:
        axes: Its token axis, or the two of its grid.
        grid: (h, w).
        prefix: P, the number of tokens that stand before the patches.
    """

    axes: tuple[int, ...]
    grid: tuple[int, int]
    prefix: int

    def cells(self) -> list[tuple[int, int]]:
        """Return the patches to change: up to eight, drawn at random, but the same every time.

        Patches with the same number row by row and column by column, such as the first, could not
        tell these two orders apart, so they are left out where there are others.
        """
        height, width = self.grid
        every = [(y, x) for y in range(height) for x in range(width)]
        others = [(y, x) for y, x in every if y * width + x != x * height + y]
        chosen = np.random.default_rng(1).permutation(len(others or every))[:8]
        return [(others or every)[number] for number in chosen]

    def count_own(self, moves: Sequence[np.ndarray]) -> int:
        """Return how many cells moved their own token more than any other cell moved it.

        Args:
            moves: By how much the value changed with each of `cells` in turn.
        """
        others = tuple(axis for axis in range(moves[0].ndim) if axis not in self.axes)
        places = [self.prefix + y * self.grid[1] + x for y, x in self.cells()]
        moved = np.array([np.abs(m).sum(axis=others).reshape(-1)[places] for m in moves])
        # Column t holds how far each cell moved token t. Tokens are not compared with one another:
        # after attention some move more than all others, whichever cell is changed.
        return int((moved.argmax(axis=0) == np.arange(len(places))).sum())


def find_layout(
    shape: tuple[int, ...],
    batch: int,
    maps: Sequence[tuple[int, ...]],
    given: tuple[int, int] | None,
) -> Layout:
    """Return F's layout.

    Args:
        shape: The shape of F.
        batch: The number of images that it was computed of.
        maps: The shapes of the convolutions above it, of which one embeds the patches.
        given: The grid, where the caller knows it.

    Raises:
        ModelError: If the layout is not known, or no grid fits.
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
        grids = [(int(each[2]), int(each[3])) for each in maps if len(each) == 4]
        fitting = [
            (h, w) for h, w in grids if h * w > 1 and 0 <= tokens - h * w <= _MOST_PREFIX_TOKENS
        ]
        if not fitting:
            raise ModelError(
                f"the patch grid of {tokens} tokens was not found: grid= (--grid) gives its rows "
                "and columns"
            )
        # the last of those that leave the fewest tokens over
        given = min(reversed(fitting), key=lambda each: tokens - each[0] * each[1])
    prefix = tokens - given[0] * given[1]
    if prefix < 0:
        raise ModelError(f"a grid of {given} has more patches than there are tokens, {tokens}")
    return Layout((axis,), given, prefix)


def check_layout(
    graph: Graph,
    pixels: set[str],
    pictures: Mapping[str, np.ndarray],
    normed: str,
    value: np.ndarray,
    layout: Layout,
) -> None:
    """Refuse tokens that do not lie row by row after the prefix.

    Attention mixes tokens, so that a change of one patch may be seen best in another's token. The
    test is therefore made in two steps: from pixels to the tokens before any attention, and, with a
    whole token changed at a time, from there to F.

    Args:
        graph: The graph.
        pixels: The values that depend on the images.
        pictures: The input's name -> pictures to change.
        normed: The name of F.
        value: F of these pictures.
        layout: The layout that F is thought to have.

    Raises:
        ModelError: If they do not.
    """
    (images,) = pictures
    early = _find_early_tokens(graph, pixels, pictures, value)
    _check_order(graph, images, pictures[images], early or normed, layout)
    if early:
        _check_places(graph, images, pictures[images], early, normed, layout)


def _check_order(
    graph: Graph, images: str, pictures: np.ndarray, tokens: str, layout: Layout
) -> None:
    """Change patches of the pictures and see which tokens answer.

    Raises:
        ModelError: If they are not those that the layout says.
    """
    grid, cells = layout.grid, layout.cells()
    rows = [round(y * pictures.shape[2] / grid[0]) for y in range(grid[0] + 1)]
    columns = [round(x * pictures.shape[3] / grid[1]) for x in range(grid[1] + 1)]
    regions = [np.s_[:, :, rows[y] : rows[y + 1], columns[x] : columns[x + 1]] for y, x in cells]
    right = layout.count_own(_measure_moves(graph, {images: pictures}, images, regions, tokens))
    if right < _ENOUGH * len(cells):
        raise ModelError(
            f"the tokens do not lie as {layout.prefix} prefix tokens and a grid of {grid}, row by "
            f"row: of {len(cells)} patches changed, {right} moved their own token most; grid= "
            "(--grid) gives other rows and columns"
        )


def _check_places(
    graph: Graph, images: str, pictures: np.ndarray, early: str, normed: str, layout: Layout
) -> None:
    """Change tokens before the first attention and see which tokens of F answer.

    Raises:
        ModelError: If they are others, so that tokens change places in between.
    """
    numbers = graph.nodes_between([early], [normed])
    entering = [name for name in graph.values_entering(numbers) if name != early]
    given = graph.run({images: pictures}, [early, *entering])
    cells, before = layout.cells(), (slice(None),) * layout.axes[0]
    if len(layout.axes) == 1:
        regions = [(*before, layout.prefix + y * layout.grid[1] + x) for y, x in cells]
    else:
        regions = [(*before, y, x) for y, x in cells]
    right = layout.count_own(_measure_moves(graph, given, early, regions, normed))
    if right < _ENOUGH * len(cells):
        raise ModelError(
            f"the tokens change places between {graph.describe(early)} and "
            f"{graph.describe(normed)}: of {len(cells)} changed, {right} moved themselves most"
        )


def _measure_moves(
    graph: Graph,
    given: Mapping[str, np.ndarray],
    changed: str,
    regions: Sequence[Any],
    seen: str,
) -> list[np.ndarray]:
    """Return how a value moves as regions of a given one change their sign, one at a time."""
    run = graph.prepare(given, [seen])
    base = run(given)[seen].astype(np.float64)
    moves = []
    for region in regions:
        value = given[changed].copy()
        value[region] *= -1
        moves.append(run({**given, changed: value})[seen] - base)
    return moves


def _find_early_tokens(
    graph: Graph, pixels: set[str], given: Mapping[str, np.ndarray], normed: np.ndarray
) -> str | None:
    """Return the first value of F's shape that no attention has mixed yet, if there is one."""
    values = []
    for node in graph.nodes:
        if "Softmax" in node.op_type or "Attention" in node.op_type:
            break
        values += [name for name in node.output if name in pixels]
    found = graph.run(given, values)
    for name in values:
        if isinstance(found[name], np.ndarray) and found[name].shape == normed.shape:
            return str(name)
    return None
