"""Find the token axes and the patch grid of F, and check that its tokens lie row by row.

Axes and grid follow from shapes. The order of the tokens does not, so it is tested: patches of a
picture are changed one by one, and each has to change its own token most.
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
# Share of the changed patches that must have changed their own token most. In a wrong order about
# one of eight does so by chance.
_ENOUGH = 0.7


@dataclass(frozen=True)
class Layout:
    """The places of tokens in a value.

    Attributes:
        axes: The token axis, or the two axes of a grid.
        grid: (h, w).
        prefix: Number P of tokens before the patches.
    """

    axes: tuple[int, ...]
    grid: tuple[int, int]
    prefix: int

    def cells(self) -> list[tuple[int, int]]:
        """Return the (row, column) of up to eight random patches to change, the same every time.

        A patch that has the same number counted row by row and column by column, such as the first,
        cannot tell these two orders apart. So it is left out if there are others.
        """
        height, width = self.grid
        every = [(y, x) for y in range(height) for x in range(width)]
        others = [(y, x) for y, x in every if y * width + x != x * height + y]
        chosen = np.random.default_rng(1).permutation(len(others or every))[:8]
        return [(others or every)[number] for number in chosen]

    def count_own(self, moves: Sequence[np.ndarray]) -> int:
        """Return how many cells moved their own token more than any other cell moved it.

        The `moves` are the changes of the value, one array for each of `cells` in turn.
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
    convolutions: Sequence[tuple[int, ...]],
    given: tuple[int, int] | None,
) -> Layout:
    """Return the layout of F; refuse one that is not known or that no grid fits.

    Args:
        shape: Shape of F.
        batch: Number of images that F was computed from.
        convolutions: Output shapes of the convolutions above F, one of which embeds the patches.
        given: The grid, if the caller gives it.
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
    pictures: Mapping[str, np.ndarray],
    normed: str,
    value: np.ndarray,
    layout: Layout,
) -> None:
    """Refuse a graph in which F's tokens do not lie row by row after the prefix.

    Attention mixes tokens, so a changed patch may change the token of another patch most. So the
    test has two steps: from pixels to the tokens before any attention, and from there to F with a
    whole token changed at a time.

    Args:
        graph: The graph.
        pictures: Name of the input -> pictures to change.
        normed: Name of F.
        value: F of these pictures.
        layout: The layout that F seems to have.
    """
    (images,) = pictures
    early = _find_early_tokens(graph, pictures, value)
    _check_order(graph, images, pictures[images], early or normed, layout)
    if early:
        _check_places(graph, images, pictures[images], early, normed, layout)


def _check_order(
    graph: Graph, images: str, pictures: np.ndarray, tokens: str, layout: Layout
) -> None:
    """Refuse tokens that are not changed most by the patches that should be theirs."""
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
    """Refuse tokens that change places between the first attention and F."""
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
    """Return the change of `seen` after each region of `changed` in turn has its sign flipped."""
    run = graph.prepare(given, [seen])
    base = run(given)[seen].astype(np.float64)
    moves = []
    for region in regions:
        value = given[changed].copy()
        value[region] *= -1
        moves.append(run({**given, changed: value})[seen] - base)
    return moves


def _find_early_tokens(
    graph: Graph, given: Mapping[str, np.ndarray], normed: np.ndarray
) -> str | None:
    """Return the first value with F's shape before any attention, if there is one."""
    values = []
    for node in graph.nodes:
        if "Softmax" in node.op_type or "Attention" in node.op_type:
            break
        values += [name for name in node.output if name in graph.image_values]
    found = graph.run(given, values)
    for name in values:
        if isinstance(found[name], np.ndarray) and found[name].shape == normed.shape:
            return str(name)
    return None
