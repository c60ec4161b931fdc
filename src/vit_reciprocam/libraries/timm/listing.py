"""timm's models."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import timm
import torch
from torch import nn

from vit_reciprocam.errors import ModelError
from vit_reciprocam.libraries.common.building import (
    CLASSES,
    Architecture,
    Built,
    NoValues,
    is_named,
    noise,
    pair,
    short_reason,
)
from vit_reciprocam.libraries.dispatch import split_model
from vit_reciprocam.libraries.timm.families import FAMILIES
from vit_reciprocam.libraries.timm.load import outline

__all__ = ["architectures", "describe", "names", "small"]

_LARGE = 150e6 * 224**2
"""Parameters times pixels, from which on a model is cut."""

_FEW_BLOCKS: tuple[dict[str, Any], ...] = (
    {"depths": (1, 1, 1, 2)},
    {"depths": (1, 1, 1, 1, 2)},
    {"stages": (1, 1, 1, 2)},
    {"layers": (1, 1, 1, 2)},
    {"layers": (1, 1, 1, 1, 2)},
    {"depth": 2},
    {"depth": 2, "global_attn_indexes": (1,)},
    {"img_size": (224, 224)},
    {},
)
_REFUSALS = (TypeError, AssertionError, ValueError, IndexError, AttributeError, RuntimeError)


def architectures() -> Iterator[Architecture]:
    """All of them, module by module."""
    for module in timm.list_modules():
        listed = _is_listed(module)
        for name in timm.list_models(module=module):
            yield Architecture(
                f"timm:{name}",
                functools.partial(_whole, name),
                functools.partial(small, name, num_classes=CLASSES),
                listed=listed,
                headless=timm.get_pretrained_cfg(name).num_classes == 0,
            )


def names(pattern: str) -> list[str]:
    """Those that fit a pattern; for "*" those of modules that hold transformers."""
    if pattern == "*":
        modules = filter(_is_listed, timm.list_modules())
        return [name for module in modules for name in timm.list_models(module=module)]
    return list(timm.list_models(pattern))


def describe(name: str) -> tuple[str, str]:
    """By which path it is explained as timm makes it, "-" if by none, and why not otherwise."""
    try:
        with NoValues():
            because = split_model(outline(name, {})).direct_because
    except ModelError as error:
        return "-", short_reason(str(error))
    return ("direct", because) if because else ("closed-form", "")


def _is_listed(module: str) -> bool:
    """Whether its own name says "vit" or "former", or it holds a supported class."""
    supported = {*FAMILIES, "VisionTransformer", "Beit", "Cait", "Eva"}
    held = vars(importlib.import_module(f"timm.models.{module}"))
    return is_named(module) or not supported.isdisjoint(held)


def _whole(name: str) -> Built:
    with NoValues():
        model: Any = timm.create_model(name, num_classes=CLASSES, device="meta").eval()
    return model, torch.empty(1, *_input_size(model), device="meta")


def _input_size(model: Any) -> tuple[int, int, int]:
    channels, *size = model.pretrained_cfg["input_size"]
    fixed = getattr(getattr(model, "patch_embed", None), "img_size", None)  # may be another
    return channels, *pair(fixed or size)


def small(name: str, **options: Any) -> Built:
    """A plain ViT's last two blocks on 3x4 patches; others whole, or with few blocks."""
    with NoValues():
        outline: Any = timm.create_model(name, device="meta")
    channels, height, width = _input_size(outline)
    if any(cls.__name__ in FAMILIES for cls in type(outline).__mro__):
        parameters = sum(parameter.numel() for parameter in outline.parameters())
        large = parameters * height * width > _LARGE
        if large and (cut := _cut(name, options, channels)):
            return cut
        images = noise(channels, height, width, batch=1)
        return timm.create_model(name, **options).eval(), images
    embed: Any = getattr(outline, "patch_embed", None)
    step = getattr(outline, "embeds", embed).patch_size[0]
    if embed is not None and getattr(embed, "grid_size", None):
        step = height // embed.grid_size[0]
    size = (3 * step, 4 * step)
    both: dict[str, Any] = {"depth": 2, "img_size": size}
    shared = getattr(getattr(outline.blocks[-1], "attn", None), "num_kv_heads", None)
    grouped = both | {"num_kv_heads": (shared,) * 2}
    tries: Any = (both, grouped, {"depth": 2}, {"img_size": size}, {})
    model = _first_that_builds(name, options, tries)
    embed = getattr(model, "patch_embed", None)
    if embed is None or not embed.strict_img_size or embed.img_size == size:
        height, width = size
    return model, noise(channels, height, width)


def _cut(name: str, options: dict[str, Any], channels: int) -> Built | None:
    """With the first settings that leave the last block as it is; None where none does."""

    def last_block(model: nn.Module) -> tuple[object, ...]:
        block = split_model(model).block
        return type(block), [parameter.shape for parameter in block.parameters()]

    known = options | {"num_classes": CLASSES}  # without a head a model is refused
    with NoValues():
        wanted = last_block(timm.create_model(name, **known, device="meta"))
    for few, size in itertools.product(_FEW_BLOCKS, ((224, 224), None)):
        with contextlib.suppress(*_REFUSALS), NoValues():
            model: Any = timm.create_model(name, **known, **few, device="meta").eval()
            height, width = size or _input_size(model)[1:]
            model(torch.empty(1, channels, height, width, device="meta"))
            if last_block(model) == wanted:
                break
    else:
        return None
    model = timm.create_model(name, **options, **few).eval()
    return model, noise(channels, height, width, batch=1)


def _first_that_builds(name: str, options: Any, tries: Sequence[dict[str, Any]]) -> Any:
    """The model with the first of these settings that its builder takes."""
    for more in tries:
        with contextlib.suppress(*_REFUSALS), NoValues():
            timm.create_model(name, **options, **more, device="meta")
            break
    return timm.create_model(name, **options, **more).eval()
