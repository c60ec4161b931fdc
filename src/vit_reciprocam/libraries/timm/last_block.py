"""The last block of a timm model in which tokens attend to each other, as plain data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from vit_reciprocam.core.split import Tap
from vit_reciprocam.libraries.common.running import Grid, get_first, same

__all__ = [
    "LastBlock",
    "MethodInputTap",
    "at_attention_input",
    "at_norm1",
    "at_reordered_norm1",
    "call_each",
    "keep",
    "rows_to_channels",
    "tokens_to_channels",
]

_ATTENTIONS = ("attn", "attn_out", "token_mixer", "e_mhsa", "factoratt_crpe")
"""The names by which blocks of several families keep their attention."""

Finish = Callable[[Any, Grid], Any]
"""The block's output and the grid -> what the model's `forward_head` takes."""


@dataclass(frozen=True)
class MethodInputTap(Tap):
    """The place of F in a block whose attention is called window by window.

    No module there takes all of F. But a method of the block takes it, and cuts it into windows, so
    F is the method's argument.
    """

    method: str = ""  # the method's name

    @contextlib.contextmanager
    def changed(self, change: Callable[[Tensor, int], Tensor]) -> Iterator[None]:
        """Do what `Tap.changed` does, to the method's argument; put the method back afterwards."""
        block = self.modules[0]
        attend, patched_by_user = getattr(block, self.method), vars(block).get(self.method)
        setattr(block, self.method, lambda tokens: attend(change(tokens, 0)))
        try:
            yield
        finally:
            delattr(block, self.method)
            if patched_by_user is not None:
                setattr(block, self.method, patched_by_user)


@dataclass(frozen=True)
class _ReorderedTap(Tap):
    """The place of F in a block whose tokens are not in the order of the image's patches."""

    arrange: Callable[[Tensor], Tensor] = same  # F -> F in the order of the image, (B, T, D)
    restore: Callable[[Tensor], Tensor] = same  # the inverse of `arrange`

    @contextlib.contextmanager
    def changed(self, change: Callable[[Tensor, int], Tensor]) -> Iterator[None]:
        """Do what `Tap.changed` does, with F in the order of the image."""
        with super().changed(lambda x, number: self.restore(change(self.arrange(x), number))):
            yield


@dataclass(frozen=True)
class LastBlock:
    """The last block of a model in which tokens attend to each other, and what follows it.

    Attributes:
        block: The module that is called with X, and perhaps with more.
        tap: The place of F in the block.
        finish: The block's output and the grid -> what `model.forward_head` takes.
        attention: The module by which its tokens attend to each other. If the name of its class
            does not say that it is an attention, the model is refused.
        layout: The layout of what the block takes: "tokens" (B, T, D), "rows" (B, h, w, D) or
            "channels" (B, D, h, w).
        arrange: What the block takes -> X, in the layout and the order of F.
        restore: The inverse of `arrange`, from X and the grid.
        prefix: Number of tokens before the patches.
        grid: (h, w), if it is the same for all images.
        batched: Whether the block also takes other tensors that have one row per image.
        one_window: The side of the attention's window, if the grid must have that size.
        run: X -> the block's output. Needed only if X is not what the block itself takes, but the
            residual stream at a norm inside it.
        because: Why the closed form does not hold.
    """

    block: Any
    tap: Tap
    finish: Finish
    attention: Any
    layout: str = "tokens"
    arrange: Callable[[Tensor], Tensor] = same
    restore: Callable[[Tensor, Grid], Tensor] = lambda x, _grid: x
    prefix: int = 0
    grid: Grid | None = None
    batched: bool = False
    one_window: int | None = None
    run: Callable[[Tensor], Tensor] | None = None
    because: str = "the head averages all tokens"


def at_norm1(
    block: Any,
    finish: Finish,
    layout: str = "tokens",
    *,
    tap: Tap | None = None,
    attention: Any = None,
    **more: Any,
) -> LastBlock:
    """Describe the common case: F is the output of norm1. Arguments are those of `LastBlock`."""
    tap = tap or Tap((getattr(block, "norm1", None) or block,))
    attention = attention or get_first(block, *_ATTENTIONS)
    return LastBlock(block, tap, finish, attention, layout, **more)


def at_reordered_norm1(
    block: Any,
    finish: Finish,
    arrange: Callable[[Tensor], Tensor],
    restore: Callable[[Tensor], Tensor],
    **more: Any,
) -> LastBlock:
    """Describe a block whose X and F are not (B, T, D) in the order of the image."""
    tap = _ReorderedTap((block.norm1,), arrange=arrange, restore=restore)
    return at_norm1(
        block, finish, tap=tap, arrange=arrange, restore=lambda x, _: restore(x), **more
    )


def at_attention_input(
    block: Any, attention: Any, finish: Finish, layout: str = "channels"
) -> LastBlock:
    """Describe a block without a norm before its attention: F is what the attention takes."""
    # a block without attention is refused later, so until then any tap will do
    tap = Tap((attention or block,), "input")
    return LastBlock(block, tap, finish, attention, layout)


def call_each(*modules: Callable[[Any], Any]) -> Finish:
    """Return a function that calls modules on the block's output, one after the other."""

    def finish(y: Any, _grid: Grid) -> Any:
        for module in modules:
            y = module(y)
        return y

    return finish


keep = call_each()
"""A function that returns the block's output as it is."""


def rows_to_channels(y: Float[Tensor, "B h w D"]) -> Float[Tensor, "B D h w"]:
    """Move the channels of a grid of tokens to the front."""
    return y.permute(0, 3, 1, 2)


def tokens_to_channels(y: Float[Tensor, "B T D"], grid: Grid) -> Float[Tensor, "B D h w"]:
    """Lay tokens out as a grid with the channels first."""
    channels: Tensor = y.transpose(1, 2).unflatten(2, grid)
    return channels
