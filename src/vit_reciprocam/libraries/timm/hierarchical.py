"""The split of timm's hierarchical and other transformers, which all take the direct path.

The model runs up to its last block in which tokens attend to each other. What its own forward pass
does after that block is repeated, and families.py says for each class what that is.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vit_reciprocam.core.split import Cut, Split
from vit_reciprocam.errors import InputError
from vit_reciprocam.libraries.common.changes import refuse_bypassed
from vit_reciprocam.libraries.common.running import (
    Grid,
    StopForward,
    find_call,
    infer_grid,
    repeat_batch,
)
from vit_reciprocam.libraries.timm.families import FAMILIES, REFUSED, unsupported
from vit_reciprocam.libraries.timm.last_block import LastBlock

__all__ = ["split"]


def split(model: nn.Module) -> Split:
    """Cut a timm model at the last of its blocks in which tokens attend to each other.

    The cut is the block's first norm, or the attention's input if no norm precedes it
    (EfficientFormerV2, EfficientViT, LeViT, Swin V2). A DaViT's last block attends between
    channels, so the one before it is cut. Attention within windows (DaViT, GCViT, MaxViT, Swin)
    covers the whole last grid at the image size that most models were trained for; if there are
    several windows, a kept patch changes the tokens of its own window only.
    """
    bases = [cls.__name__ for cls in type(model).__mro__ if cls.__module__.startswith("timm.")]
    family = next((FAMILIES[base] for base in bases if base in FAMILIES), None)
    if family is None:
        reasons = [REFUSED[base] for base in bases if base in REFUSED]
        raise unsupported(
            model, reasons[0] if reasons else "no attention between patch tokens is known in it"
        )
    last = family(model)
    around = () if last.run is None else (last.block,)  # run replaces the call of the block
    refuse_bypassed(model, last.block, "timm", *around, methods=("forward_features",))
    # in most classes an option puts a mixer of another kind in the place of the attention
    kind = type(last.attention).__name__
    if not any(word in kind.lower() for word in ("att", "mla", "mhsa", "gpsa")):
        raise unsupported(
            model, f"its last block, {type(last.block).__name__}, has no attention between tokens"
        )
    return Split(
        cut=functools.partial(_cut, model, last),
        prefix_tokens=last.prefix,
        block=last.block,
        tap=last.tap,
        direct_because=last.because,
    )


def _cut(model: Any, last: LastBlock, images: Float[Tensor, "B channels H W"]) -> Cut:
    height, width = images.shape[2:]
    enter = last.block if last.run is None else last.tap.modules[0]  # the module that takes X
    try:
        (x, *others), options = find_call(model, enter, images)
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError) as error:
        raise InputError(
            f"this model cannot take images of {height}x{width} pixels: {error}"
        ) from error
    grid = _find_grid(last, x, [*others, *options.values()], (height, width))
    if last.one_window and grid != (last.one_window, last.one_window):
        raise InputError(
            f"the last grid of these images is {grid[0]}x{grid[1]}, but this model's attention "
            f"covers {last.one_window}x{last.one_window}: resize the images"
        )

    def run(x: Tensor) -> Any:
        times = x.shape[0] // images.shape[0]
        more = repeat_batch(others, len(images), times) if last.batched else others
        return enter(last.restore(x, grid), *more, **options)

    def norm(x: Tensor) -> Tensor:
        # F may be anywhere in the block, so the block runs until it is reached
        found: list[Tensor] = []

        def record(normed: Tensor, _number: int) -> Tensor:
            found.append(normed)
            if not torch.compiler.is_compiling():  # a tracer wants its calls to return
                raise StopForward
            return normed

        with contextlib.suppress(StopForward), last.tap.changed(record):
            run(x)
        return found[0]

    def rest(normed: Tensor, x: Tensor) -> Float[Tensor, "B C"]:
        with last.tap.replaced(normed):
            y = (last.run or run)(x)
        logits: Tensor = model.forward_head(last.finish(y, grid))
        return logits

    x = last.arrange(x)
    return Cut(grid, x, norm, rest, channels_first=last.layout == "channels" and x.ndim == 4)


def _find_grid(last: LastBlock, x: Tensor, others: list[Any], size: tuple[int, int]) -> Grid:
    """Return the grid of the tokens x that the block takes, for images of size (height, width)."""
    if last.grid is not None:
        return last.grid
    if last.layout != "tokens":
        rows, columns = x.shape[1:3] if last.layout == "rows" else x.shape[2:]
        return rows, columns
    for value in others:  # some blocks are given the grid
        if isinstance(value, (tuple, list)) and len(value) == 2:
            return int(value[0]), int(value[1])
    return infer_grid(x.shape[-2] - last.prefix, *size)
