"""Functions for `split=` that cut a model at an encoder block, or at a module of your choice."""

from __future__ import annotations

import functools
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from vit_reciprocam.core.split import Cut, Split, Splitter, Tap, logits_of
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.libraries.common.running import same
from vit_reciprocam.libraries.dispatch import split_model
from vit_reciprocam.libraries.validation import refuse_quantised

__all__ = ["cut_at", "cut_at_block", "refuse_training"]


@functools.cache
def cut_at_block(block: int = -1, *, pool: bool = False, depth: int = 1) -> Splitter:
    """Return the function that calls `split_model` with these arguments.

    The same arguments give the same function, so that explainers can tell whether they cut alike.
    """
    return functools.partial(split_model, block=block, pool=pool, depth=depth)


def cut_at(
    module: nn.Module, *, grid: tuple[int, int] | None = None, prefix_tokens: int = 0
) -> Splitter:
    """Return the function that cuts any model at the output of one of its modules.

    The output may be (B, T, D), (B, h, w, D) or (B, D, h, w). What follows the cut is computed by
    running the whole model with that output replaced. So nothing needs to be known about it, and
    each mask costs one forward pass. The model must give logits (B, C), or an object that holds
    them as `logits`.

    Args:
        module: Module at whose output to cut; it must run once per forward pass.
        grid: Patch grid (h, w). If the output has four dimensions, it also tells which of them are
            rows and columns; an output for which it does not is refused.
        prefix_tokens: Number of tokens before the patches.

    Raises:
        InputError: If grid or prefix_tokens make no sense. The function that is returned raises it
            if `module` is not one of the model's modules.
    """
    sides = tuple(grid) if isinstance(grid, (tuple, list)) else ()
    if grid is not None and not (len(sides) == 2 and all(_is_whole(side, 1) for side in sides)):
        raise InputError(
            f"grid must be (h, w), two positive whole numbers of patches, got {grid!r}"
        )
    if not _is_whole(prefix_tokens, 0):
        raise InputError(
            f"prefix_tokens must be a whole number and not negative, got {prefix_tokens!r}"
        )
    return functools.partial(_split, module=module, grid=grid, prefix_tokens=int(prefix_tokens))


def _split(
    model: nn.Module, *, module: nn.Module, grid: tuple[int, int] | None, prefix_tokens: int
) -> Split:
    """Cut a model at the output of one of its modules."""
    refuse_quantised(model)
    if not isinstance(module, nn.Module) or all(module is not one for one in model.modules()):
        raise InputError("target must be one of the model's own modules, such as model.blocks[-1]")
    tap = Tap((module,))

    def cut(images: Tensor) -> Cut:
        tokens = _tokens(model, tap, images)
        patch_grid, channels_first = _layout(tokens, module, grid, prefix_tokens)
        if tokens.shape[1] == len(images):  # may be (T, B, D), which one more image shows
            _tokens(model, tap, torch.cat([images, images[:1]]))

        def rest(normed: Tensor, _x: Tensor) -> Tensor:
            with tap.replaced(normed):
                return _run(model, images.repeat(len(normed) // len(images), 1, 1, 1))

        return Cut(grid=patch_grid, x=tokens, norm=same, rest=rest, channels_first=channels_first)

    return Split(
        cut=cut,
        prefix_tokens=prefix_tokens,
        block=module,
        tap=tap,
        direct_because="the cut is at a module that you named, and what follows it is not known",
    )


def refuse_training(model: nn.Module) -> None:
    """Refuse training mode, since a user's own code may do things at random then."""
    for name, module in model.named_modules():
        if module.training:
            what = f"its {name} ({type(module).__name__})" if name else "the model"
            raise ModelError(
                f"{what} is in training mode, in which a module of your own may act at random: "
                "call model.eval() first"
            )


def _run(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits (B, C) of images, one row per image."""
    logits = logits_of(model(images))
    if len(logits) != len(images):
        raise ModelError(
            f"the model must give one row of logits per image, but gave {len(logits)} for "
            f"{len(images)} images"
        )
    return logits


def _tokens(model: nn.Module, tap: Tap, images: Tensor) -> Tensor:
    """Return the target's output in a forward pass; refuse it unless it has one row per image."""
    outputs: list[Any] = []

    def keep(tokens: Tensor, _number: int) -> Tensor:
        outputs.append(tokens)
        return tokens

    with tap.changed(keep):
        _run(model, images)
    name = type(tap.modules[0]).__name__
    if len(outputs) != 1:
        raise ModelError(
            f"the target {name} ran {len(outputs)} times in one forward pass; it must run once"
        )
    tokens = outputs[0]
    if not isinstance(tokens, Tensor) or tokens.ndim not in (3, 4):
        what = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise InputError(
            f"the target {name} must give tokens (B, T, D), (B, h, w, D) or (B, D, h, w), but gave "
            f"{what}"
        )
    if len(tokens) != len(images):
        raise InputError(
            f"the target {name} gives {len(tokens)} rows for {len(images)} "
            f"image(s), {tuple(tokens.shape)}: it puts the tokens first, (T, B, D), or has windows "
            "in its batch. Name a module whose first dimension is the images"
        )
    return tokens


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and int(value) >= least


def _layout(
    tokens: Tensor, target: nn.Module, grid: tuple[int, int] | None, prefix: int
) -> tuple[tuple[int, int], bool]:
    """Return the grid (h, w), and whether the channels come before it."""
    shape = tuple(tokens.shape)
    gives = f"the target {type(target).__name__} gives {shape}"
    if grid is None:
        raise InputError(
            f"{gives}: say how the patches lie with grid=(h, w), and how many tokens stand before "
            "them with prefix_tokens="
        )
    h, w = map(int, grid)
    if tokens.ndim == 4:
        channels_last, channels_first = shape[1:3] == (h, w), shape[2:] == (h, w)
        if prefix:
            raise InputError(f"a grid of tokens {shape} has no prefix: use prefix_tokens=0")
        if not channels_last and not channels_first:
            raise InputError(
                f"{gives}, in which grid={h, w} is neither of (B, h, w, D) nor of (B, D, h, w)"
            )
        if channels_last and channels_first:
            raise InputError(
                f"{gives}, which may be (B, h, w, D) or (B, D, h, w): name a module with another "
                "width, or one that gives (B, T, D)"
            )
        return (h, w), channels_first
    if h * w != shape[1] - prefix:
        raise InputError(
            f"grid={h, w} is {h * w} patches, but {gives}: {shape[1]} tokens, of which "
            f"prefix_tokens={prefix} are not patches"
        )
    return (h, w), False
