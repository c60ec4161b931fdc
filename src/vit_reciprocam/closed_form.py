"""The closed form: H for all masks at once, exact where the head reads prefix tokens only.

Then only the readout tokens' queries matter in the last block, so each mask is one ordinary
attention row over other keys and values, and a patch's key and value depend on its level in the
mask alone: the few weights of the kernel inside the window, 0 outside.

A token at level 0 is the same wherever it stands. So all patches outside a window share one key and
one value v_0, and since attention weights sum to 1, with u_l = v_l - v_0,

    o_n = v_0 + Σ over the prefix and the window of mask n:  a_n[t] u_l[t].

The patches outside are counted in the softmax's denominator and appear nowhere else, so the cost is
that of a small stencil over the grid. Nothing is subtracted that was added before, so nothing
cancels.
"""

from __future__ import annotations

from collections.abc import Callable

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

    Row 0 is unmasked, row 1 + n under mask n; the function gives (B, stop - start, C).

    Args:
        split: A split whose `direct_because` is empty.
        x: The residual stream that enters the last block.
        grid: Patch grid (h, w).
        masking: What to keep, and where to cut.
    """
    heads = _readout_attention(split, x, grid, masking)
    skip = x[:, None, : split.readout].expand(-1, heads.shape[1], -1, -1)
    if masking.layer == "block" and not masking.class_token:
        skip = torch.cat([skip[:, :1], torch.zeros_like(skip[:, 1:])], dim=1)
    return lambda start, stop: split.finish(heads[:, start:stop], skip[:, start:stop])


def _readout_attention(
    split: Split, x: Float[Tensor, "B T D"], grid: tuple[int, int], masking: Masking
) -> Float[Tensor, "B rows R A"]:
    """The readout tokens' joined heads for row 0 and every mask.

    Letters of the einsums: b image, t any token, p prefix token, r readout token, y x grid, k head,
    d its width.
    """
    attention = split.attention
    assert attention is not None, split.direct_because
    prefix, wide = split.prefix_tokens, torch.promote_types(x.dtype, torch.float32)
    window = kernel_window(masking.kernel)
    levels = {place.level for place in window}
    margin = max(max(abs(place.down), abs(place.right)) for place in window)
    cut_after_norm = masking.layer == "norm1"

    def score(query: Tensor, tokens: Tensor) -> Tensor:
        return _scores(attention, query, tokens).to(wide)

    def at_level(level: float) -> Tensor:
        return level * f_1[:, prefix:] if cut_after_norm else split.norm(level * x[:, prefix:])

    # Tokens as they are (level 1) and at level 0; their values relative to level 0.
    # Row 0 is ordinary attention.
    f_1 = split.norm(x)
    f_0 = torch.zeros_like(x[:, :1]) if cut_after_norm else split.norm(torch.zeros_like(x[:, :1]))
    v_0 = _heads(attention, attention.value(f_0)).to(wide)
    u_1 = _relative_values(attention, f_1 if cut_after_norm else f_1 - f_0).to(wide)
    query = _query(attention, f_1[:, : split.readout])
    s_1 = score(query, f_1)
    row_0 = v_0 + torch.einsum("btrk,btkd->brkd", s_1.softmax(dim=1), u_1)

    # Scores under the masks: of a patch outside the window, of the prefix, of each place inside.
    if not masking.class_token:
        query = _query(attention, f_0).expand_as(query)
        s_1 = score(query, f_1)
    if cut_after_norm and attention.key_norm is None:  # linear in the level
        s_outside = torch.zeros_like(s_1[:, :1])
        s_levels = {level: level * s_1[:, prefix:] for level in levels}
    else:
        s_outside = score(query, f_0)
        s_levels = {level: score(query, at_level(level)) for level in levels}
    if masking.class_token:
        s_prefix, u_prefix = s_1[:, :prefix], u_1[:, :prefix]
    else:
        s_prefix, u_prefix = s_outside.expand(-1, prefix, -1, -1), torch.zeros_like(u_1[:, :prefix])
    s_levels = {level: _framed(s, grid, margin, float("-inf")) for level, s in s_levels.items()}
    s_window = torch.stack(
        [_moved(s_levels[place.level], place, grid, margin) for place in window], dim=3
    )  # (b, y, x, place, r, k)

    outside = torch.from_numpy(grid[0] * grid[1] - window_sizes(grid, masking.kernel))
    a_prefix, a_window = _softmax(
        s_prefix[:, None, None],
        s_window,
        s_outside[:, None],
        outside.to(s_window)[:, :, None, None],
    )

    # The weighted sum of relative values.
    if cut_after_norm:  # linear in the level, which can as well scale the weights
        a_window *= a_window.new_tensor([place.level for place in window])[:, None, None]
        u_levels = dict.fromkeys(levels, _framed(u_1[:, prefix:], grid, margin, 0.0))
    else:
        u_levels = {
            level: _framed(_relative_values(attention, at_level(level) - f_0), grid, margin, 0.0)
            for level in levels
        }
    rows = v_0[:, :, None, None] + torch.einsum("byxprk,bpkd->byxrkd", a_prefix, u_prefix)
    for a, place in zip(a_window.unbind(3), window, strict=True):
        u = _moved(u_levels[place.level], place, grid, margin)
        rows.addcmul_(a.unsqueeze(-1), u.to(wide).unsqueeze(3))
    every_row = torch.cat([row_0.unsqueeze(1), rows.flatten(1, 2)], dim=1)
    return every_row.flatten(-2).to(x.dtype)


def _softmax(
    prefix: Float[Tensor, "b 1 1 p r k"],
    window: Float[Tensor, "b y x place r k"],
    outside: Float[Tensor, "b 1 1 r k"],
    count: Float[Tensor, "y x 1 1"],
) -> tuple[Float[Tensor, "b y x p r k"], Float[Tensor, "b y x place r k"]]:
    """Attention weights of prefix and window, where `count` patches outside share one score."""
    outside = outside.masked_fill(count == 0, float("-inf"))  # a small grid may have none
    peak = torch.maximum(torch.maximum(prefix.amax(3), outside), window.amax(3))
    e_prefix = (prefix - peak.unsqueeze(3)).exp()
    e_window = (window - peak.unsqueeze(3)).exp()
    e_outside = (outside - peak).exp() * count
    total = (e_prefix.sum(3) + e_window.sum(3) + e_outside).unsqueeze(3)
    return e_prefix / total, e_window / total


def _heads(attention: Attention, joined: Tensor) -> Tensor:
    return joined.view(*joined.shape[:-1], attention.heads, -1)


def _query(attention: Attention, tokens: Tensor) -> Tensor:
    return attention.query_norm(_heads(attention, attention.query(tokens)))


def _relative_values(attention: Attention, tokens: Tensor) -> Tensor:
    return _heads(attention, linear(tokens, attention.value.weight))


def _scores(
    attention: Attention, query: Float[Tensor, "b r k d"], tokens: Float[Tensor, "b t D"]
) -> Float[Tensor, "b t r k"]:
    """Attention scores before the softmax, up to a constant of each query.

    Without a key norm q · (W f + bias) = (Wᵀ q) · f + constant: few queries make that far cheaper
    than all keys.
    """
    if attention.key_norm is not None:
        key = attention.key_norm(_heads(attention, attention.key(tokens)))
        return torch.einsum("brkd,btkd->btrk", query, key) * attention.scale
    weight = attention.key.weight.unflatten(0, (attention.heads, -1))
    folded = torch.einsum("brkd,kdD->brkD", query, weight) * attention.scale
    return torch.einsum("brkD,btD->btrk", folded, tokens)


def _framed(tokens: Tensor, grid: tuple[int, int], margin: int, value: float) -> Tensor:
    """Patch tokens (b, N, …) as a grid with a margin, so that a window may look over the border."""
    return pad(tokens.unflatten(1, grid), (0, 0, 0, 0, *(margin,) * 4), value=value)


def _moved(framed: Tensor, place: Place, grid: tuple[int, int], margin: int) -> Tensor:
    """For each patch (b, h, w, …), its neighbour at a place of the window."""
    rows = framed.narrow(1, margin + place.down, grid[0])
    return rows.narrow(2, margin + place.right, grid[1])
