"""Each architecture twice: whole on the meta device, without memory, and small with weights.

The small model is of the same kind as the whole one. If its builder allows that, it has only a few
blocks and few patches.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import open_clip
import timm
import torch
from torch import Tensor, nn
from torchvision.models import get_model

from vit_reciprocam.errors import ModelError
from vit_reciprocam.libraries.common.loading import PROMPTS, NoValues, with_prompts
from vit_reciprocam.libraries.dispatch import split_model
from vit_reciprocam.libraries.listing import architectures
from vit_reciprocam.libraries.open_clip import load as open_clip_load
from vit_reciprocam.libraries.timm.families import FAMILIES as HIERARCHICAL
from vit_reciprocam.libraries.torchvision import load as torchvision_load
from vit_reciprocam.libraries.transformers import load as transformers_load

__all__ = ["Candidate", "find_candidates"]

CLASSES = PROMPTS

Built = tuple[nn.Module, Tensor]
"""A model in evaluation mode and images that it takes."""


@dataclass(frozen=True)
class Candidate:
    """An architecture to compare with the definition.

    Attributes:
        spec: The `Architecture.spec`.
        whole: () -> the whole model on the meta device. Raises `ModelError` if it is refused even
            before it is built.
        small: () -> a small model of the same kind, with memory and random weights.
        listed: Whether a table should list it even if it is refused.
        headless: Whether its library makes it without a head, so that one is added.
    """

    spec: str
    whole: Callable[[], Built]
    small: Callable[[], Built]
    listed: bool = True
    headless: bool = False


def find_candidates(pattern: str) -> Iterator[Candidate]:
    """Find architectures of the installed libraries by a pattern, as `architectures` does."""
    for one in architectures(pattern):
        prefix, _, name = one.spec.partition(":")
        if prefix not in _BUILDERS:
            raise ModelError(
                f"{one.spec}: tools/small_models.py does not build {prefix} models yet"
            )
        whole, small = _BUILDERS[prefix]
        yield Candidate(
            one.spec,
            functools.partial(whole, name),
            functools.partial(small, name),
            listed=one.listed,
            headless=prefix == "timm" and timm.get_pretrained_cfg(name).num_classes == 0,
        )


# --- for all libraries --------------------------------------------------------------------------


def _noise(channels: int, height: int, width: int, *, batch: int = 2) -> Tensor:
    """Return random images, the same each time."""
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def _pair(size: Any) -> tuple[int, int]:
    """Return (height, width), which may be given as one number."""
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return int(height), int(width)


def _fill(model: nn.Module) -> nn.Module:
    """Give memory to a model on the meta device that has no buffers: zeros, ones in LayerNorms."""
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
    return model


# --- timm ---------------------------------------------------------------------------------------

_LARGE = 150e6 * 224**2
"""Parameters times pixels above which a hierarchical model is built with few blocks."""

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
"""The errors of timm's builders for settings that they do not take."""


def _whole_timm(name: str) -> Built:
    with NoValues():
        model: Any = timm.create_model(name, num_classes=CLASSES, device="meta").eval()
    return model, torch.empty(1, *_input_size(model), device="meta")


def _input_size(model: Any) -> tuple[int, int, int]:
    channels, *size = model.pretrained_cfg["input_size"]
    fixed = getattr(getattr(model, "patch_embed", None), "img_size", None)  # may differ
    return channels, *_pair(fixed or size)


def _small_timm(name: str, **options: Any) -> Built:
    """Build a plain ViT of two blocks on 3x4 patches; other models whole, or with few blocks."""
    options = {"num_classes": CLASSES} | options
    with NoValues():
        outline: Any = timm.create_model(name, device="meta")
    channels, height, width = _input_size(outline)
    if any(cls.__name__ in HIERARCHICAL for cls in type(outline).__mro__):
        parameters = sum(parameter.numel() for parameter in outline.parameters())
        large = parameters * height * width > _LARGE
        if large and (cut := _cut_blocks(name, options, channels)):
            return cut
        images = _noise(channels, height, width, batch=1)
        return timm.create_model(name, **options).eval(), images
    # The side of a patch in pixels. After a convolutional stem a token covers more pixels than the
    # patch embedding says, so the side is computed from the grid if there is one.
    embed: Any = getattr(outline, "patch_embed", None)
    step = getattr(outline, "embeds", embed).patch_size[0]
    if embed is not None and getattr(embed, "grid_size", None):
        step = height // embed.grid_size[0]
    size = (3 * step, 4 * step)
    both: dict[str, Any] = {"depth": 2, "img_size": size}
    # Models with grouped queries need the number of key heads of each block.
    shared = getattr(getattr(outline.blocks[-1], "attn", None), "num_kv_heads", None)
    grouped = both | {"num_kv_heads": (shared,) * 2}
    tries: Any = (both, grouped, {"depth": 2}, {"img_size": size}, {})
    model = _first_that_builds(name, options, tries)
    embed = getattr(model, "patch_embed", None)
    if embed is None or not embed.strict_img_size or embed.img_size == size:
        height, width = size  # a model of any size gets small images even without img_size
    return model, _noise(channels, height, width)


