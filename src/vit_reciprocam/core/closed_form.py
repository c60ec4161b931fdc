"""The closed form: H for all masks at once, exact if the head reads only a few tokens.

If the head reads prefix tokens only, no other token's query matters in the last block. Each mask is
then one ordinary attention row over masked keys and values, and a patch's key and value depend only
on its level in the mask: one of the kernel's few weights inside the window, 0 outside.

A token at level 0 has the same value v_0 wherever it stands. Since attention weights sum to 1, with
u_l = v_l - v_0,

    o_n = v_0 + Σ over the prefix and the window of mask n:  a_n[t] u_l[t].

The patches outside are counted in the softmax's denominator and appear nowhere else, so the cost is
that of a small stencil over the grid. Nothing that was added is subtracted again, so no digits
cancel.

Letters of the shapes: b image, t any token, p prefix token, n patch, y x grid, r readout token,
k head, d its width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from vit_reciprocam.core.masks import Masking, kernel_window, window_sizes
from vit_reciprocam.core.split import Attention, Cut, MeanPool, Readout, widen
from vit_reciprocam.core.stencil import frame, log_sum_outside, shift

__all__ = ["Parts", "closed_form_rows"]


def closed_form_rows(
    cut: Cut,
    prefix_tokens: int,
    masking: Masking,
    *,
    attend: Callable[[Parts, tuple[int, int], str], Tensor] | None = None,
) -> Callable[[int, int], Tensor]:
    """Return a function from (start, stop) to the logits (stop - start, B, C) of those rows.

    Row 0 is the unmasked image, row 1 + n the image under mask n. The cut's `readout` must not be
    None. `attend`, a function of parts, grid and kernel, returns the readout tokens' heads
    (rows, b, r, k, d) for row 0 and every mask; the default is the form that is fast in PyTorch.
    """
    readout = cut.readout
    assert readout is not None
    if isinstance(readout, MeanPool):
        means = _means(cut, prefix_tokens, masking)
        return lambda start, stop: readout.finish(means[start:stop])
    tokens = _tokens(cut, prefix_tokens, masking)
    parts = _parts(readout, tokens, cut.grid, masking)
    heads = (attend or _attend)(parts, cut.grid, masking.kernel).flatten(-2).to(tokens.full.dtype)
    normed = tokens.full[:, : readout.tokens].expand(heads.shape[0], -1, -1, -1)
    skip = cut.x[:, : readout.tokens].expand(heads.shape[0], -1, -1, -1)
    if not masking.class_token:
        normed = torch.cat([normed[:1], tokens.nothing.expand_as(normed[1:])])
        if masking.layer == "block":
            skip = torch.cat([skip[:1], torch.zeros_like(skip[1:])])
    return lambda start, stop: readout.finish(
        heads[start:stop], normed[start:stop], skip[start:stop]
    )


def _means(cut: Cut, prefix: int, masking: Masking) -> Float[Tensor, "rows b D"]:
    """Return the mean of the tokens in row 0 and under every mask: another small stencil."""
    tokens, window = cut.norm(cut.x), kernel_window(masking.kernel)
    framed = frame(tokens[:, prefix:, None], cut.grid, window, 0.0)
    rows = torch.stack([place.level * shift(framed, place, cut.grid, window) for place in window])
    sums = rows.sum(dim=0).flatten(3).flatten(1, 2).transpose(0, 1)
    if masking.class_token:
        sums = sums + tokens[:, :prefix].sum(dim=1)
    return torch.cat([tokens.sum(dim=1)[None], sums]) / tokens.shape[1]


@dataclass(frozen=True)
class _Tokens:
    """The tokens that the attention sees, at every level of a mask.

    Attributes:
        full: Unmasked tokens, which have level 1: (b, t, D).
        nothing: Any token at level 0: (1, 1, D).
        patches: Function of a level that returns the patches at that level, (b, n, D).
        linear: Whether patches(level) equals level * patches(1).
        prefix: Number of tokens before the patches.
    """

    full: Tensor
    nothing: Tensor
    patches: Callable[[float], Tensor]
    linear: bool
    prefix: int


def _tokens(cut: Cut, prefix: int, masking: Masking) -> _Tokens:
    """Return the tokens at every level; if the block's input is masked, the norm comes after."""
    full = cut.norm(cut.x)
    if masking.layer != "block":
        patches = full[:, prefix:]
        return _Tokens(
            full, torch.zeros_like(full[:1, :1]), lambda level: level * patches, True, prefix
        )
    patches, nothing = cut.x[:, prefix:], cut.norm(torch.zeros_like(cut.x[:1, :1]))
    return _Tokens(full, nothing, lambda level: cut.norm(level * patches), False, prefix)


