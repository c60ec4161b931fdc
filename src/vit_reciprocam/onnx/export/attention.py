"""The closed form in few standard operators: sums over the windows as convolutions of the grid.

With weights e = exp(s - c), for a c that is the same for every mask, the heads under mask n are

    o_n = v_0 + (Σ_prefix e u + Σ_levels window(e u)[n]) /
                (Σ_prefix e + Σ_levels window(e)[n] + Σ_outside(n) e)

where window(x)[n] sums x over the places of n's window that have the level: a convolution with
ones there, of each channel by itself. All weights are positive, so nothing cancels. The stencil of
`closed_form` is faster in PyTorch, this is in ONNX Runtime and OpenVINO.

Letters of the shapes as in `closed_form`; here positions come last, as in convolutions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from vit_reciprocam.core.closed_form import Parts
from vit_reciprocam.core.masks import kernel_window

__all__ = ["attend"]

_ROOM = 8.0  # of c above what all masks share: their weights fit float16 too, once converted
_LEAST, _MOST = -80.0, 75.0  # so that weights, and sums of weights times values, fit float32


def attend(parts: Parts, grid: tuple[int, int], kernel: str) -> Tensor:
    """The readout tokens' heads for row 0 and under every mask, (rows, b, r, k, d).

    c is near the largest score of what all masks share, so that the denominator never vanishes.
    Where several scores of one window lie more than 83 above that score, they count as equal.
    """
    s_prefix, s_outside = _positions_last(parts.s_prefix), _positions_last(parts.s_outside)
    alike = s_outside.expand(s_prefix.shape[0], -1, -1, -1)
    c = torch.cat([s_prefix, alike], dim=-1).amax(dim=-1, keepdim=True) + _ROOM  # (b, r, k, 1)

    def weights(s: Tensor) -> Tensor:
        return (s - c).clamp(_LEAST, _MOST).exp()

    u = parts.u.permute(0, 2, 3, 1)  # (b, k, d, t)
    row_0 = u @ _positions_last(parts.s).softmax(dim=-1).permute(0, 2, 3, 1)  # (b, k, d, r)
    e_prefix, e_outside = weights(s_prefix), weights(s_outside)
    below = e_prefix.sum(dim=-1, keepdim=True) + _outside(e_outside, grid, kernel)  # (b, r, k, n)
    above: Tensor | float = 0.0  # (b, r, k, d, n)
    if parts.prefix:
        of_prefix = u[..., : e_prefix.shape[-1]] @ e_prefix.permute(0, 2, 3, 1)
        above = of_prefix.permute(0, 3, 1, 2).unsqueeze(-1)
    for level, s in parts.s_levels.items():
        e = weights(_positions_last(s))
        of, factor = (1.0, level) if parts.linear else (level, 1.0)
        u_level = parts.u_levels[of].permute(0, 2, 3, 1).unsqueeze(1)
        below = below + _window(e, grid, kernel, level)
        above = above + _window(e.unsqueeze(3) * u_level, grid, kernel, level, factor)
    rows = torch.cat([row_0.permute(0, 3, 1, 2).unsqueeze(-1), above / below.unsqueeze(3)], dim=-1)
    rows = parts.v_0.unsqueeze(-1) + rows
    return rows.permute(4, 0, 1, 2, 3)


def _positions_last(s: Tensor) -> Tensor:
    """Scores (b, t, r, k) as (b, r, k, t)."""
    return s.permute(0, 2, 3, 1)


def _window(
    x: Tensor, grid: tuple[int, int], kernel: str, level: float, factor: float = 1.0
) -> Tensor:
    """For each patch (..., n) the sum over its window's places of a level, times a factor."""
    places = [place for place in kernel_window(kernel) if place.level == level]
    margin = max(max(abs(place.down), abs(place.right)) for place in places)
    if not margin:
        return x if factor == 1.0 else x * factor
    ones = torch.zeros(1, 1, 2 * margin + 1, 2 * margin + 1)
    for place in places:
        ones[..., margin + place.down, margin + place.right] = factor
    channels = x.flatten(1, -2).unflatten(2, grid)
    ones = ones.to(x).repeat(channels.shape[1], 1, 1, 1)
    summed = conv2d(channels, ones, padding=margin, groups=channels.shape[1])
    return summed.flatten(2).view(x.shape)


def _outside(e: Tensor, grid: tuple[int, int], kernel: str) -> Tensor:
    """For each patch the sum of e over the patches outside its window, a full square.

    e is (b, r, k, n), or (b, r, k, 1) where it is the same for all patches.
    """
    margin = max(place.down for place in kernel_window(kernel))
    near_rows, near_columns = (_near(size, margin).to(e) for size in grid)
    if e.shape[-1] == 1:
        kept = near_rows.sum(dim=1)[:, None] * near_columns.sum(dim=1)
        return e * (grid[0] * grid[1] - kept).flatten()
    e = e.unflatten(-1, grid)
    sides = near_rows @ (e @ (1 - near_columns))
    return (sides + (1 - near_rows) @ e.sum(dim=-1, keepdim=True)).flatten(-2)


def _near(size: int, margin: int) -> Tensor:
    """Which of `size` rows lie within a margin of which, (size, size)."""
    numbers = torch.arange(size)
    return (numbers[:, None] - numbers).abs() <= margin
