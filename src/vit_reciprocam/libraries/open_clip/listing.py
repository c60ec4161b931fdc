"""open_clip's models: their image towers, with prompts as classes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import open_clip
import torch
from open_clip.model import _build_vision_tower

from vit_reciprocam.libraries.common.building import (
    Architecture,
    Built,
    NoValues,
    filled,
    noise,
    pair,
    with_prompts,
)
from vit_reciprocam.libraries.timm.listing import small as small_timm

__all__ = ["architectures"]


def architectures() -> Iterator[Architecture]:
    """All of them."""
    for name in open_clip.list_models():
        yield Architecture(
            f"open_clip:{name}", functools.partial(_whole, name), functools.partial(_small, name)
        )


def _tower(config: Any, **changes: Any) -> Any:
    vision = {**config["vision_cfg"], "timm_model_pretrained": False, **changes}
    tower = _build_vision_tower(config["embed_dim"], vision)
    if getattr(tower, "output_tokens", False):
        tower.output_tokens = False
    return tower


def _whole(name: str) -> Built:
    config: Any = open_clip.get_model_config(name)
    with torch.device("meta"), NoValues():
        tower = _tower(config)
        images = torch.empty(1, 3, *pair(tower.image_size))
        return with_prompts(tower, config["embed_dim"]), images


def _small(name: str) -> Built:
    """The last two blocks of an own tower on 4x4 patches; a timm tower as `timm.small` has it."""
    config: Any = open_clip.get_model_config(name)
    vision = config["vision_cfg"]
    if "timm_model_name" not in vision:
        size = 4 * vision["patch_size"]
        tower = _tower(config, layers=2, image_size=size)
        return with_prompts(tower, config["embed_dim"]), noise(3, size, size)
    with torch.device("meta"):
        tower = _tower(config)
    classes, pool = tower.trunk.num_classes, tower.trunk.global_pool
    tower.trunk, images = small_timm(
        vision["timm_model_name"], num_classes=classes, global_pool=pool
    )
    tower.head = filled(tower.head)
    return with_prompts(tower, config["embed_dim"]), images
