"""What the masks of one block read: its tokens, keys, values and scores, each computed once.

The letters of the shapes are those of `closed_form`.
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from vit_reciprocam.core.split import ReadoutBlock, widen

__all__ = ["Seen", "add_bias"]


class Seen:
    """A block as its masks see it: every token at level 1, at level 0 and at those in between.

    Attributes:
        block: The block.
        attention: Its attention.
        readers: Number of readout tokens.
        prefix: Number of tokens before the patches.
        layer: Place at which tokens are masked, one of `LAYERS`.
        full: Unmasked tokens, which have level 1: (b, t, D).
        nothing: Any token at level 0: (1, 1, D).
        linear: Whether tokens at a level are that level times the unmasked ones. They are not if
            the block's input is masked, since the norm comes after the mask.
    """

    def __init__(self, block: ReadoutBlock, readers: int, prefix: int, layer: str) -> None:
        """Look at a block; the arguments are the attributes of these names."""
        self.block = block
        self.attention = block.attention
        self.readers = readers
        self.prefix = prefix
        self.layer = layer
        self.full = block.norm(block.x)
        self.linear = layer != "block"
        self.nothing = torch.zeros_like((self.full if self.linear else block.x)[:1, :1])
        if not self.linear:
            self.nothing = block.norm(self.nothing)

    def patches(self, level: float) -> Float[Tensor, "b n D"]:
        """Return the patches at a level."""
        if self.linear:
            return level * self.full[:, self.prefix :]
        return self.block.norm(level * self.block.x[:, self.prefix :])

    @property
    def linear_scores(self) -> bool:
        """Whether scores scale with the level, up to a constant for each query.

        A key norm undoes the scale, and a rotated bias differs from patch to patch, so it is not a
        constant.
        """
        attention = self.attention
        rotated_bias = attention.rotate is not None and attention.key.bias is not None
        return self.linear and attention.key_norm is None and not rotated_bias

    @functools.cached_property
    def v_0(self) -> Float[Tensor, "1 1 k d"]:
        """Value of any token at level 0."""
        return widen(self.attention.split_heads(self.attention.value(self.nothing)))

    @functools.cached_property
    def u(self) -> Float[Tensor, "b t k d"]:
        """Relative values u_1 = v_1 - v_0 of all tokens, unmasked."""
        if self.block.projected is None:
            return self.relative_values(self.full)
        values = self.block.projected[1]
        bias = self.attention.value.bias
        return widen(self.attention.split_heads(values if bias is None else values - bias))

    def relative_values(self, at_level: Float[Tensor, "b t D"]) -> Float[Tensor, "b t k d"]:
        """Return u for tokens at a level; the bias is in both v_l and v_0, so it drops out."""
        change = at_level if self.linear else at_level - self.nothing
        return widen(self.attention.split_heads(linear(change, self.attention.value.weight)))

    @functools.cached_property
    def keys(self) -> Float[Tensor, "b t k d"]:
        """Keys of all tokens, unmasked, as `project_keys` returns them."""
        joined = self.block.projected and self.block.projected[0]
        if joined is not None and self.linear_scores and self.attention.key.bias is not None:
            joined = joined - self.attention.key.bias
        return self.project_keys(self.full, self.prefix, joined)

    def project_keys(
        self, tokens: Float[Tensor, "b t D"], prefix: int, joined: Tensor | None = None
    ) -> Float[Tensor, "b t k d"]:
        """Return the keys of tokens, of which all after the first `prefix` are rotated.

        If rotation is used, these must be all patches. If scores are linear, keys lack their bias,
        which adds the same to all scores of a query; the score of a token at level 0 is then 0.
        `joined` is what the projection gives, if that is known.
        """
        attention = self.attention
        if joined is None and self.linear_scores:
            joined = linear(tokens, attention.key.weight)
        elif joined is None:
            joined = attention.key(tokens)
        keys = attention.split_heads(joined)
        if attention.key_norm is not None:
            keys = attention.key_norm(keys)
        if attention.rotate is not None and keys.shape[1] > prefix:
            keys = torch.cat([keys[:, :prefix], attention.rotate(keys[:, prefix:])], dim=1)
        return keys

    @functools.cached_property
    def s_1(self) -> Float[Tensor, "b t r k"]:
        """Scores of all tokens for the unmasked readout tokens, before the bias of positions."""
        query = self.attention.queries(self.full[:, : self.readers])
        return self.scores(query, self.full, self.prefix)

    def scores(
        self, query: Float[Tensor, "b r k d"], tokens: Float[Tensor, "b t D"], prefix: int
    ) -> Float[Tensor, "b t r k"]:
        """Return the scores of tokens before the bias of positions.

        They are those of `project_keys`. Without a key norm or rotation, q · W f = (Wᵀ q) · f.
        There are few queries, so the right side is far cheaper than the keys of all tokens.
        """
        attention = self.attention
        if attention.key_norm is None and attention.rotate is None:
            weight = attention.key.weight.unflatten(0, (attention.heads, -1))
            folded = torch.einsum("brkd,kdD->brkD", query, weight) * attention.scale
            return widen(torch.einsum("brkD,btD->btrk", folded, tokens))
        key = self.project_keys(tokens, prefix)
        return widen(torch.einsum("brkd,btkd->btrk", query.to(key.dtype), key) * attention.scale)


def add_bias(s: Tensor, bias: Tensor | None) -> Tensor:
    """Return scores (b, t or 1, r, k) with what the tokens' positions add to them."""
    return s if bias is None else s + bias
