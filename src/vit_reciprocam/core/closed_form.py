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

If masks act in several blocks, the first of these is as above. In the later ones each mask has
readout tokens of its own, and so its own queries: `own_queries` has that sum.

Letters of the shapes: b image, t any token, p prefix token, n patch, y x grid, r readout token,
k head, d its width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vit_reciprocam.core.masks import Masking, kernel_window, window_sizes
from vit_reciprocam.core.own_queries import attend_with_own_queries
from vit_reciprocam.core.seen import Seen, add_bias
from vit_reciprocam.core.split import Cut, MeanPool, ReadoutBlock
from vit_reciprocam.core.stencil import frame, log_sum_outside, shift

__all__ = ["STENCIL", "Attend", "Parts", "closed_form_rows"]


def closed_form_rows(
    cut: Cut,
    prefix_tokens: int,
    maskings: Sequence[Masking],
    *,
    null: bool = False,
    rows_at_once: int | None = None,
    attend: Attend | None = None,
) -> Callable[[int, int], Tensor]:
    """Return a function from (start, stop) to the logits (stop - start, B, C) of those rows.

    Row 0 is the unmasked image. Then follow, for each masking in turn, the row of the all-null
    mask, which keeps no patch, if `null`, and one row per patch's mask. Maskings may differ in all
    but the layer; what they read is computed once for all of them. The cut's `readout` must not be
    None, and must hold the earlier blocks that the largest depth needs. At most `rows_at_once` rows
    run through the end of an earlier block at once. `attend` is `STENCIL` if it is not given.
    """
    readout, attend = cut.readout, attend or STENCIL
    assert readout is not None
    if isinstance(readout, MeanPool):
        means = _means(cut, prefix_tokens, maskings, null)
        return lambda start, stop: readout.finish(means[start:stop])
    depth = max(masking.depth for masking in maskings)
    last = ReadoutBlock(cut.x, cut.norm, readout.attention, readout.finish)
    streams: dict[Masking, Tensor] = {}  # what the block before gives for a masking's rows
    for blocks_left, block in zip(
        range(depth, 0, -1), [*readout.earlier, last][-depth:], strict=True
    ):
        seen = Seen(block, readout.tokens, prefix_tokens, maskings[0].layer)
        masked = [masking for masking in maskings if masking.depth >= blocks_left]
        inputs = [
            _attend_under_masks(seen, masking, streams.get(masking), cut.grid, null, attend)
            for masking in masked
        ]
        if blocks_left == 1:  # before the last block, row 0 is the plain pass
            inputs.insert(0, _attend_unmasked(seen, attend))
        heads, normed, skip = (torch.cat(rows) for rows in zip(*inputs, strict=True))
        if blocks_left > 1:
            chunks = (rows.split(rows_at_once or len(rows)) for rows in (heads, normed, skip))
            y = torch.cat([block.finish(*chunk) for chunk in zip(*chunks, strict=True)])
            lengths = [len(rows) for rows, _, _ in inputs]
            streams = dict(zip(masked, y.split(lengths), strict=True))
    return lambda start, stop: readout.finish(
        heads[start:stop], normed[start:stop], skip[start:stop]
    )


def _means(
    cut: Cut, prefix: int, maskings: Sequence[Masking], null: bool
) -> Float[Tensor, "rows b D"]:
    """Return the mean of the tokens in row 0 and under every mask: another small stencil."""
    tokens = cut.norm(cut.x)
    sums = [tokens.sum(dim=1)[None]]
    for masking in maskings:
        window = kernel_window(masking.kernel)
        framed = frame(tokens[:, prefix:, None], cut.grid, window, 0.0)
        kept = [place.level * shift(framed, place, cut.grid, window) for place in window]
        rows = torch.stack(kept).sum(dim=0).flatten(3).flatten(1, 2).transpose(0, 1)
        if null:
            rows = torch.cat([torch.zeros_like(rows[:1]), rows])
        sums.append(rows + tokens[:, :prefix].sum(dim=1) if masking.class_token else rows)
    return torch.cat(sums) / tokens.shape[1]


