"""The families of transformers' models, and image towers of those that compare with texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.libraries.common.running import Grid, get_first

__all__ = [
    "FAMILIES",
    "ImageTower",
    "ModelDescription",
    "Pooling",
    "base_name",
    "describe_tower",
    "image_tower",
]

_MEAN = "the head reads the mean of all patches"


@dataclass(frozen=True)
class Pooling:
    """A head that pools all tokens into one vector: their mean, or the output of an attention.

    Attributes:
        tokens: The last block's output (B, T, D) -> the tokens that are pooled.
        finish: The vector (B, D) -> logits (B, C).
        prefix: Number of the pooled tokens before the patches.
        attention: The module that attends to the tokens; None if the vector is their mean.
        around: The model's module that takes the mean, which a cut before the pool does not call.
    """

    tokens: Callable[[Tensor], Tensor]
    finish: Callable[[Tensor], Tensor]
    prefix: int = 0
    attention: Any = None
    around: Any = None

    def __call__(self, y: Tensor) -> Tensor:
        """Return the logits (B, C) for the last block's output (B, T, D)."""
        tokens = self.tokens(y)
        return self.finish(tokens.mean(dim=1) if self.attention is None else self.attention(tokens))


@dataclass(frozen=True)
class ModelDescription:
    """A model by its parts, as its family's function describes it.

    Attributes:
        blocks: The encoder blocks; in a hierarchical model, those of the last stage.
        prefix: Number of tokens before the patches.
        reads: Number of tokens that the head reads, from the first on; if it reads all of them, a
            clause that says so.
        head: The last block's output (B, T, D) -> logits (B, C).
        pooling: The head as a `Pooling`, if it pools all tokens and `head` is not one itself.
        grid: The arguments of a block after X -> the patch grid; if None, it follows from the
            patch size.
        check_grid: A function that refuses a grid in which not all patches attend to each other.
        fixed_size: Whether images must have the size that the configuration gives.
        post_norm: Whether the blocks' LayerNorms follow attention and MLP. Then F is the input of
            the attention instead of the output of the first LayerNorm.
    """

    blocks: Any
    prefix: int
    reads: int | str
    head: Callable[[Tensor], Tensor]
    pooling: Pooling | None = None
    grid: Callable[..., Grid] | None = None
    check_grid: Callable[[Grid], None] | None = None
    fixed_size: bool = False
    post_norm: bool = False


_Describe = Callable[[Any], ModelDescription]
FAMILIES: dict[str, _Describe] = {}
"""The name of a transformers class -> the function that describes its models."""


def _family(*names: str) -> Callable[[_Describe], _Describe]:
    """Register the function below it in `FAMILIES` for transformers' classes of these names."""

    def register(describe: _Describe) -> _Describe:
        FAMILIES.update(dict.fromkeys(names, describe))
        return describe

    return register


@_family(
    "ViTForImageClassification",
    "ViTMSNForImageClassification",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
)
def _vit(model: Any) -> ModelDescription:
    body = model.base_model
    teacher = hasattr(model, "distillation_classifier")

    def head(y: Tensor) -> Tensor:
        y = body.layernorm(y)
        if teacher:
            both: Tensor = model.cls_classifier(y[:, 0]) + model.distillation_classifier(y[:, 1])
            return both / 2
        logits: Tensor = model.classifier(y[:, 0])
        return logits

    return ModelDescription(
        blocks=body.layers,
        prefix=2 if hasattr(body.embeddings, "distillation_token") else 1,
        reads=2 if teacher else 1,
        head=head,
        fixed_size=True,
    )


@_family("IJepaForImageClassification", "SiglipForImageClassification")
def _without_class_token(model: Any) -> ModelDescription:
    body = getattr(model, "ijepa", None) or model.vision_model
    norm = getattr(body, "layernorm", None) or body.post_layernorm
    return ModelDescription(
        blocks=getattr(body, "layers", None) or body.encoder.layers,
        prefix=0,
        reads=_MEAN,
        head=Pooling(tokens=norm, finish=model.classifier),
        fixed_size=True,
    )


@_family("Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification")
def _dinov2(model: Any) -> ModelDescription:
    body = model.base_model
    prefix = 1 + getattr(body.config, "num_register_tokens", 0)

    def head(y: Tensor) -> Tensor:
        y = body.layernorm(y)
        logits: Tensor = model.classifier(torch.cat([y[:, 0], y[:, prefix:].mean(dim=1)], dim=1))
        return logits

    def tokens(y: Tensor) -> Tensor:
        """Return tokens (B, T, 2 D) whose mean is what the head reads.

        The head reads the class token, joined to the mean of all patches along the width. So the
        left half of the width holds the class token and the right half the patches, with zeros
        elsewhere. Both are scaled so that the mean over all tokens, zeros included, restores them.
        """
        y = body.layernorm(y)
        width, patches = y.shape[2], y.shape[1] - prefix
        class_token, others = pad(y[:, :1], (0, width)), pad(y[:, prefix:], (width, 0))
        return torch.cat([class_token, others / patches], dim=1) * (1 + patches)

    return ModelDescription(
        blocks=body.encoder.layer,
        prefix=prefix,
        reads="the head reads the class token and the mean of all patches",
        head=head,
        pooling=Pooling(tokens=tokens, finish=model.classifier, prefix=1),
    )


