"""A classifier cut in two at its last encoder block: H(norm(X), X) with X = G(images).

Plain data and functions. An adapter fills a `Split` from a model; the method needs nothing else of
the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["Attention", "Projection", "Split"]


@dataclass(frozen=True)
class Projection:
    """A linear layer's parameters.

    Attributes:
        weight: (out, in).
        bias: (out,) or None.
    """

    weight: Tensor
    bias: Tensor | None

    def __call__(self, tokens: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch A"]:
        """Weight and bias applied to tokens."""
        return linear(tokens, self.weight, self.bias)


@dataclass(frozen=True)
class Attention:
    """The last block's self-attention up to the joined heads, before its output projection.

    softmax(query_norm(q) · key_norm(k) · scale) v, with q, k and v projected from the same tokens
    and split into `heads`; the norms act on (..., heads, head dimension), and `key_norm` is None
    where there is none.
    """

    heads: int
    scale: float
    query: Projection
    key: Projection
    value: Projection
    query_norm: Callable[[Tensor], Tensor]
    key_norm: Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class Split:
    """A model as the method sees it; a snapshot, made anew for each call so as not to go stale.

    Shapes: images B, patch grid h·w = N, prefix tokens P, all tokens T = P + N in the order prefix,
    patches row by row; width D, classes C, readout tokens R, joined heads A.

    Attributes:
        prefix_tokens: P: class, distillation and register tokens.
        readout: R, how many tokens from the first on the head reads; None if it reads them all.
        grid: Shape of an image batch -> (h, w). Raises `InputError` where the model cannot take
            that size.
        stem: G: images -> X (B, T, D), the residual stream that enters the last block.
        norm: X -> F (B, T, D), the block's first LayerNorm. Acts on each token alone.
        rest: H: (F, X) -> logits (B, C).
        attention: The block's attention where its parts are known, which the closed form needs.
        finish: Joined heads (n, B, R, A) and skip path (n, B, R, D) of the readout tokens -> logits
            (n, B, C).
        direct_because: Why the closed form does not hold; empty where it does.
    """

    prefix_tokens: int
    readout: int | None
    grid: Callable[[tuple[int, ...]], tuple[int, int]]
    stem: Callable[[Tensor], Tensor]
    norm: Callable[[Tensor], Tensor]
    rest: Callable[[Tensor, Tensor], Tensor]
    attention: Attention | None
    finish: Callable[[Tensor, Tensor], Tensor]
    direct_because: str = ""
