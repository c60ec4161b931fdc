"""torchvision's models that classify images, and its transformers for videos."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torchvision
from torchvision.models import get_model, get_model_builder, list_models

from vit_reciprocam.errors import ModelError
from vit_reciprocam.libraries.common.building import (
    CLASSES,
    Architecture,
    Built,
    NoValues,
    filled,
    is_named,
    noise,
)

__all__ = ["architectures"]


def architectures() -> Iterator[Architecture]:
    """All of them."""
    classify = list_models(module=torchvision.models)
    for name in list_models():
        listed = is_named(get_model_builder(name).__module__)
        if listed or name in classify:
            yield Architecture(
                f"torchvision:{name}",
                functools.partial(_whole, name),
                functools.partial(_small, name),
                listed=listed,
            )


def _whole(name: str) -> Built:
    if not is_named(get_model_builder(name).__module__):  # some cannot be built without memory
        raise ModelError(
            f"torchvision's {name} is not supported: it is neither a VisionTransformer nor a "
            "SwinTransformer"
        )
    with torch.device("meta"), NoValues():
        model: Any = get_model(name, num_classes=CLASSES).eval()
    size = getattr(model, "image_size", 224)
    return model, torch.empty(1, 3, size, size, device="meta")


def _small(name: str) -> Built:
    """A ViT's last two blocks on 4x4 patches; a Swin Transformer whole."""
    if name.startswith("swin"):
        return get_model(name, num_classes=CLASSES).eval(), noise(3, 224, 224, batch=1)
    with torch.device("meta"):
        outline: Any = get_model(name)
        size: int = 4 * outline.patch_size
        model: Any = get_model(name, num_classes=CLASSES, image_size=size)
    model.encoder.layers = model.encoder.layers[-2:]
    return filled(model).eval(), noise(3, size, size)