@dataclass(frozen=True)
class Parts:
    """What the readout tokens' joined heads are made of, for row 0 and under every mask.

    Attributes:
        v_0: Value of any token at level 0: (1, 1, k, d).
        u: Relative values u_1 = v_1 - v_0 of all tokens, unmasked: (b, t, k, d).
        u_levels: Relative values of the patches at each level: level -> (b, n, k, d).
            If `linear`, only level 1.0 is there.
        linear: Whether relative values at a level are that level times those at level 1.
        s: Scores of all tokens, unmasked, for row 0: (b, t, r, k).
        s_prefix: Scores of the prefix under the masks: (b, p, r, k).
        s_levels: Scores of the patches at each level: level -> (b, n, r, k).
        s_outside: Scores of the patches at level 0, (b or 1, 1 or n, r, k): one for all patches,
            unless their position matters.
        prefix: Whether the masks keep the prefix, at level 1.
    """

    v_0: Tensor
    u: Tensor
    u_levels: dict[float, Tensor]
    linear: bool
    s: Tensor
    s_prefix: Tensor
    s_levels: dict[float, Tensor]
    s_outside: Tensor
    prefix: bool


def _parts(readout: Readout, tokens: _Tokens, grid: tuple[int, int], masking: Masking) -> Parts:
    """Return the scores and values of all tokens, at every level that a mask gives them."""
    attention, prefix = readout.attention, tokens.prefix
    levels = sorted({place.level for place in kernel_window(masking.kernel)})
    prefix_bias = None if attention.bias is None else attention.bias[:prefix]
    patch_bias = None if attention.bias is None else attention.bias[prefix:]
    rotated = attention.rotate is not None
    # Scores scale with the level if the keys do, up to a constant for each query. A key norm undoes
    # the scale, and a rotated bias differs from patch to patch, so it is not constant.
    linear_scores = (
        tokens.linear
        and attention.key_norm is None
        and not (rotated and attention.key.bias is not None)
    )

    def relative_value(at_level: Tensor) -> Tensor:
        # the bias is in both v_l and v_0, so it drops out of their difference
        change = at_level if tokens.linear else at_level - tokens.nothing
        return widen(_heads(attention, linear(change, attention.value.weight)))

    def nothing(count: int) -> Tensor:
        return tokens.nothing.expand(tokens.full.shape[0], count, -1)

    u = relative_value(tokens.full)
    if tokens.linear:
        u_levels = {1.0: u[:, prefix:]}
    else:
        u_levels = {level: relative_value(tokens.patches(level)) for level in levels}

    readers = tokens.full[:, : readout.tokens]
    query = _query(attention, readers)
    s_1 = _scores(attention, query, tokens.full, prefix)  # at level 1, before the bias
    s = _biased(s_1, attention.bias)
    if masking.class_token:
        s_prefix = s_1[:, :prefix]
    else:
        # the readout tokens are masked as well, so their queries are those of level 0
        query = _query(attention, tokens.nothing.expand_as(readers))
        s_1 = _scores(attention, query, tokens.full, prefix)
        s_prefix = _scores(attention, query, nothing(prefix), prefix)
    s_levels = {
        level: level * s_1[:, prefix:]
        if linear_scores
        else _scores(attention, query, tokens.patches(level), 0)
        for level in levels
    }
    if linear_scores:
        s_outside = torch.zeros_like(s_1[:, :1])
    else:
        s_outside = _scores(attention, query, nothing(grid[0] * grid[1] if rotated else 1), 0)
    return Parts(
        v_0=widen(_heads(attention, attention.value(tokens.nothing))),
        u=u,
        u_levels=u_levels,
        linear=tokens.linear,
        s=s,
        s_prefix=_biased(s_prefix, prefix_bias),
        s_levels={level: _biased(s_level, patch_bias) for level, s_level in s_levels.items()},
        s_outside=_biased(s_outside, patch_bias),
        prefix=masking.class_token,
    )


