"""The families of transformers' models: the blocks, the head and the tokens of each.

Letters of the shapes: B images, T tokens, D width, C classes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vit_reciprocam.errors import InputError
from vit_reciprocam.libraries.common.running import Grid

__all__ = ["FAMILIES", "ModelDescription", "Pooling", "base_name", "get_first"]

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

    def pool(self, tokens: Tensor) -> Tensor:
        """Return the vector (B, D) for the tokens (B, T, D)."""
        return tokens.mean(dim=1) if self.attention is None else self.attention(tokens)

    def __call__(self, y: Tensor) -> Tensor:
        """Return the logits (B, C) for the last block's output (B, T, D)."""
        return self.finish(self.pool(self.tokens(y)))


@dataclass(frozen=True)
class ModelDescription:
    """A model by its parts, as its family's function describes it.

    Attributes:
        config: The configuration of the image encoder.
        blocks: The encoder blocks; in a hierarchical model, those of the last stage.
        prefix: Number of tokens before the patches.
        reads: Number of tokens that the head reads, from the first on; if it reads all of them, a
            clause that says so.
        head: The last block's output (B, T, D) -> logits (B, C).
        pooling: The head as a `Pooling`, if it pools all tokens and `head` is not one itself.
        grid: The arguments of a block after X -> the patch grid; if None, it follows from
            `config.patch_size`.
        check_grid: A function that refuses a grid in which not all patches attend to each other.
        fixed_size: Whether images must have the size of `config.image_size`.
        post_norm: Whether the blocks' LayerNorms follow attention and MLP. Then F is the input of
            the attention instead of the output of the first LayerNorm.
    """

    config: Any
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
        config=body.config,
        blocks=body.layers,
        prefix=2 if hasattr(body.embeddings, "distillation_token") else 1,
        reads=2 if teacher else 1,
        head=head,
        fixed_size=True,
    )


@_family("IJepaForImageClassification")
def _ijepa(model: Any) -> ModelDescription:
    body = model.ijepa
    return ModelDescription(
        config=body.config,
        blocks=body.layers,
        prefix=0,
        reads=_MEAN,
        head=Pooling(tokens=body.layernorm, finish=model.classifier),
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
        config=body.config,
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
        config=body.config,
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
        config=body.config,
        blocks=body.encoder.layers,
        prefix=1,
        reads=_MEAN,
        head=Pooling(tokens=lambda y: y[:, 1:], finish=model.classifier),
        fixed_size=True,
    )


@_family("SiglipForImageClassification")
def _siglip(model: Any) -> ModelDescription:
    body = model.vision_model
    return ModelDescription(
        config=body.config,
        blocks=body.encoder.layers,
        prefix=0,
        reads=_MEAN,
        head=Pooling(tokens=body.post_layernorm, finish=model.classifier),
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
        config=body.config,
        blocks=blocks,
        prefix=0,
        reads=_MEAN if mean else f"the head pools all patches by {body.pooler}",
        head=lambda y: model.classifier(body.pooler(body.layernorm(y).transpose(1, 2)).flatten(1)),
        pooling=pooling if mean else None,
        grid=lambda dimensions, *_rest: dimensions,
        check_grid=check_grid,
        fixed_size=body.config.use_absolute_embeddings,
        post_norm=post_norm,  # with one window its attention reads the residual stream itself
    )


@_family("PvtForImageClassification")
def _pvt(model: Any) -> ModelDescription:
    encoder = model.pvt.encoder
    return ModelDescription(
        config=model.config,
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
        config=model.config,
        blocks=stage.blocks,
        prefix=0,
        reads=_MEAN,
        head=Pooling(tokens=stage.layer_norm, finish=model.classifier),
        grid=lambda height, width, *_rest: (height, width),
    )


def get_first(module: Any, *paths: str) -> Any:
    """Return the first attribute that a module has of these dotted paths, None if it has none."""
    for path in paths:
        try:
            return operator.attrgetter(path)(module)
        except AttributeError:
            continue
    return None


def base_name(kind: type) -> str:
    """Return the name of the transformers class that a class is or is derived from."""
    for cls in kind.__mro__:
        if cls.__module__.startswith("transformers.models."):
            return cls.__name__
    return kind.__name__