def _attend_unmasked(seen: Seen, attend: Attend) -> tuple[Tensor, Tensor, Tensor]:
    """Return the heads, F and X of the readout tokens in row 0: (1, b, r, …) each."""
    s = add_bias(seen.s_1, seen.attention.bias)
    full = seen.full
    heads = attend.unmasked(seen.v_0, seen.u, s).flatten(-2).to(full.dtype)
    return heads, full[None, :, : seen.readers], seen.block.x[None, :, : seen.readers]


def _attend_under_masks(
    seen: Seen,
    masking: Masking,
    stream: Float[Tensor, "rows b r D"] | None,
    grid: tuple[int, int],
    null: bool,
    attend: Attend,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the heads, F and X of the readout tokens under every mask: (rows, b, r, …) each.

    `stream` is what the block before gave for these rows; None in the first masked block.
    """
    full = seen.full
    if stream is not None and masking.class_token:
        normed = seen.block.norm(stream.flatten(0, 1)).unflatten(0, stream.shape[:2])
        heads = attend_with_own_queries(seen, normed, grid, masking.kernel, null)
        return heads.flatten(-2), normed, stream
    # all masks share one query, at level 1 or, with the class token off, at level 0
    heads = attend.masked(_parts(seen, grid, masking), grid, masking.kernel, null)
    heads = heads.flatten(-2).to(full.dtype)
    rows, readers = (len(heads), -1, -1, -1), slice(seen.readers)
    normed = full[:, readers] if masking.class_token else seen.nothing.expand_as(full[:, readers])
    if stream is None:
        skip = seen.block.x[:, readers]
        if seen.layer == "block" and not masking.class_token:
            skip = torch.zeros_like(skip)
        stream = skip.expand(rows)
    return heads, normed.expand(rows), stream


@dataclass(frozen=True)
class Parts:
    """What the readout tokens' joined heads are made of, under every mask.

    Attributes:
        v_0: Value of any token at level 0: (1, 1, k, d).
        u: Relative values u_1 = v_1 - v_0 of all tokens, unmasked: (b, t, k, d).
        u_levels: Relative values of the patches at each level: level -> (b, n, k, d).
            If `linear`, only level 1.0 is there.
        linear: Whether relative values at a level are that level times those at level 1.
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
    s_prefix: Tensor
    s_levels: dict[float, Tensor]
    s_outside: Tensor
    prefix: bool


def _parts(seen: Seen, grid: tuple[int, int], masking: Masking) -> Parts:
    """Return the scores and values of all tokens, at every level that a mask gives them."""
    attention, prefix = seen.attention, seen.prefix
    levels = sorted({place.level for place in kernel_window(masking.kernel)})
    prefix_bias = None if attention.bias is None else attention.bias[:prefix]
    patch_bias = None if attention.bias is None else attention.bias[prefix:]

    def nothing(count: int) -> Tensor:
        return seen.nothing.expand(seen.full.shape[0], count, -1)

    if seen.linear:
        u_levels = {1.0: seen.u[:, prefix:]}
    else:
        u_levels = {level: seen.relative_values(seen.patches(level)) for level in levels}

    readers = seen.full[:, : seen.readers]
    if masking.class_token:
        query = attention.queries(readers)
        s_1 = seen.s_1
        s_prefix = s_1[:, :prefix]
    else:
        # the readout tokens are masked as well, so their queries are those of level 0
        query = attention.queries(seen.nothing.expand_as(readers))
        s_1 = seen.scores(query, seen.full, prefix)
        s_prefix = seen.scores(query, nothing(prefix), prefix)
    s_levels = {
        level: level * s_1[:, prefix:]
        if seen.linear_scores
        else seen.scores(query, seen.patches(level), 0)
        for level in levels
    }
    if seen.linear_scores:
        s_outside = torch.zeros_like(s_1[:, :1])
    else:
        patches = grid[0] * grid[1] if attention.rotate is not None else 1
        s_outside = seen.scores(query, nothing(patches), 0)
    return Parts(
        v_0=seen.v_0,
        u=seen.u,
        u_levels=u_levels,
        linear=seen.linear,
        s_prefix=add_bias(s_prefix, prefix_bias),
        s_levels={level: add_bias(s_level, patch_bias) for level, s_level in s_levels.items()},
        s_outside=add_bias(s_outside, patch_bias),
        prefix=masking.class_token,
    )


class Attend(NamedTuple):
    """The two functions that compute the readout tokens' heads.

    Attributes:
        unmasked: v_0 (1, 1, k, d), u (b, t, k, d) and scores (b, t, r, k) of all tokens -> heads
            (1, b, r, k, d) of the unmasked image.
        masked: Parts, grid, kernel, and whether the all-null mask comes first -> heads
            (rows, b, r, k, d) under every mask.
    """

    unmasked: Callable[[Tensor, Tensor, Tensor], Tensor]
    masked: Callable[[Parts, tuple[int, int], str, bool], Tensor]


def _attend_to_all(
    v_0: Float[Tensor, "1 1 k d"], u: Float[Tensor, "b t k d"], s: Float[Tensor, "b t r k"]
) -> Float[Tensor, "1 b r k d"]:
    """Return the readout tokens' heads for row 0, by ordinary attention."""
    return (v_0 + torch.einsum("btrk,btkd->brkd", s.softmax(dim=1), u)).unsqueeze(0)


def _attend_by_stencil(
    parts: Parts, grid: tuple[int, int], kernel: str, null: bool
) -> Float[Tensor, "rows b r k d"]:
    """Return the readout tokens' heads under every mask."""
    window = kernel_window(kernel)
    prefix = parts.s_prefix.shape[1]
    weights = _masked_weights(parts, grid, kernel).unsqueeze(-1).unbind(0)
    v_0 = parts.v_0[:, :, None, None]  # (b, y, x, r, k, d)
    rows = v_0
    if parts.prefix:
        for a, u in zip(weights[:prefix], parts.u[:, :prefix].unbind(1), strict=True):
            rows = torch.addcmul(rows, a, u[:, None, None, None])
    framed = {level: frame(u, grid, window, 0.0) for level, u in parts.u_levels.items()}
    for a, place in zip(weights[prefix:-1], window, strict=True):
        level, factor = (1.0, place.level) if parts.linear else (place.level, 1.0)
        u = shift(framed[level], place, grid, window)
        rows = torch.addcmul(rows, a, u.unsqueeze(3), value=factor)
    rows = rows.flatten(1, 2).transpose(0, 1)
    return torch.cat([_attend_to_none(parts, grid), rows]) if null else rows


def _attend_to_none(parts: Parts, grid: tuple[int, int]) -> Float[Tensor, "1 b r k d"]:
    """Return the readout tokens' heads under the all-null mask: all patches are at level 0."""
    s_outside = parts.s_outside.expand(-1, grid[0] * grid[1], -1, -1).logsumexp(1, keepdim=True)
    s_outside = s_outside.expand(len(parts.u), -1, -1, -1)
    prefix = parts.s_prefix.shape[1]
    a = torch.cat([parts.s_prefix, s_outside], dim=1).softmax(dim=1)[:, :prefix]
    rows = parts.v_0.expand(len(a), a.shape[2], -1, -1)
    if parts.prefix:
        rows = rows + torch.einsum("bprk,bpkd->brkd", a, parts.u[:, :prefix])
    return rows.unsqueeze(0)


STENCIL = Attend(_attend_to_all, _attend_by_stencil)
"""The form that is fast in PyTorch: sums over a small stencil of the grid."""


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