def _attend(parts: Parts, grid: tuple[int, int], kernel: str) -> Float[Tensor, "rows b r k d"]:
    """Return the readout tokens' heads for row 0, by ordinary attention, and for every mask."""
    window = kernel_window(kernel)
    row_0 = parts.v_0 + torch.einsum("btrk,btkd->brkd", parts.s.softmax(dim=1), parts.u)
    prefix = parts.s_prefix.shape[1]
    weights = _masked_weights(parts, grid, kernel).unsqueeze(-1).unbind(0)
    rows = parts.v_0[:, :, None, None]  # (b, y, x, r, k, d)
    if parts.prefix:
        for a, u in zip(weights[:prefix], parts.u[:, :prefix].unbind(1), strict=True):
            rows = torch.addcmul(rows, a, u[:, None, None, None])
    framed = {level: frame(u, grid, window, 0.0) for level, u in parts.u_levels.items()}
    for a, place in zip(weights[prefix:-1], window, strict=True):
        level, factor = (1.0, place.level) if parts.linear else (place.level, 1.0)
        u = shift(framed[level], place, grid, window)
        rows = torch.addcmul(rows, a, u.unsqueeze(3), value=factor)
    return torch.cat([row_0.unsqueeze(0), rows.flatten(1, 2).transpose(0, 1)])


def _masked_weights(
    parts: Parts, grid: tuple[int, int], kernel: str
) -> Float[Tensor, "entries b y x r k"]:
    """Return the attention weights under each mask: of prefix, window places and the rest.

    The softmax is over these few entries. A place beyond the border has the score -inf. The patches
    outside the window share one value, so they are one entry, the log of the sum of their exp(s).
    """
    window = kernel_window(kernel)
    s_levels = {level: frame(s, grid, window, float("-inf")) for level, s in parts.s_levels.items()}
    if parts.s_outside.shape[1] == 1:
        count = torch.from_numpy(grid[0] * grid[1] - window_sizes(grid, kernel))
        s_outside = parts.s_outside[:, None] + count.to(parts.s_outside).log()[:, :, None, None]
    else:
        s_outside = log_sum_outside(parts.s_outside.unflatten(1, grid), window)
    entries = [
        *parts.s_prefix[:, None, None].unbind(3),
        *(shift(s_levels[place.level], place, grid, window) for place in window),
        s_outside,
    ]
    return torch.stack(torch.broadcast_tensors(*entries)).softmax(dim=0)


def _biased(s: Tensor, bias: Tensor | None) -> Tensor:
    """Return scores (b, t or 1, r, k) with what the tokens' positions add to them."""
    return s if bias is None else s + bias


def _heads(attention: Attention, joined: Tensor) -> Tensor:
    """Split joined heads (..., k * d) into (..., k, d)."""
    return joined.view(*joined.shape[:-1], attention.heads, -1)


def _query(attention: Attention, tokens: Tensor) -> Tensor:
    """Return the queries (b, r, k, d) of readout tokens (b, r, D)."""
    return attention.query_norm(_heads(attention, attention.query(tokens)))


def _scores(
    attention: Attention,
    query: Float[Tensor, "b r k d"],
    tokens: Float[Tensor, "b t D"],
    prefix: int,
) -> Float[Tensor, "b t r k"]:
    """Return attention scores without the bias, up to a constant for each query.

    Without a key norm or rotation, q · (W f + bias) = (Wᵀ q) · f + constant. There are few queries,
    so the right side is far cheaper than the keys of all tokens. The first `prefix` tokens are not
    rotated; the others must be all patches if rotation is used.
    """
    if attention.key_norm is None and attention.rotate is None:
        weight = attention.key.weight.unflatten(0, (attention.heads, -1))
        folded = torch.einsum("brkd,kdD->brkD", query, weight) * attention.scale
        return widen(torch.einsum("brkD,btD->btrk", folded, tokens))
    key = _heads(attention, attention.key(tokens))
    if attention.key_norm is not None:
        key = attention.key_norm(key)
    if attention.rotate is not None and key.shape[1] > prefix:
        key = torch.cat([key[:, :prefix], attention.rotate(key[:, prefix:])], dim=1)
    return widen(torch.einsum("brkd,btkd->btrk", query.to(key.dtype), key) * attention.scale)
