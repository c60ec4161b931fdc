"""Prepare an export: find the image size and the classes, convert the model, refuse what fails."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vit_reciprocam.core.split import Cut, Split
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.libraries.dispatch import split_model
from vit_reciprocam.libraries.validation import check_mode
from vit_reciprocam.pictures.preprocess import Preprocess

__all__ = [
    "all_tensors",
    "check_model",
    "choose_size",
    "convert_to_float32",
    "cut_example",
    "find_second_size",
    "unpack_classifier",
]


def unpack_classifier(
    model: Any, class_names: Sequence[str] | None, preprocess: Preprocess | None, name: str | None
) -> tuple[nn.Module, Sequence[str] | None, Preprocess | None, str]:
    """Return the module in a model or `Classifier`, which also gives what else is None."""
    if isinstance(model, nn.Module):
        return model, class_names, preprocess, name or type(model).__name__
    inner = getattr(model, "model", None)
    if not hasattr(model, "preprocess"):
        raise ModelError(
            "model must be a torch.nn.Module or what vit_reciprocam.load returns, got "
            f"{type(model).__name__}"
        )
    if not isinstance(inner, nn.Module):
        raise ModelError(
            f"{name or model.name} is not a PyTorch model but an ONNX file already: copy the file, "
            "or export the model that it was made from"
        )
    return (
        inner,
        model.class_names if class_names is None else class_names,
        preprocess or model.preprocess,
        name or model.name,
    )


def choose_size(
    preprocess: Preprocess | None, size: tuple[int, int] | None
) -> tuple[Preprocess | None, tuple[int, int]]:
    """Return the preprocessing, for images of the chosen size, and that size (height, width)."""
    if size is None:
        if preprocess is None:
            raise InputError(
                "the size of the images is not known: pass size=(height, width) or preprocess="
            )
        return preprocess, preprocess.size
    good = len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)
    if not good:
        raise InputError(f"size must be (height, width) in pixels, got {size!r}")
    size = (size[0], size[1])
    return preprocess and dataclasses.replace(preprocess, size=size), size


def check_model(model: nn.Module) -> None:
    """Refuse a model that cannot run, or that may not give the same result each time."""
    if any(tensor.is_meta for tensor in all_tensors(model)):
        raise ModelError(
            f"the {type(model).__name__} is on the meta device, which holds shapes and no numbers: "
            "load its weights onto a device"
        )
    check_mode(model)
    split_model(model)  # if it refuses, its reasons name the user's own model, not a copy


@torch.no_grad()
def convert_to_float32(model: nn.Module, *, half: bool) -> nn.Module:
    """Return the model in float32 on the CPU, as a copy unless it is that already.

    If `half`, it is a copy whose weight matrices are rounded to numbers that float16 can hold.
    """
    floats = [tensor for tensor in all_tensors(model) if tensor.is_floating_point()]
    fits = all(tensor.dtype == torch.float32 for tensor in floats)
    if fits and not half and all(one.device.type == "cpu" for one in all_tensors(model)):
        return model
    try:
        converted = copy.deepcopy(model).to("cpu").float()
    except Exception as error:  # copying may run code of any object inside the module
        raise ModelError(
            f"the model cannot be copied, which float32 on the CPU needs ({error}): convert it "
            "with model.float().cpu() before"
        ) from error
    for weight in converted.parameters() if half else ():
        rounded = weight.half().float()
        if not rounded.isfinite().all():
            raise ModelError(
                "weights of this model exceed float16, whose largest number is 65504: leave out "
                "half"
            )
        if weight.ndim > 1:  # vectors, such as biases, stay as they are
            weight.copy_(rounded)
    return converted


def all_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Return a model's parameters and buffers."""
    return itertools.chain(model.parameters(), model.buffers())


@torch.no_grad()
def cut_example(split: Split, size: tuple[int, int]) -> tuple[Cut, int]:
    """Return the model's cut for one image of zeros, and the number of classes."""
    cut = split.cut(torch.zeros(1, 3, *size))
    logits = cut.rest(cut.norm(cut.x), cut.x)
    if logits.ndim != 2:
        raise ModelError(
            f"the model gives {tuple(logits.shape)} for an image, not one score per class"
        )
    return cut, logits.shape[1]


def find_second_size(
    split: Split, size: tuple[int, int], patch: tuple[int, int]
) -> tuple[int, int]:
    """Return an image size one patch higher and two wider; refuse a model that takes only one."""
    if split.direct_because:
        raise InputError(
            "this model's maps need a loop over the masks of one image size "
            f"({split.direct_because}): leave out dynamic_size"
        )
    second = size[0] + patch[0], size[1] + 2 * patch[1]
    try:
        cut_example(split, second)
    except (InputError, AssertionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"the size of the images cannot stay open: {error}. Leave out dynamic_size"
        ) from error
    return second
