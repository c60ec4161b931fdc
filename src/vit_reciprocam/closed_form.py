"""The closed form: H for all masks at once, exact where few tokens ask in the last attention.

Where the head reads prefix tokens only, no other token's query matters in the last block, so each
mask is one ordinary attention row over other keys and values, and a patch's key and value depend on
its level in the mask alone: the few weights of the kernel inside the window, 0 outside.

A token at level 0 has the same value v_0 wherever it stands. Since attention weights sum to 1, with
u_l = v_l - v_0,

    o_n = v_0 + Σ over the prefix and the window of mask n:  a_n[t] u_l[t].

The patches outside are counted in the softmax's denominator and appear nowhere else, so the cost is
that of a small stencil over the grid. Nothing is subtracted that was added before, so nothing
cancels.

Letters of the shapes: b image, t any token, p prefix token, n patch, y x grid, r readout token,
k head, d its width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear, pad

from vit_reciprocam.masks import Masking, Place, kernel_window, window_sizes
from vit_reciprocam.split import Attention, Split

__all__ = ["closed_form_rows"]


def closed_form_rows(
    split: Split, x: Float[Tensor, "B T D"], grid: tuple[int, int], masking: Masking
) -> Callable[[int, int], Tensor]:
    """Prepare all masks; a function from (start, stop) to the logits of those rows.

    Row 0 is unmasked, row 1 + n under mask n; the function gives (stop - start, B, C).

    Args:
        split: A split whose `direct_because` is empty.
        x: The residual stream that enters the last block.
        grid: Patch grid (h, w).
        masking: What to keep, and where to cut.
    """
    heads = _readout_attention(split, x, grid, masking)
    skip = x[:, : split.readout].expand(len(heads), -1, -1, -1)
    if masking.layer == "block" and not masking.class_token:
        skip = torch.cat([skip[:1], torch.zeros_like(skip[1:])])
    return lambda start, stop: split.finish(heads[start:stop], skip[start:stop])


@dataclass(frozen=True)
class _Tokens:
    """The tokens that the last attention sees, at every level of a mask.

    Attributes:
        full: (b, t, D), as they are: level 1.
        nothing: (1, 1, D), any token at level 0.
        patches: Level -> (b, n, D).
        linear: Whether patches(level) is level * patches(1).
    """

    full: Tensor
    nothing: Tensor
    patches: Callable[[float], Tensor]
    linear: bool


def _tokens(split: Split, x: Tensor, masking: Masking) -> _Tokens:
    full, nothing = split.norm(x), torch.zeros_like(x[:1, :1])
    if masking.layer == "norm1":
        patches = full[:, split.prefix_tokens :]
        return _Tokens(full, nothing, lambda level: level * patches, linear=True)
    patches = x[:, split.prefix_tokens :]
    return _Tokens(
        full, split.norm(nothing), lambda level: split.norm(level * patches), linear=False
    )


def _readout_attention(
    split: Split, x: Float[Tensor, "b t D"], grid: tuple[int, int], masking: Masking
) -> Float[Tensor, "rows b r A"]:
    """The readout tokens' joined heads for row 0 and every mask."""
    attention = split.attention
    assert attention is not None, split.direct_because
    prefix, window = split.prefix_tokens, kernel_window(masking.kernel)
    levels = {place.level for place in window}
    tokens = _tokens(split, x, masking)

    def relative_value(some: Tensor) -> Tensor:
        some = some if tokens.linear else some - tokens.nothing
        return _widen(_heads(attention, linear(some, attention.value.weight)))

    # Row 0 is ordinary attention.
    v_0 = _widen(_heads(attention, attention.value(tokens.nothing)))
    u_1 = relative_value(tokens.full)
    query = _query(attention, tokens.full[:, : split.readout])
    s_1 = _scores(attention, query, tokens.full)
    row_0 = v_0 + torch.einsum("btrk,btkd->brkd", s_1.softmax(dim=1), u_1)

    # Attention weights under the masks: the prefix, the window's places, all patches outside.
    if not masking.class_token:
        query = _query(attention, tokens.nothing).expand_as(query)
        s_1 = _scores(attention, query, tokens.full)
    s_0 = _scores(attention, query, tokens.nothing.expand(x.shape[0], -1, -1))
    s_prefix = s_1[:, :prefix] if masking.class_token else s_0.expand(-1, prefix, -1, -1)
    if tokens.linear and attention.key_norm is None:
        s_levels = {level: level * s_1[:, prefix:] for level in levels}
    else:
        s_levels = {level: _scores(attention, query, tokens.patches(level)) for level in levels}
    outside = torch.from_numpy(grid[0] * grid[1] - window_sizes(grid, masking.kernel))
    s_outside = s_0[:, None] + outside.to(s_0).log()[:, :, None, None]  # of their sum
    s_levels = {level: _framed(s, grid, window, float("-inf")) for level, s in s_levels.items()}
    s_every = [
        *s_prefix[:, None, None].unbind(3),
        *(_moved(s_levels[place.level], place, grid, window) for place in window),
        s_outside,
    ]
    a_every = torch.stack(torch.broadcast_tensors(*s_every)).softmax(dim=0).unsqueeze(-1).unbind(0)

    # The weighted sum of relative values.
    if tokens.linear:
        u_levels = dict.fromkeys(levels, _framed(u_1[:, prefix:], grid, window, 0.0))
    else:
        u_levels = {
            level: _framed(relative_value(tokens.patches(level)), grid, window, 0.0)
            for level in levels
        }
    rows = v_0[:, :, None, None]  # (b, y, x, r, k, d)
    if masking.class_token:
        for a, u in zip(a_every[:prefix], u_1[:, :prefix].unbind(1), strict=True):
            rows = torch.addcmul(rows, a, u[:, None, None, None])
    for a, place in zip(a_every[prefix:-1], window, strict=True):
        u = _moved(u_levels[place.level], place, grid, window)
        factor = place.level if tokens.linear else 1.0
        rows = torch.addcmul(rows, a, u.unsqueeze(3), value=factor)
    every_row = torch.cat([row_0.unsqueeze(0), rows.flatten(1, 2).transpose(0, 1)])
    return every_row.flatten(-2).to(x.dtype)


