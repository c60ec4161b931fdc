"""All of timm's models, whether transformers or not."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator

import timm
from torch import nn

from vit_reciprocam.libraries.common.building import Architecture, NoValues, is_named_transformer
from vit_reciprocam.libraries.timm.families import FAMILIES
from vit_reciprocam.libraries.timm.load import outline

__all__ = ["architectures"]


def architectures() -> Iterator[Architecture]:
    """Yield every model, module by module."""
    for module in timm.list_modules():
        listed = _is_listed(module)
        for name in timm.list_models(module=module):
            yield Architecture(f"timm:{name}", functools.partial(_build, name), listed=listed)


def _is_listed(module: str) -> bool:
    """Return whether a module of timm is named as a transformer or uses a supported class."""
    supported = {*FAMILIES, "VisionTransformer", "Beit", "Cait", "Eva"}
    held = vars(importlib.import_module(f"timm.models.{module}"))
    return is_named_transformer(module) or not supported.isdisjoint(held)


def _build(name: str) -> nn.Module:
    with NoValues():
        return outline(name, {}).eval()
