"""A classifier cut in two at an encoder block: H(norm(X), X) with X = G(images).

Plain data and functions. The code of each library fills a `Split` from a model, and the method
needs to know nothing else about the model.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
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
    "ReadoutBlock",
    "Split",
    "Splitter",
    "Tap",
    "logits_of",
    "projections",
    "widen",
]


@dataclass(frozen=True)
class Tap:
    """The place in a model at which the normed tokens F can be seen and changed.

    Attributes:
        modules: Modules whose output or first argument is F. If there are several, each has its
            share of F's width.
        side: "output" or "input" of these modules.
    """

    modules: tuple[nn.Module, ...]
    side: str = "output"

    @contextlib.contextmanager
    def changed(self, change: Callable[[Tensor, int], Tensor]) -> Iterator[None]:
        """Change the tensors at this place while the context lasts.

        The function `change` takes a module's tensor and the index of that module, and returns the
        tensor that takes its place. A model that does not call the modules is refused at the end.
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
        """Put a tensor (B, T, D) in the place of F while the context lasts."""
        shares = normed.chunk(len(self.modules), dim=-1)
        return self.changed(lambda _, number: shares[number])


@dataclass(frozen=True)
class Projection:
    """A linear layer's parameters.

    Attributes:
        weight: Weight (out, in).
        bias: Bias (out,), or None.
    """

    weight: Tensor
    bias: Tensor | None

    def __call__(self, tokens: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch A"]:
        """Apply weight and bias to tokens."""
        return linear(tokens, self.weight, self.bias)


def projections(weights: Sequence[Tensor], bias: Tensor | None) -> list[Projection]:
    """Return the layers that a joint linear layer holds, such as query, key and value.

    There is one weight (out, in) per layer; the joint bias is split to match.
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
        query: Readout tokens (B, R, D) -> their joined queries (B, R, A).
        key: Tokens (B, T, D) -> joined keys (B, T, A).
        value: Tokens (B, T, D) -> joined values (B, T, A).
        query_norm: Norm of queries (..., heads, head dimension); the identity if there is none.
        key_norm: Norm of keys (..., heads, head dimension), or None.
        rotate: Rotary position embedding of the patches' keys (B, N, heads, head dimension), or
            None.
        bias: What positions add to the readout tokens' scores, (T, R, heads), or None.
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

    def split_heads(self, joined: Float[Tensor, "*batch A"]) -> Float[Tensor, "*batch k d"]:
        """Split joined heads into k heads of width d."""
        heads: Tensor = joined.unflatten(-1, (self.heads, -1))
        return heads

    def queries(self, readers: Float[Tensor, "*batch R D"]) -> Float[Tensor, "*batch queries k d"]:
        """Return the queries of readout tokens, or those that a pool has learned in their place."""
        queries: Tensor = self.query_norm(self.split_heads(self.query(readers)))
        return queries


@dataclass(frozen=True)
class ReadoutBlock:
    """An encoder block before the last, as the readout tokens run through it.

    Attributes:
        x: X, the residual stream (B, T, D) that enters the block for the unmasked images.
        norm: X -> F, the block's first LayerNorm, which acts on each token alone.
        attention: Attention of the block, part by part.
        finish: Joined heads (n, B, R, A), normed tokens F (n, B, R, D) and skip path X (n, B, R, D)
            of the readout tokens -> the block's output for them (n, B, R, D).
        projected: Joined keys and values (B, T, A) of F, if the plain pass has left them; they are
            what `attention` projects.
    """

    x: Tensor
    norm: Callable[[Tensor], Tensor]
    attention: Attention
    finish: Callable[[Tensor, Tensor, Tensor], Tensor]
    projected: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Readout:
    """What the closed form needs of the block and the head, if the head reads only a few tokens.

    Attributes:
        tokens: Number R of readout tokens; they are the first ones.
        attention: Attention of the block, part by part.
        finish: Joined heads (n, B, R, A), normed tokens F (n, B, R, D) and skip path X (n, B, R, D)
            of the readout tokens -> logits (n, B, C).
        earlier: Blocks before this one, in their order: as many as a depth above 1 needs.
    """

    tokens: int
    attention: Attention
    finish: Callable[[Tensor, Tensor, Tensor], Tensor]
    earlier: tuple[ReadoutBlock, ...] = ()


@dataclass(frozen=True)
class MeanPool:
    """What the closed form needs if the cut stands just before the mean of all tokens.

    Attributes:
        finish: Means of all tokens (n, B, D) -> logits (n, B, C).
    """

    finish: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Cut:
    """The computation for one batch of images, cut in two.

    Shapes: images B, patch grid h·w = N, prefix tokens P, all tokens T = P + N in the order prefix,
    patches row by row; width D, classes C, readout tokens R, joined heads A.

    Attributes:
        grid: Patch grid (h, w).
        x: X, the residual stream that enters the block: (B, T, D), or (B, h, w, D), or (B, D, h, w)
            if `channels_first`.
        norm: X -> F, the block's first LayerNorm, which acts on each token alone.
        rest: H: (F, X) -> logits (n * B, C), for n sets of masked tokens. F and X are (n * B, T, D)
            each, with the B images repeated n times.
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
    """A model as the method sees it. It is made anew for each call, since the model may change.

    Attributes:
        cut: G: images (B, ch, H, W) -> their `Cut`. Raises `InputError` if the model cannot take
            images of that size.
        prefix_tokens: Number P of class, distillation and register tokens before the patches.
        block: Encoder block that is cut.
        tap: Place of F in that block.
        direct_because: Reason why the closed form does not hold; empty if it does.
    """

    cut: Callable[[Tensor], Cut]
    prefix_tokens: int
    block: nn.Module
    tap: Tap
    direct_because: str = ""


Splitter = Callable[[nn.Module], Split]
"""A function that splits a model; explainers call it anew for each batch."""


def widen(values: Tensor) -> Tensor:
    """Return values in at least float32, so that half precision loses no further digits."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def logits_of(output: Any) -> Tensor:
    """Return the logits (B, C) of a model's output, a tensor or an object with `logits`.

    Any other output raises `ModelError`.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        what = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise ModelError(f"the model must give logits (batch, classes), but gave {what}")
    return logits
