"""timm's hierarchical and other transformers -> Split.

All take the direct path. The model is run up to its last block in which tokens attend to each
other; what follows it in the model's own forward pass is repeated, one line a family.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor, nn

from vit_reciprocam.core.split import Cut, Split
from vit_reciprocam.errors import InputError
from vit_reciprocam.libraries.common.running import Reached, call_of, infer_grid, repeated
from vit_reciprocam.libraries.common.whole import refuse_bypassed
from vit_reciprocam.libraries.timm.families import FAMILIES, REFUSED, Last, unsupported

__all__ = ["split"]


def split(model: nn.Module) -> Split:
    """Cut a timm model at the last of its blocks in which tokens attend to each other.

    The cut is the block's first norm, or the attention's input where no norm precedes it
    (EfficientFormerV2, EfficientViT, LeViT, Swin V2). A DaViT's last block attends between
    channels, so the one before it is cut. Attention within windows (DaViT, GCViT, MaxViT, Swin)
    covers the whole last grid at the image size that most models were trained for; where several
    windows do, a kept patch changes the tokens of its own window only.

    Raises:
        ModelError: If the model is not supported, with the reason.
    """
    bases = [cls.__name__ for cls in type(model).__mro__ if cls.__module__.startswith("timm.")]
    family = next((FAMILIES[base] for base in bases if base in FAMILIES), None)
    if family is None:
        reasons = [REFUSED[base] for base in bases if base in REFUSED]
        raise unsupported(
            model, reasons[0] if reasons else "no attention between patch tokens is known in it"
        )
    last = family(model)
    around = () if last.run is None else (last.block,)
    refuse_bypassed(model, last.block, "timm", *around, methods=("forward_features",))
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


def _cut(model: Any, last: Last, images: Tensor) -> Cut:
    height, width = images.shape[2:]
    enter = last.block if last.run is None else last.tap.modules[0]
    try:
        (x, *others), options = call_of(model, enter, images)
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError) as error:
        raise InputError(
            f"this model cannot take images of {height}x{width} pixels: {error}"
        ) from error
    grid = _grid(last, x, [*others, *options.values()], (height, width))
    if last.one_window and grid != (last.one_window, last.one_window):
        raise InputError(
            f"the last grid of these images is {grid[0]}x{grid[1]}, but this model's attention "
            f"covers {last.one_window}x{last.one_window}: resize the images"
        )

    def run(x: Tensor) -> Any:
        times = x.shape[0] // images.shape[0]
        more = repeated(others, len(images), times) if last.batched else others
        return enter(last.outward(x, grid), *more, **options)

    def norm(x: Tensor) -> Tensor:
        found: list[Tensor] = []

        def note(normed: Tensor, _number: int) -> Tensor:
            found.append(normed)
            if not torch.compiler.is_compiling():
                raise Reached
            return normed

        with contextlib.suppress(Reached), last.tap.changed(note):
            run(x)
        return found[0]

    def rest(normed: Tensor, x: Tensor) -> Tensor:
        with last.tap.replaced(normed):
            y = (last.run or run)(x)
        logits: Tensor = model.forward_head(last.after(y, grid))
        return logits

    x = last.inward(x)
    return Cut(grid, x, norm, rest, channels_first=last.layout == "channels" and x.ndim == 4)


def _grid(last: Last, x: Tensor, told: list[Any], size: tuple[int, int]) -> tuple[int, int]:
    if last.grid is not None:
        return last.grid
    if last.layout != "tokens":
        rows, columns = x.shape[1:3] if last.layout == "rows" else x.shape[2:]
        return rows, columns
    for value in told:
        if isinstance(value, (tuple, list)) and len(value) == 2:
            return int(value[0]), int(value[1])
    return infer_grid(x.shape[-2] - last.prefix, *size)