def _widen(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _heads(attention: Attention, joined: Tensor) -> Tensor:
    return joined.view(*joined.shape[:-1], attention.heads, -1)


def _query(attention: Attention, tokens: Tensor) -> Tensor:
    return attention.query_norm(_heads(attention, attention.query(tokens)))


def _scores(
    attention: Attention, query: Float[Tensor, "b r k d"], tokens: Float[Tensor, "b t D"]
) -> Float[Tensor, "b t r k"]:
    """Attention scores before the softmax, up to a constant of each query.

    Without a key norm q · (W f + bias) = (Wᵀ q) · f + constant: few queries make that far cheaper
    than all keys.
    """
    if attention.key_norm is not None:
        key = attention.key_norm(_heads(attention, attention.key(tokens)))
        return _widen(torch.einsum("brkd,btkd->btrk", query, key) * attention.scale)
    weight = attention.key.weight.unflatten(0, (attention.heads, -1))
    folded = torch.einsum("brkd,kdD->brkD", query, weight) * attention.scale
    return _widen(torch.einsum("brkD,btD->btrk", folded, tokens))


def _framed(
    patches: Tensor, grid: tuple[int, int], window: tuple[Place, ...], value: float
) -> Tensor:
    """Patches (b, n, …) as a grid with a margin, so that a window may look over the border."""
    margin = _margin(window)
    return pad(patches.unflatten(1, grid), (0, 0, 0, 0, *(margin,) * 4), value=value)


def _moved(
    framed: Tensor, place: Place, grid: tuple[int, int], window: tuple[Place, ...]
) -> Tensor:
    """For each patch (b, y, x, …), its neighbour at a place of the window."""
    margin = _margin(window)
    rows = framed.narrow(1, margin + place.down, grid[0])
    return rows.narrow(2, margin + place.right, grid[1])


def _margin(window: tuple[Place, ...]) -> int:
    return max(max(abs(place.down), abs(place.right)) for place in window)
