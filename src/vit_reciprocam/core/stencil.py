"""Windows on the patch grid: each patch's neighbours, and sums over all patches outside."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from vit_reciprocam.core.masks import Place

__all__ = ["frame", "log_sum_outside", "shift"]


def frame(
    patches: Tensor, grid: tuple[int, int], window: tuple[Place, ...], value: float
) -> Tensor:
    """Return patches (b, n, …) as a grid with a margin, into which windows at the border reach."""
    margin = _margin(window)
    return pad(patches.unflatten(1, grid), (0, 0, 0, 0, *(margin,) * 4), value=value)


def shift(framed: Tensor, place: Place, grid: tuple[int, int], window: tuple[Place, ...]) -> Tensor:
    """Return the neighbour of each patch at a place of the window, (b, y, x, …)."""
    margin = _margin(window)
    rows = framed.narrow(1, margin + place.down, grid[0])
    return rows.narrow(2, margin + place.right, grid[1])


def _margin(window: tuple[Place, ...]) -> int:
    """Return how many patches a window reaches beyond its centre."""
    return max(max(abs(place.down), abs(place.right)) for place in window)


def log_sum_outside(
    s: Float[Tensor, "b y x r k"], window: tuple[Place, ...]
) -> Float[Tensor, "b y x r k"]:
    """Return log Σ exp(s) over the patches outside each patch's window, which is a full square.

    The sum is put together from the four sides of the window, so that nothing is subtracted: left
    and right of it in its own rows, and all of the rows above and below it.
    """
    margin = _margin(window)
    grid = s.shape[1], s.shape[2]

    def beyond(s: Tensor, dim: int) -> Tensor:
        """Return log Σ exp(s) over the patches beyond the margin along one dimension."""
        size, skipped = s.shape[dim], margin + 1
        if size <= skipped:
            return torch.full_like(s, float("-inf"))
        ends = s.narrow(dim, 0, skipped) * 0 + float("-inf")  # nothing lies beyond the border
        before = s.narrow(dim, 0, size - skipped).logcumsumexp(dim)
        after = s.narrow(dim, skipped, size - skipped).flip(dim).logcumsumexp(dim).flip(dim)
        return torch.logaddexp(torch.cat([ends, before], dim), torch.cat([after, ends], dim))

    sides = frame(beyond(s, 2).flatten(1, 2), grid, window, float("-inf"))
    near = range(-margin, margin + 1)
    near_rows = [shift(sides, Place(down, 0, 1.0), grid, window) for down in near]
    far_rows = beyond(s.logsumexp(2, keepdim=True), 1).expand_as(s)
    return torch.stack([*near_rows, far_rows]).logsumexp(0)
