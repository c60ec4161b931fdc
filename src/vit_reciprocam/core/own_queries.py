"""The closed form where each mask has its own queries: in the later of several masked blocks.

From the second masked block on, the readout tokens differ from mask to mask. Each of them reads
the readout tokens of its own mask, the other prefix tokens and the patches of its window. All
patches outside are at level 0, where they have the same value and, unless keys are rotated after a
bias or a norm, the same key. So a row of attention has as few entries as in the first masked block.

The letters of the shapes are those of `closed_form`; y and x are rows and columns of masks.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from vit_reciprocam.core.masks import Masking, kernel_window, mask_matrix, window_sizes
from vit_reciprocam.core.seen import Seen
from vit_reciprocam.core.stencil import frame, log_sum_outside, shift

__all__ = ["attend_with_own_queries"]


def attend_with_own_queries(
    seen: Seen, normed: Float[Tensor, "rows b r D"], grid: tuple[int, int], kernel: str, null: bool
) -> Float[Tensor, "rows b r k d"]:
    """Return the heads of readout tokens that differ from mask to mask.

    `normed` is their F, one row per mask; if `null`, the first row is that of the all-null mask.
    """
    attention, flat = seen.attention, normed.flatten(0, 1)
    projected = [
        attention.queries(flat) * attention.scale,
        seen.project_keys(flat, flat.shape[1]),
        attention.split_heads(linear(flat, attention.value.weight)),
    ]
    own = [part.unflatten(0, normed.shape[:2]) for part in projected]

    def attend(rows: slice, shape: tuple[int, int], kernel: str | None) -> Tensor:
        query, key, u = (part[rows].unflatten(0, shape).movedim(2, 0) for part in own)
        return _attend(seen, query, key, u, grid, kernel).flatten(1, 2).transpose(0, 1)

    if not null:
        return attend(slice(None), grid, kernel)
    return torch.cat([attend(slice(1), (1, 1), None), attend(slice(1, None), grid, kernel)])


def _attend(
    seen: Seen,
    query: Float[Tensor, "b y x r k d"],
    own_key: Float[Tensor, "b y x r k d"],
    own_u: Float[Tensor, "b y x r k d"],
    grid: tuple[int, int],
    kernel: str | None,
) -> Float[Tensor, "b y x r k d"]:
    """Return the heads of the readout tokens of each mask; without a kernel it keeps no patch."""
    prefix, bias = seen.prefix, seen.attention.bias
    scores, values = [], []
    for token in range(prefix):
        if token < seen.readers:
            key, u = own_key[:, :, :, token, None], own_u[:, :, :, token, None]
        else:
            key, u = seen.keys[:, None, None, token, None], seen.u[:, None, None, token, None]
        s = (query * key).sum(-1)
        scores.append(s if bias is None else s + bias[token])
        values.append((u, 1.0))
    if kernel is not None:
        window = kernel_window(kernel)
        levels = {1.0} if seen.linear_scores else {place.level for place in window}
        keys = {level: frame(_keys_at(seen, level), grid, window, 0.0) for level in levels}
        us = frame(seen.u[:, prefix:], grid, window, 0.0)
        position = (
            query.new_zeros(1, grid[0] * grid[1], 1, 1) if bias is None else bias[None, prefix:]
        )
        position = frame(position, grid, window, -math.inf)  # nothing lies beyond the border
        for place in window:
            key = shift(keys[1.0 if seen.linear_scores else place.level], place, grid, window)
            s = (query * key.unsqueeze(3)).sum(-1)
            s = place.level * s if seen.linear_scores else s
            scores.append(s + shift(position, place, grid, window))
            values.append((shift(us, place, grid, window).unsqueeze(3), place.level))
    scores.append(_score_outside(seen, query, grid, kernel))
    weights = torch.stack(torch.broadcast_tensors(*scores)).softmax(dim=0).unsqueeze(-1)
    heads = seen.v_0[:, :, None, None]
    for a, (u, level) in zip(weights[:-1], values, strict=True):
        heads = torch.addcmul(heads, a, u, value=level)
    return heads


def _keys_at(seen: Seen, level: float) -> Float[Tensor, "b n k d"]:
    """Return the keys of the patches at a level."""
    return (
        seen.keys[:, seen.prefix :] if level == 1.0 else seen.project_keys(seen.patches(level), 0)
    )


def _score_outside(
    seen: Seen, query: Float[Tensor, "b y x r k d"], grid: tuple[int, int], kernel: str | None
) -> Float[Tensor, "#b y x #r #k"]:
    """Return log Σ exp(score) over the patches outside each mask's window, which are at level 0."""
    attention, (height, width) = seen.attention, grid
    bias = None if attention.bias is None else attention.bias[seen.prefix :]
    if not seen.linear_scores and attention.rotate is not None:
        return _score_outside_one_by_one(seen, query, grid, kernel)
    if bias is None:
        outside = height * width - (window_sizes(grid, kernel) if kernel else 0)
        s = (
            torch.as_tensor(outside)
            .to(query)
            .log()
            .expand(query.shape[1:3])[None, :, :, None, None]
        )
    elif kernel is None:
        s = bias.logsumexp(0)[None, None, None]
    else:
        s = log_sum_outside(bias[None].unflatten(1, grid), kernel_window(kernel))
    if seen.linear_scores:
        return s
    return s + (query * seen.project_keys(seen.nothing, 0)).sum(-1)


def _score_outside_one_by_one(
    seen: Seen, query: Float[Tensor, "b y x r k d"], grid: tuple[int, int], kernel: str | None
) -> Float[Tensor, "b y x r k"]:
    """Return what `_score_outside` does, if each patch has another key at level 0."""
    height, width = grid
    keys = seen.project_keys(seen.nothing.expand(1, height * width, -1), 0)[0]
    bias = seen.attention.bias
    rows = []
    for y in range(query.shape[1]):  # one row of masks after the other, to save memory
        s = torch.einsum("bxrkd,nkd->bxrkn", query[:, y], keys)
        if bias is not None:
            s = s + bias[seen.prefix :].permute(1, 2, 0)
        if kernel is not None:
            row = range(y * width, (y + 1) * width)
            kept = mask_matrix(grid, Masking(kernel), prefix_tokens=0, patches=row) > 0
            s = s.masked_fill(torch.from_numpy(kept).to(s.device)[:, None, None], -math.inf)
        rows.append(s.logsumexp(-1))
    return torch.stack(rows, dim=1)
