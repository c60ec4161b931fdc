"""The closed form in a few standard operators: sums over windows as convolutions of the grid.

With weights e = exp(s - c), for a c that is the same for every mask, the heads under mask n are

    o_n = v_0 + (Σ_prefix e u + Σ_levels window(e u)[n]) /
                (Σ_prefix e + Σ_levels window(e)[n] + Σ_outside(n) e)

where window(x)[n] sums x over the places of n's window that have the level. It is a convolution of
each channel by itself, with ones at these places. All weights are positive, so nothing cancels. The
stencil of `closed_form` is faster in PyTorch, this in ONNX Runtime and OpenVINO.

The letters of the shapes are those of `closed_form`; here positions come last, as convolutions want
them.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import conv2d

from vit_reciprocam.core.closed_form import Attend, Parts
from vit_reciprocam.core.masks import kernel_window

__all__ = ["CONVOLUTION"]

# c lies this far above the largest score that all masks share, so that the weights of these scores
# still fit float16 if somebody converts the file.
_ROOM = 8.0
# Scores are cut off here, so that weights, and sums of weights times values, fit float32.
_LEAST, _MOST = -80.0, 75.0


def _attend_to_all(
    v_0: Float[Tensor, "1 1 k d"], u: Float[Tensor, "b t k d"], s: Float[Tensor, "b t r k"]
) -> Float[Tensor, "1 b r k d"]:
    """Return the readout tokens' heads of the unmasked image."""
    # (b, k, d, t) @ (b, k, t, r)
    heads = u.permute(0, 2, 3, 1) @ _positions_last(s).softmax(dim=-1).permute(0, 2, 3, 1)
    return (v_0 + heads.permute(0, 3, 1, 2)).unsqueeze(0)


def _attend_by_convolution(
    parts: Parts, grid: tuple[int, int], kernel: str, null: bool
) -> Float[Tensor, "rows b r k d"]:
    """Return the readout tokens' heads under every mask, after those of the all-null mask.

    c is near the largest of the scores that all masks share, so that the denominator never
    vanishes. All scores of a window that lie more than 83 above that score count as equal.
    """
    s_prefix, s_outside = _positions_last(parts.s_prefix), _positions_last(parts.s_outside)
    shared = torch.cat([s_prefix, s_outside.expand(s_prefix.shape[0], -1, -1, -1)], dim=-1)
    c = shared.amax(dim=-1, keepdim=True) + _ROOM  # (b, r, k, 1)

    def weights(s: Float[Tensor, "b r k t"]) -> Float[Tensor, "b r k t"]:
        return (s - c).clamp(_LEAST, _MOST).exp()

    u = parts.u.permute(0, 2, 3, 1)  # (b, k, d, t)
    e_prefix, e_outside = weights(s_prefix), weights(s_outside)
    prefix_sum = e_prefix.sum(dim=-1, keepdim=True)
    denominator = prefix_sum + _sum_outside(e_outside, grid, kernel)  # (b, r, k, n)
    numerator: Tensor | float = 0.0  # (b, r, k, d, n)
    if parts.prefix:
        u_prefix = u[..., : e_prefix.shape[-1]]
        summed = u_prefix @ e_prefix.permute(0, 2, 3, 1)  # (b, k, d, r)
        numerator = summed.permute(0, 3, 1, 2).unsqueeze(-1)
    if null:
        patches = grid[0] * grid[1] // e_outside.shape[-1]  # one weight may stand for all
        everything = prefix_sum + patches * e_outside.sum(dim=-1, keepdim=True)
        none = numerator / everything.unsqueeze(3)
    for level, s in parts.s_levels.items():
        e = weights(_positions_last(s))
        # If u is linear in the level, only u at level 1 is there, and the level is a factor.
        held_at, factor = (1.0, level) if parts.linear else (level, 1.0)
        u_level = parts.u_levels[held_at].permute(0, 2, 3, 1).unsqueeze(1)  # (b, 1, k, d, n)
        denominator = denominator + _sum_window(e, grid, kernel, level)
        numerator = numerator + _sum_window(e.unsqueeze(3) * u_level, grid, kernel, level, factor)
    rows = numerator / denominator.unsqueeze(3)
    if null:
        rows = torch.cat([torch.zeros_like(rows[..., :1]) + none, rows], dim=-1)
    rows = parts.v_0.unsqueeze(-1) + rows  # (b, r, k, d, rows)
    return rows.permute(4, 0, 1, 2, 3)


CONVOLUTION = Attend(_attend_to_all, _attend_by_convolution)
"""The form that is fast in ONNX Runtime and OpenVINO."""


def _positions_last(s: Float[Tensor, "b t r k"]) -> Float[Tensor, "b r k t"]:
    return s.permute(0, 2, 3, 1)


def _sum_window(
    x: Float[Tensor, "b *channels n"],
    grid: tuple[int, int],
    kernel: str,
    level: float,
    factor: float = 1.0,
) -> Float[Tensor, "b *channels n"]:
    """Sum factor · x, for each patch, over those places of its window that have the level."""
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


def _sum_outside(
    e: Float[Tensor, "b r k n_or_1"], grid: tuple[int, int], kernel: str
) -> Float[Tensor, "*b_r_k n"]:
    """Sum e, for each patch, over the patches outside its window, which is a full square.

    e holds one weight per patch, or a single one if all patches have the same.
    """
    margin = max(place.down for place in kernel_window(kernel))
    near_rows, near_columns = (_lie_near(size, margin).to(e) for size in grid)
    if e.shape[-1] == 1:
        kept = near_rows.sum(dim=1)[:, None] * near_columns.sum(dim=1)
        return e * (grid[0] * grid[1] - kept).flatten()
    # In rows that cross the window only the columns beside it count, in all other rows all columns.
    # So only positive numbers are added; the sum of all minus that of the window would cancel.
    e = e.unflatten(-1, grid)
    sides = near_rows @ (e @ (1 - near_columns))
    return (sides + (1 - near_rows) @ e.sum(dim=-1, keepdim=True)).flatten(-2)


def _lie_near(size: int, margin: int) -> Bool[Tensor, "size size"]:
    """Return, for each pair of `size` rows, whether they are at most `margin` apart."""
    numbers = torch.arange(size)
    return (numbers[:, None] - numbers).abs() <= margin
