"""torchvision's models that classify images, and its transformers for videos."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models import get_model, get_model_builder, list_models

from vit_reciprocam.libraries.common.building import Architecture, NoValues, is_named_transformer
from vit_reciprocam.libraries.torchvision.split import unsupported

__all__ = ["architectures", "build"]


def architectures() -> Iterator[Architecture]:
    """Yield every model that classifies images or is named as a transformer."""
    classify = list_models(module=torchvision.models)
    for name in list_models():
        listed = is_named_transformer(get_model_builder(name).__module__)
        if listed or name in classify:
            yield Architecture(f"torchvision:{name}", functools.partial(build, name), listed=listed)


def build(name: str, **options: Any) -> nn.Module:
    """Build a transformer on the meta device; refuse others, since some of them need memory."""
    if not is_named_transformer(get_model_builder(name).__module__):
        raise unsupported(name)
    with torch.device("meta"), NoValues():
        model: nn.Module = get_model(name, **options)
    return model.eval()