@_family("BeitForImageClassification", "Data2VecVisionForImageClassification")
def _beit(model: Any) -> ModelDescription:
    body = model.base_model
    mean = body.config.use_mean_pooling
    pooling = Pooling(
        tokens=lambda y: body.layernorm(y)[:, 1:],
        finish=lambda pooled: model.classifier(body.pooler.layernorm(pooled)),
        around=body.pooler,
    )
    return ModelDescription(
        blocks=get_first(body, "layers", "encoder.layer"),
        prefix=1,
        reads=_MEAN if mean else 1,
        head=lambda y: model.classifier(body.pooler(body.layernorm(y))),
        pooling=pooling if mean else None,
    )


@_family("CLIPForImageClassification", "MetaClip2ForImageClassification")
def _clip(model: Any) -> ModelDescription:
    body = model.vision_model
    return ModelDescription(
        blocks=body.encoder.layers,
        prefix=1,
        reads=_MEAN,
        head=Pooling(tokens=lambda y: y[:, 1:], finish=model.classifier),
        fixed_size=True,
    )


@_family("SwinForImageClassification", "Swinv2ForImageClassification")
def _swin(model: Any) -> ModelDescription:
    body = model.base_model
    blocks = body.encoder.layers[-1].blocks
    post_norm = model.config.model_type == "swinv2"
    mean = isinstance(body.pooler, nn.AdaptiveAvgPool1d)

    def check_grid(grid: Grid) -> None:
        height, width = grid
        window = blocks[-1].window_size
        window = window if post_norm else min(window, height, width)
        if (height, width) != (window, window):
            raise InputError(
                f"the last block attends within windows of {window}x{window} patches and these "
                f"images have {height}x{width} there, so a kept patch would not reach the whole "
                "image: resize the images to the size that the model was made for"
            )

    pooling = Pooling(tokens=body.layernorm, finish=model.classifier, around=body.pooler)
    return ModelDescription(
        blocks=blocks,
        prefix=0,
        reads=_MEAN if mean else f"the head pools all patches by {body.pooler}",
        head=lambda y: model.classifier(body.pooler(body.layernorm(y).transpose(1, 2)).flatten(1)),
        pooling=pooling if mean else None,
        grid=lambda dimensions, *_rest: dimensions,
        check_grid=check_grid,
        fixed_size=model.config.use_absolute_embeddings,
        post_norm=post_norm,  # with one window its attention reads the residual stream itself
    )


@_family("PvtForImageClassification")
def _pvt(model: Any) -> ModelDescription:
    encoder = model.pvt.encoder
    return ModelDescription(
        blocks=encoder.block[-1],
        prefix=1,
        reads=1,
        head=lambda y: model.classifier(encoder.layer_norm(y)[:, 0]),
        grid=lambda height, width, *_rest: (height, width),
        fixed_size=True,
    )


@_family("PvtV2ForImageClassification")
def _pvt_v2(model: Any) -> ModelDescription:
    stage = model.pvt_v2.encoder.layers[-1]
    return ModelDescription(
        blocks=stage.blocks,
        prefix=0,
        reads=_MEAN,
        head=Pooling(tokens=stage.layer_norm, finish=model.classifier),
        grid=lambda height, width, *_rest: (height, width),
    )


def base_name(kind: type) -> str:
    """Return the name of the transformers class that a class is or is derived from."""
    for cls in kind.__mro__:
        if cls.__module__.startswith("transformers.models."):
            return cls.__name__
    return kind.__name__


_TOWERS = ("CLIPVisionModel", "MetaClip2VisionModel", "SiglipVisionModel")


class ImageTower(nn.Module):
    """The image side of a model that compares images with texts: images -> features (B, E)."""

    def __init__(self, vision: nn.Module, projection: nn.Module) -> None:
        """Join an image encoder and the projection of its pooled output."""
        super().__init__()
        self.vision = vision
        self.projection = projection

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (B, E) as a tensor, before they are normalised."""
        features: Tensor = self.projection(self.vision(images).pooler_output)
        return features


def image_tower(model: nn.Module) -> ImageTower:
    """Return the image side of a CLIP, SigLIP or MetaCLIP 2 model, made of the model's modules."""
    if isinstance(model, ImageTower):
        return model
    vision: Any = getattr(model, "vision_model", model)
    kind = base_name(type(vision))
    if kind not in _TOWERS:
        raise ModelError(
            f"{type(model).__name__} is not a supported image tower. Supported are "
            f"{', '.join(_TOWERS)} and the models that hold one"
        )
    if kind == "SiglipVisionModel" and not vision.use_head:
        raise ModelError(
            "this SiglipVisionModel has no pooling head (vision_use_head=False), so it has no "
            "image features to explain"
        )
    return ImageTower(vision, getattr(model, "visual_projection", nn.Identity()))


def describe_tower(tower: Any) -> ModelDescription:
    """Describe an `ImageTower`; its features take the place of logits."""
    vision = tower.vision
    attention = getattr(vision, "head", None)
    pooling = Pooling(vision.post_layernorm, tower.projection, attention=attention)
    return ModelDescription(
        blocks=vision.encoder.layers,
        prefix=0 if attention else 1,
        reads="the head pools all patches by attention" if attention else 1,
        head=pooling if attention else lambda y: tower.projection(vision.post_layernorm(y[:, 0])),
        fixed_size=True,
    )
