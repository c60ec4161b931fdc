"""Where the tokens of F are: on which axes, on which grid, and whether row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vit_reciprocam.errors import ModelError
from vit_reciprocam.onnx.insert.graph import Graph

__all__ = ["Layout", "check_layout", "find_layout"]


@dataclass(frozen=True)
class Layout:
    """Where a value's tokens are.

    Attributes:
        axes: Its token axis, or the two of its grid.
        grid: (h, w).
        prefix: P, how many tokens stand before the patches.
    """

    axes: tuple[int, ...]
    grid: tuple[int, int]
    prefix: int

    def cells(self) -> list[tuple[int, int]]:
        """Up to eight patches, the same in no other order of rows and columns."""
        height, width = self.grid
        every = [(y, x) for y in range(height) for x in range(width)]
        others = [(y, x) for y, x in every if y * width + x != x * height + y]
        chosen = np.random.default_rng(1).permutation(len(others or every))[:8]
        return [(others or every)[number] for number in chosen]

    def own(self, moves: Sequence[np.ndarray]) -> int:
        """How many of the cells, changed in turn, moved their own token more than other cells did.

        Each token is held against itself, since some answer to every change.
        """
        others = tuple(axis for axis in range(moves[0].ndim) if axis not in self.axes)
        places = [self.prefix + y * self.grid[1] + x for y, x in self.cells()]
        moved = np.array([np.abs(m).sum(axis=others).reshape(-1)[places] for m in moves])
        return int((moved.argmax(axis=0) == np.arange(len(places))).sum())


def find_layout(
    shape: tuple[int, ...],
    batch: int,
    maps: Sequence[tuple[int, ...]],
    given: tuple[int, int] | None,
) -> Layout:
    """F's layout, from its shape and those of the convolutions above it.

    Raises:
        ModelError: If it is not known, or no grid fits.
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
        grids = [each[2:] for each in maps if len(each) == 4]
        fitting = [e for e in grids if e[0] * e[1] > 1 and 0 <= tokens - e[0] * e[1] <= 32]
        if not fitting:
            raise ModelError(
                f"the patch grid of {tokens} tokens was not found: grid= (--grid) gives its rows "
                "and columns"
            )
        nearest = min(reversed(fitting), key=lambda each: tokens - each[0] * each[1])
        given = (int(nearest[0]), int(nearest[1]))
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

    Args:
        graph: The graph.
        pixels: The values that depend on the images.
        pictures: What goes in.
        normed: F.
        value: F of these pictures.
        layout: Supposed.

    Raises:
        ModelError: If they do not.
    """
    (images,) = pictures
    early = _before_attention(graph, pixels, pictures, value)
    _check_order(graph, images, pictures[images], early or normed, layout)
    if early:
        _check_kept(graph, images, pictures[images], early, normed, layout)


def _check_order(
    graph: Graph, images: str, pictures: np.ndarray, tokens: str, layout: Layout
) -> None:
    """Refuse tokens that do not lie row by row after the prefix: change patches, see which answer.

    Raises:
        ModelError: If they do not.
    """
    grid, cells = layout.grid, layout.cells()
    height, width = pictures.shape[2] / grid[0], pictures.shape[3] / grid[1]
    run = graph.part({images: pictures}, [tokens])
    base = run({images: pictures})[tokens].astype(np.float64)
    moves = []
    for y, x in cells:
        changed = pictures.copy()
        rows = slice(round(y * height), round((y + 1) * height))
        changed[:, :, rows, round(x * width) : round((x + 1) * width)] *= -1
        moves.append(run({images: changed})[tokens] - base)
    right = layout.own(moves)
    if right < 0.7 * len(cells):
        raise ModelError(
            f"the tokens do not lie as {layout.prefix} prefix tokens and a grid of {grid}, row by "
            f"row: of {len(cells)} patches changed, {right} moved their own token most; grid= "
            "(--grid) gives other rows and columns"
        )


def _check_kept(
    graph: Graph, images: str, pictures: np.ndarray, early: str, normed: str, layout: Layout
) -> None:
    """Refuse tokens that change places between the embedding and F.

    Raises:
        ModelError: If they do.
    """
    numbers = graph.between([early], [normed])
    entering = [name for name in graph.entering(numbers) if name != early]
    given = graph.run({images: pictures}, [early, *entering])
    run = graph.part(given, [normed])
    base = run(given)[normed].astype(np.float64)
    cells, moves = layout.cells(), []
    for y, x in cells:
        token = layout.prefix + y * layout.grid[1] + x
        index = [slice(None)] * base.ndim
        if len(layout.axes) == 1:
            index[layout.axes[0]] = slice(token, token + 1)
        else:
            index[layout.axes[0]], index[layout.axes[1]] = slice(y, y + 1), slice(x, x + 1)
        changed = given[early].copy()
        changed[tuple(index)] *= -1
        moves.append(run({**given, early: changed})[normed] - base)
    right = layout.own(moves)
    if right < 0.7 * len(cells):
        raise ModelError(
            f"the tokens change places between {graph.describe(early)} and "
            f"{graph.describe(normed)}: of {len(cells)} changed, {right} moved themselves most"
        )


def _before_attention(
    graph: Graph, pixels: set[str], given: Mapping[str, np.ndarray], normed: np.ndarray
) -> str | None:
    """The first value of F's shape that no attention has mixed yet, if there is one."""
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
