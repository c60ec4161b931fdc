"""open_clip's models: their image towers, with prompts as classes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import open_clip
import torch
from open_clip.model import _build_vision_tower
from torch import nn

from vit_reciprocam.libraries.common.building import Architecture, NoValues, with_prompts

__all__ = ["architectures", "build", "build_tower"]


def architectures() -> Iterator[Architecture]:
    """Yield every model."""
    for name in open_clip.list_models():
        yield Architecture(f"open_clip:{name}", functools.partial(build, name))


def build(name: str) -> nn.Module:
    """Build a model's image tower on the meta device, with random prompts as classes."""
    config: Any = open_clip.get_model_config(name)
    with torch.device("meta"), NoValues():
        return with_prompts(build_tower(config), config["embed_dim"])


def build_tower(config: Any, **changes: Any) -> Any:
    """Build the image tower of a configuration, with changes to its "vision_cfg"."""
    vision = {**config["vision_cfg"], "timm_model_pretrained": False, **changes}
    tower = _build_vision_tower(config["embed_dim"], vision)
    if getattr(tower, "output_tokens", False):
        tower.output_tokens = False
    return tower