def _cut_blocks(name: str, options: dict[str, Any], channels: int) -> Built | None:
    """Build a model with fewer blocks and the same last block; None if no setting gives one.

    Each family names the number of its blocks in its own way, and not every number fits its other
    settings. So all ways are tried on the meta device, where that costs little, and the last block
    tells whether the model is still of the same kind.
    """

    def last_block(model: nn.Module) -> tuple[object, ...]:
        block = split_model(model).block
        return type(block), [parameter.shape for parameter in block.parameters()]

    with_head = options | {"num_classes": CLASSES}  # without a head a model is refused
    with NoValues():
        wanted = last_block(timm.create_model(name, **with_head, device="meta"))
    for few, size in itertools.product(_FEW_BLOCKS, ((224, 224), None)):
        with contextlib.suppress(*_REFUSALS), NoValues():
            model: Any = timm.create_model(name, **with_head, **few, device="meta").eval()
            height, width = size or _input_size(model)[1:]
            model(torch.empty(1, channels, height, width, device="meta"))
            if last_block(model) == wanted:
                break
    else:
        return None
    model = timm.create_model(name, **options, **few).eval()
    return model, _noise(channels, height, width, batch=1)


def _first_that_builds(name: str, options: Any, tries: Sequence[dict[str, Any]]) -> Any:
    """Build a model with the first of these settings that its builder takes."""
    for more in tries:
        with contextlib.suppress(*_REFUSALS), NoValues():
            timm.create_model(name, **options, **more, device="meta")
            break
    return timm.create_model(name, **options, **more).eval()


# --- torchvision --------------------------------------------------------------------------------


def _whole_torchvision(name: str) -> Built:
    model: Any = torchvision_load.build(name, num_classes=CLASSES)
    size = getattr(model, "image_size", 224)
    return model, torch.empty(1, 3, size, size, device="meta")


def _small_torchvision(name: str) -> Built:
    """Build a ViT of two blocks on 4x4 patches; a Swin Transformer whole."""
    if name.startswith("swin"):
        return get_model(name, num_classes=CLASSES).eval(), _noise(3, 224, 224, batch=1)
    with torch.device("meta"):
        outline: Any = get_model(name)
        size: int = 4 * outline.patch_size
        model: Any = get_model(name, num_classes=CLASSES, image_size=size)
    model.encoder.layers = model.encoder.layers[-2:]
    return _fill(model).eval(), _noise(3, size, size)


# --- open_clip ----------------------------------------------------------------------------------


def _whole_open_clip(name: str) -> Built:
    model: Any = open_clip_load.build(name)
    return model, torch.empty(1, 3, *_pair(model.tower.image_size), device="meta")


def _small_open_clip(name: str) -> Built:
    """Build a tower of open_clip's own with two blocks on 4x4 patches; a timm tower like timm's."""
    config: Any = open_clip.get_model_config(name)
    vision = config["vision_cfg"]
    if "timm_model_name" not in vision:
        size = 4 * vision["patch_size"]
        tower = open_clip_load.build_tower(config, layers=2, image_size=size)
        return with_prompts(tower, config["embed_dim"]), _noise(3, size, size)
    with torch.device("meta"):
        tower = open_clip_load.build_tower(config)
    classes, pool = tower.trunk.num_classes, tower.trunk.global_pool
    tower.trunk, images = _small_timm(
        vision["timm_model_name"], num_classes=classes, global_pool=pool
    )
    tower.head = _fill(tower.head)
    return with_prompts(tower, config["embed_dim"]), images


# --- transformers -------------------------------------------------------------------------------

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
_TOWERS = {
    "vision_config": _BLOCKS,
    "text_config": {
        "hidden_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
}
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
    "Data2VecVisionForImageClassification": _BIASED,
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
"""Class -> the configuration of a small model: two blocks, width 12."""


def _build_transformers(name: str, config: dict[str, Any]) -> tuple[nn.Module, tuple[int, int]]:
    """Build a model of a class with a configuration; return it and its image size."""
    model: Any = transformers_load.build(name, num_labels=CLASSES, **config)
    sizes = model.config if hasattr(model, "config") else model.tower.vision.config
    return model, _pair(getattr(sizes, "vision_config", sizes).image_size)


def _whole_transformers(name: str) -> Built:
    with torch.device("meta"), NoValues():
        model, size = _build_transformers(name, {})
        return model, torch.empty(1, 3, *size)


def _small_transformers(name: str) -> Built:
    kind = name.partition("(")[0]
    if kind not in _SMALL:
        raise ModelError(f"no small configuration of transformers' {name} is known")
    model, size = _build_transformers(name, _SMALL[kind])
    return model, _noise(3, *size)


_BUILDERS: dict[str, tuple[Callable[[str], Built], Callable[[str], Built]]] = {
    "timm": (_whole_timm, _small_timm),
    "torchvision": (_whole_torchvision, _small_torchvision),
    "open_clip": (_whole_open_clip, _small_open_clip),
    "hf": (_whole_transformers, _small_transformers),
}
