"""A classifier cut in two at an encoder block: H(norm(X), X) with X = G(images).

Plain data and functions. An adapter fills a `Split` from a model; the method needs nothing else of
the model.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from vit_reciprocam.errors import ModelError

__all__ = [
    "Attention",
    "Cut",
    "MeanPool",
    "Projection",
    "Readout",
    "Split",
    "Splitter",
    "Tap",
    "logits_of",
    "projections",
]


@dataclass(frozen=True)
class Tap:
    """The place in a model at which the normed tokens F can be seen and changed.

    Attributes:
        modules: The modules whose output or first argument F is: one, or several that each have
            their share of its width.
        side: "output" or "input" of these modules.
    """

    modules: tuple[nn.Module, ...]
    side: str = "output"

    @contextlib.contextmanager
    def changed(self, change: Callable[[Tensor, int], Tensor]) -> Iterator[None]:
        """Replace what stands there, as long as the context lasts.

        Args:
            change: Given the tensor that would stand there and the number of its module, returns
                the tensor that stands there instead.

        Raises:
            ModelError: If the model does not call the modules in the meantime.
        """
        called = set()

        def after(number: int, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            called.add(number)
            return change(output, number)

        def before(
            number: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            called.add(number)
            return (change(args[0], number), *args[1:]), kwargs

        with contextlib.ExitStack() as stack:
            for number, module in enumerate(self.modules):
                if self.side == "output":
                    hook = module.register_forward_hook(functools.partial(after, number))
                else:
                    hook = module.register_forward_pre_hook(
                        functools.partial(before, number), with_kwargs=True
                    )
                stack.callback(hook.remove)
            yield
        for number, module in enumerate(self.modules):
            if number not in called:
                raise ModelError(
                    f"the model does not call its {type(module).__name__}, where this method cuts"
                )

    def replaced(self, normed: Tensor) -> contextlib.AbstractContextManager[None]:
        """Put a tensor (B, T, D) in the place of F, as long as the context lasts."""
        shares = normed.chunk(len(self.modules), dim=-1)
        return self.changed(lambda _, number: shares[number])


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
        """Apply weight and bias to tokens."""
        return linear(tokens, self.weight, self.bias)


def projections(weights: Sequence[Tensor], bias: Tensor | None) -> list[Projection]:
    """Return the linear layers that a joint layer consists of, such as query, key and value.

    Args:
        weights: Their shares of its weight, (out, in) each.
        bias: The joint layer's bias, which is split like its weight, or None.
    """
    biases = [None] * len(weights) if bias is None else bias.split([len(w) for w in weights])
    return [Projection(*share) for share in zip(weights, biases, strict=True)]


@dataclass(frozen=True)
class Attention:
    """The self-attention of a block up to the joined heads, before its output projection.

    softmax(query_norm(q) · rotate(key_norm(k)) · scale + bias) v, with q, k and v projected from
    the same tokens and split into `heads`; prefix tokens are not rotated.

    Attributes:
        heads: Number of heads.
        scale: Factor of the scores q · k.
        query: The readout tokens (B, R, D) -> their joined queries (B, R, A).
        key: Tokens (B, T, D) -> joined keys (B, T, A).
        value: Tokens (B, T, D) -> joined values (B, T, A).
        query_norm: Normalises queries (..., heads, head dimension); the identity if there is none.
        key_norm: Normalises keys (..., heads, head dimension), or None.
        rotate: Rotary position embedding of the patches' keys, (B, N, heads, head dimension), or
            None.
        bias: (T, R, heads), what position alone adds to the readout tokens' scores, or None.
    """

    heads: int
    scale: float
    query: Callable[[Tensor], Tensor]
    key: Projection
    value: Projection
    query_norm: Callable[[Tensor], Tensor]
    key_norm: Callable[[Tensor], Tensor] | None
    rotate: Callable[[Tensor], Tensor] | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Readout:
    """What the closed form needs of the block and the head: the few tokens that the head reads.

    Attributes:
        tokens: R, the number of readout tokens; they are the first ones.
        attention: The block's attention, part by part.
        finish: Joined heads (n, B, R, A), normed tokens F (n, B, R, D) and skip path X (n, B, R, D)
            of the readout tokens -> logits (n, B, C).
    """

    tokens: int
    attention: Attention
    finish: Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MeanPool:
    """What the closed form needs if the cut stands just before the mean of all tokens.

    Attributes:
        finish: Means of all tokens (n, B, D) -> logits (n, B, C).
    """

    finish: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Cut:
    """One batch of images, cut in two.

    Shapes: images B, patch grid h·w = N, prefix tokens P, all tokens T = P + N in the order prefix,
    patches row by row; width D, classes C, readout tokens R, joined heads A.

    Attributes:
        grid: (h, w).
        x: X, the residual stream that enters the block: (B, T, D), or (B, h, w, D), or (B, D, h, w)
            if `channels_first`.
        norm: X -> F, the block's first LayerNorm, which acts on each token alone.
        rest: H: (F, X) -> logits (n * B, C), for n sets of masked tokens, (n * B, T, D) each, in
            the order of X repeated n times.
        readout: What the closed form needs; None if it does not hold.
        channels_first: Whether X is (B, D, h, w).
    """

    grid: tuple[int, int]
    x: Tensor
    norm: Callable[[Tensor], Tensor]
    rest: Callable[[Tensor, Tensor], Tensor]
    readout: Readout | MeanPool | None = None
    channels_first: bool = False


@dataclass(frozen=True)
class Split:
    """A model as the method sees it; a snapshot, made anew for each call so as not to go stale.

    Attributes:
        cut: G: images (B, ch, H, W) -> their `Cut`. Raises `InputError` if the model cannot take
            that size.
        prefix_tokens: P, the number of class, distillation and register tokens before the patches.
        block: The encoder block that is cut.
        tap: The place of F in it.
        direct_because: Why the closed form does not hold; empty if it does.
    """

    cut: Callable[[Tensor], Cut]
    prefix_tokens: int
    block: nn.Module
    tap: Tap
    direct_because: str = ""


Splitter = Callable[[nn.Module], Split]
"""Splits a model; explainers call it anew for each batch."""


def logits_of(output: Any) -> Tensor:
    """Return a model's class scores (B, C), also out of an object that holds them as `logits`.

    Raises:
        ModelError: If there are none.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        what = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise ModelError(f"the model must give logits (batch, classes), but gave {what}")
    return logits
