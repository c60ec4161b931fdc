"""The classes of transformers that classify images, and those that compare them with texts."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
)

from vit_reciprocam.errors import ModelError
from vit_reciprocam.libraries.common.building import (
    CLASSES,
    Architecture,
    Built,
    NoValues,
    noise,
    pair,
    with_prompts,
)
from vit_reciprocam.libraries.transformers.families import check_class, image_tower

__all__ = ["architectures"]

_BLOCKS = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 24,
    "patch_size": 4,
    "image_size": 16,
}
_DINO = _BLOCKS | {"layerscale_value": 0.5, "mlp_ratio": 2}
_BIASED = _BLOCKS | {
    "use_relative_position_bias": True,
    "use_shared_relative_position_bias": True,
}
_TEXT = {
    "text_config": {
        "hidden_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
}
_TOWERS = _TEXT | {"vision_config": _BLOCKS}
_SWIN = {
    "image_size": 16,
    "patch_size": 4,
    "embed_dim": 6,
    "depths": [1, 2],
    "num_heads": [1, 3],
    "window_size": 2,
}
_PVT = {
    "image_size": 32,
    "num_encoder_blocks": 2,
    "depths": [1, 2],
    "hidden_sizes": [6, 12],
    "num_attention_heads": [1, 3],
    "mlp_ratios": [2, 2],
    "strides": [4, 2],
}
_SMALL: dict[str, dict[str, Any]] = {
    "ViTForImageClassification": _BLOCKS,
    "ViTMSNForImageClassification": _BLOCKS,
    "DeiTForImageClassification": _BLOCKS,
    "DeiTForImageClassificationWithTeacher": _BLOCKS,
    "IJepaForImageClassification": _BLOCKS,
    "Dinov2ForImageClassification": _DINO,
    "Dinov2WithRegistersForImageClassification": _DINO,
    "BeitForImageClassification": _BIASED,
    "BeitForImageClassification(use_mean_pooling=False)": _BIASED,
    "Data2VecVisionForImageClassification": _BIASED,
    "Data2VecVisionForImageClassification(use_mean_pooling=False)": _BIASED,
    "CLIPForImageClassification": _TOWERS,
    "MetaClip2ForImageClassification": _TOWERS,
    "SiglipForImageClassification": _TOWERS,
    "SwinForImageClassification": _SWIN,
    "Swinv2ForImageClassification": _SWIN,
    "PvtForImageClassification": _PVT
    | {"patch_sizes": [4, 2], "sequence_reduction_ratios": [2, 1]},
    "PvtV2ForImageClassification": _PVT | {"patch_sizes": [7, 3], "sr_ratios": [2, 1]},
    "CLIPModel": _TOWERS,
    "MetaClip2Model": _TOWERS,
    "SiglipModel": _TOWERS,
}
"""Supported classes, some with a setting, and configurations to build them small."""


def architectures() -> Iterator[Architecture]:
    """The supported ones, then the others that classify images."""
    entries = [[one] if isinstance(one, str) else one for one in CLASSIFIERS.values()]
    others = {name for names in entries for name in names} - set(_SMALL)
    for name in [*_SMALL, *sorted(others)]:
        yield Architecture(
            f"hf:{name}", functools.partial(_whole, name), functools.partial(_small, name)
        )


def _built(name: str, config: dict[str, Any]) -> Built:
    kind, _, setting = name.rstrip(")").partition("(")
    cls: Any = getattr(transformers, kind)
    classifies = "ForImageClassification" in kind
    if classifies:
        check_class(cls)
        config = config | {"num_labels": CLASSES}
    if setting:
        config = config | {setting.partition("=")[0]: setting.endswith("True")}
    model: Any = cls(cls.config_class(**config))
    vision = getattr(model.config, "vision_config", model.config)
    images = torch.empty(1, 3, *pair(vision.image_size))
    if not classifies:
        width = getattr(model.config, "projection_dim", vision.hidden_size)
        return with_prompts(image_tower(model), width), images
    return model.eval(), images


def _whole(name: str) -> Built:
    """As transformers' default configuration has it, but for the text encoder."""
    with torch.device("meta"), NoValues():
        return _built(name, _TEXT if _SMALL.get(name) is _TOWERS else {})


def _small(name: str) -> Built:
    """Two blocks, 12 numbers wide."""
    if name not in _SMALL:
        raise ModelError(f"no small configuration of transformers' {name} is known")
    model, images = _built(name, _SMALL[name])
    return model, noise(*images.shape[1:])
