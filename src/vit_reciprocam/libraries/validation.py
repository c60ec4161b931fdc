"""Checks of models and images that are the same for every library."""

from __future__ import annotations

import itertools
import re
from typing import Any

import torch
from torch import Tensor, nn

from vit_reciprocam.errors import InputError, ModelError

__all__ = ["check_images", "check_mode", "check_size", "refuse_quantised"]

_QUANTISED = re.compile(r"torch\.(ao\.)?nn\.(intrinsic\.)?quantized\b")


def check_images(model: nn.Module, images: Tensor) -> None:
    """Refuse what is not a batch of finite images (B, 3, H, W) of the model's device and dtype."""
    if not isinstance(images, Tensor):
        raise InputError(
            "images must be a torch.Tensor of preprocessed images (B, 3, H, W), got "
            f"{type(images).__name__}. For files, PIL images and arrays use vit_reciprocam.explain"
        )
    if images.ndim != 4:
        hint = "; add the batch dimension with images[None]" if images.ndim == 3 else ""
        raise InputError(f"images must be (B, 3, H, W), got {tuple(images.shape)}{hint}")
    if not len(images):
        raise InputError("images is an empty batch")
    tensors = itertools.chain(model.parameters(), model.buffers())
    like = next((one for one in tensors if one.is_floating_point()), images)
    if like.is_meta and like is not images:
        raise ModelError(
            f"the {type(model).__name__} is on the meta device, which holds shapes and no numbers: "
            "load its weights onto a device"
        )
    if images.is_meta:
        raise InputError("images are on the meta device, which holds shapes and no numbers")
    if images.device != like.device:
        raise InputError(
            f"images are on {images.device} and the model on {like.device}: "
            "move them with images.to(device)"
        )
    if images.dtype != like.dtype and not torch.is_autocast_enabled(images.device.type):
        raise InputError(
            f"images are {images.dtype} and the model {like.dtype}: "
            "convert them with images.to(dtype)"
        )
    total = images.sum(dtype=torch.promote_types(images.dtype, torch.float32))
    if not total.isfinite():  # one pass over all pixels; a second one finds the images
        broken = (~images.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
        if broken:
            numbers = ", ".join(map(str, broken))
            raise InputError(f"images hold NaN or infinity: image(s) {numbers} of the batch")


def check_size(
    images: Tensor, channels: int, *, size: Any = None, step: Any = (1, 1), advice: str = ""
) -> None:
    """Refuse images (B, channels, H, W) that a model cannot take, with advice at the end.

    It takes one size (height, width), or all whose sides are multiples of `step`.
    """
    if images.shape[1] != channels:
        raise InputError(f"this model takes {channels} channel(s), got images of {images.shape[1]}")
    height, width = images.shape[2:]
    if not height or not width:
        raise InputError(f"images are empty: got {height}x{width} pixels")
    takes = ""
    if size is not None:
        if (height, width) != tuple(size):
            takes = f"{size[0]}x{size[1]} pixels"
    elif height % step[0] or width % step[1]:
        takes = f"multiples of {step[0]} by {step[1]} pixels"
    if takes:
        raise InputError(
            f"this model takes images of {takes} (height x width), got {height}x{width}{advice}"
        )


def check_mode(model: nn.Module) -> None:
    """Refuse a model with dropout or BatchNorm in training mode, which changes its output."""
    for name, module in model.named_modules():
        if not module.training:
            continue
        kind = type(module).__name__.lower()
        if "drop" in kind or "stochastic" in kind:
            names = ("p", "drop_prob", "prob")
        else:  # attentions that have a dropout of their own
            names = ("dropout", "dropout_prob", "attention_dropout")
        rates = [getattr(module, name, None) for name in names]
        random = any(isinstance(rate, float) and rate > 0 for rate in rates)
        if random or isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ModelError(
                f"the model is in training mode and its {name} ({type(module).__name__}) acts "
                "differently then: call model.eval() first"
            )


def refuse_quantised(model: nn.Module) -> None:
    """Refuse quantised modules, which round each image's activations by the whole batch."""
    every: list[Any] = [model]
    for module in every:  # the list grows: much faster than modules(), and run at every call
        if module is not None and module._modules:
            every += module._modules.values()
    quantised = {cls for cls in set(map(type, every)) if _QUANTISED.match(cls.__module__)}
    for path, module in model.named_modules() if quantised else ():
        cls = type(module)
        if cls in quantised:
            raise ModelError(
                f"the model's {path} is quantised ({cls.__module__}.{cls.__qualname__}), which "
                "rounds an image by the others that it runs with, so its scores would depend on "
                "how many masks run at once: pass the float model"
            )
