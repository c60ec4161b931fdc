"""The classes of transformers that classify images, and those that compare them with texts."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
)

from vit_reciprocam.libraries.common.building import Architecture, NoValues, with_prompts
from vit_reciprocam.libraries.transformers.check import check_class
from vit_reciprocam.libraries.transformers.families import FAMILIES
from vit_reciprocam.libraries.transformers.towers import image_tower

__all__ = ["architectures", "build"]

_SETTINGS = {
    "BeitForImageClassification": "(use_mean_pooling=False)",
    "Data2VecVisionForImageClassification": "(use_mean_pooling=False)",
}
"""Class -> a setting that makes it another kind of model, which is listed too."""

_WITH_TEXTS = ("CLIPModel", "MetaClip2Model", "SiglipModel")
_TOKENS = {"bos_token_id": 0, "eos_token_id": 1}
"""SigLIP's default tokens are outside its default vocabulary, and transformers warns about that."""


def architectures() -> Iterator[Architecture]:
    """Yield the supported classes, then the others that classify images."""
    supported = []
    for name in FAMILIES:
        supported += [name, name + _SETTINGS[name]] if name in _SETTINGS else [name]
    entries = [[one] if isinstance(one, str) else one for one in CLASSIFIERS.values()]
    others = {name for names in entries for name in names} - {*supported, *_WITH_TEXTS}
    for name in [*supported, *_WITH_TEXTS, *sorted(others)]:
        yield Architecture(f"hf:{name}", functools.partial(_outline, name))


def _outline(name: str) -> nn.Module:
    with torch.device("meta"), NoValues():
        return build(name)


def build(name: str, **config: Any) -> nn.Module:
    """Build a model from a class's name, to which a setting may be added in brackets.

    If the model compares images with texts, build its image tower with random prompts as classes.
    """
    kind, _, setting = name.rstrip(")").partition("(")
    cls: Any = getattr(transformers, kind)
    if setting:
        config[setting.partition("=")[0]] = setting.endswith("True")
    if kind not in _WITH_TEXTS:
        check_class(cls)
    if "text_config" in cls.config_class.sub_configs:
        config.setdefault("text_config", _TOKENS)
    model: nn.Module = cls(cls.config_class(**config)).eval()
    if kind in _WITH_TEXTS:
        sizes: Any = model.config
        width = getattr(sizes, "projection_dim", sizes.vision_config.hidden_size)
        return with_prompts(image_tower(model), width)
    return model
