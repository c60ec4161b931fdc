"""The families of transformers' models: where each has its blocks, head and tokens."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vit_reciprocam.errors import InputError, ModelError

__all__ = [
    "FAMILIES",
    "Grid",
    "ImageTower",
    "Parts",
    "Pooling",
    "base_name",
    "check_class",
    "first",
    "image_tower",
    "tower_parts",
]

_MEAN = "the head reads the mean of all patches"
_TOWERS = ("CLIPVisionModel", "MetaClip2VisionModel", "SiglipVisionModel")

Grid = tuple[int, int]


@dataclass(frozen=True)
class Pooling:
    """A head that makes one vector of all tokens: their mean, or what attends to them.

    Attributes:
        tokens: The last block's output (B, T, D) -> the tokens that are pooled.
        finish: The vector (B, D) -> logits.
        prefix: How many of the tokens stand before the patches.
        attention: The module that attends to them, None where it is their mean.
        around: A module that takes the mean and is not called where its parts are.
    """

    tokens: Callable[[Tensor], Tensor]
    finish: Callable[[Tensor], Tensor]
    prefix: int = 0
    attention: Any = None
    around: Any = None

    def pool(self, tokens: Tensor) -> Tensor:
        """The one vector (B, D) of the tokens."""
        return tokens.mean(dim=1) if self.attention is None else self.attention(tokens)

    def __call__(self, y: Tensor) -> Tensor:
        """The last block's output -> logits."""
        return self.finish(self.pool(self.tokens(y)))


@dataclass(frozen=True)
class Parts:
    """A model as its family's function describes it.

    Attributes:
        config: Of the image encoder.
        blocks: Its blocks, of a hierarchical model those of the last stage.
        prefix: How many tokens stand before the patches.
        reads: How many tokens from the first on the head reads, or where that is all of them, a
            clause that says so.
        head: The last block's output (B, T, D) -> logits.
        pooling: The head by its parts, where it pools all tokens and is no `Pooling` itself.
        grid: What else a block is called with -> patch grid; by default that of
            `config.patch_size`.
        check_grid: Refuses a grid whose patches do not all attend to each other.
        fixed_size: Whether images must have the size of `config.image_size`.
        post_norm: Whether the blocks' LayerNorms follow attention and MLP, so that F is what the
            attention reads, not what the first LayerNorm gives.
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


FAMILIES: dict[str, Callable[[Any], Parts]] = {}


def _family(*names: str) -> Callable[[Callable[[Any], Parts]], Callable[[Any], Parts]]:
    """Register a function for transformers' classes of these names."""

    def register(describe: Callable[[Any], Parts]) -> Callable[[Any], Parts]:
        FAMILIES.update(dict.fromkeys(names, describe))
        return describe

    return register


@_family(
    "ViTForImageClassification",
    "ViTMSNForImageClassification",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
)
def _vit(model: Any) -> Parts:
    body = model.base_model
    teacher = hasattr(model, "distillation_classifier")

    def head(y: Tensor) -> Tensor:
        y = body.layernorm(y)
        if teacher:
            both: Tensor = model.cls_classifier(y[:, 0]) + model.distillation_classifier(y[:, 1])
            return both / 2
        logits: Tensor = model.classifier(y[:, 0])
        return logits

    return Parts(
        config=body.config,
        blocks=body.layers,
        prefix=2 if hasattr(body.embeddings, "distillation_token") else 1,
        reads=2 if teacher else 1,
        head=head,
        fixed_size=True,
    )


@_family("IJepaForImageClassification")
def _ijepa(model: Any) -> Parts:
    body = model.ijepa
    return Parts(
        config=body.config,
        blocks=body.layers,
        prefix=0,
        reads=_MEAN,
        head=Pooling(tokens=body.layernorm, finish=model.classifier),
        fixed_size=True,
    )


@_family("Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification")
def _dinov2(model: Any) -> Parts:
    body = model.base_model
    prefix = 1 + getattr(body.config, "num_register_tokens", 0)

    def head(y: Tensor) -> Tensor:
        y = body.layernorm(y)
        logits: Tensor = model.classifier(torch.cat([y[:, 0], y[:, prefix:].mean(dim=1)], dim=1))
        return logits

    def tokens(y: Tensor) -> Tensor:
        """Twice as wide, so that their mean is the class token beside the mean of all patches."""
        y = body.layernorm(y)
        width, patches = y.shape[2], y.shape[1] - prefix
        class_token, others = pad(y[:, :1], (0, width)), pad(y[:, prefix:], (width, 0))
        return torch.cat([class_token, others / patches], dim=1) * (1 + patches)

    return Parts(
        config=body.config,
        blocks=body.encoder.layer,
        prefix=prefix,
        reads="the head reads the class token and the mean of all patches",
        head=head,
        pooling=Pooling(tokens=tokens, finish=model.classifier, prefix=1),
    )


@_family("BeitForImageClassification", "Data2VecVisionForImageClassification")
def _beit(model: Any) -> Parts:
    body = model.base_model
    mean = body.config.use_mean_pooling
    pooling = Pooling(
        tokens=lambda y: body.layernorm(y)[:, 1:],
        finish=lambda pooled: model.classifier(body.pooler.layernorm(pooled)),
        around=body.pooler,
    )
    return Parts(
        config=body.config,
        blocks=first(body, "layers", "encoder.layer"),
        prefix=1,
        reads=_MEAN if mean else 1,
        head=lambda y: model.classifier(body.pooler(body.layernorm(y))),
        pooling=pooling if mean else None,
    )


@_family("CLIPForImageClassification", "MetaClip2ForImageClassification")
def _clip(model: Any) -> Parts:
    body = model.vision_model
    return Parts(
        config=body.config,
        blocks=body.encoder.layers,
        prefix=1,
        reads=_MEAN,
        head=Pooling(tokens=lambda y: y[:, 1:], finish=model.classifier),
        fixed_size=True,
    )


@_family("SiglipForImageClassification")
def _siglip(model: Any) -> Parts:
    body = model.vision_model
    return Parts(
        config=body.config,
        blocks=body.encoder.layers,
        prefix=0,
        reads=_MEAN,
        head=Pooling(tokens=body.post_layernorm, finish=model.classifier),
        fixed_size=True,
    )


@_family("SwinForImageClassification", "Swinv2ForImageClassification")
def _swin(model: Any) -> Parts:
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
    return Parts(
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
def _pvt(model: Any) -> Parts:
    encoder = model.pvt.encoder
    return Parts(
        config=model.config,
        blocks=encoder.block[-1],
        prefix=1,
        reads=1,
        head=lambda y: model.classifier(encoder.layer_norm(y)[:, 0]),
        grid=lambda height, width, *_rest: (height, width),
        fixed_size=True,
    )


@_family("PvtV2ForImageClassification")
def _pvt_v2(model: Any) -> Parts:
    stage = model.pvt_v2.encoder.layers[-1]
    return Parts(
        config=model.config,
        blocks=stage.blocks,
        prefix=0,
        reads=_MEAN,
        head=Pooling(tokens=stage.layer_norm, finish=model.classifier),
        grid=lambda height, width, *_rest: (height, width),
    )


class ImageTower(nn.Module):
    """Images -> features (B, E), as a tensor, of a model that compares images with texts."""

    def __init__(self, vision: nn.Module, projection: nn.Module) -> None:
        """Join an image encoder and what projects its pooled output."""
        super().__init__()
        self.vision = vision
        self.projection = projection

    def forward(self, images: Tensor) -> Tensor:
        """Features, before they are normalised."""
        features: Tensor = self.projection(self.vision(images).pooler_output)
        return features


def image_tower(model: nn.Module) -> ImageTower:
    """The image side of a CLIP or SigLIP model, which shares the model's modules.

    Args:
        model: CLIPModel, CLIPVisionModelWithProjection, SiglipModel, SiglipVisionModel, or those
            of MetaCLIP 2.

    Raises:
        ModelError: If it is none of these.
    """
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


def tower_parts(tower: Any) -> Parts:
    """The parts of an `ImageTower`, whose features take the place of logits."""
    vision = tower.vision
    attention = getattr(vision, "head", None)
    pooling = Pooling(vision.post_layernorm, tower.projection, attention=attention)
    return Parts(
        config=vision.config,
        blocks=vision.encoder.layers,
        prefix=0 if attention else 1,
        reads="the head pools all patches by attention" if attention else 1,
        head=pooling if attention else lambda y: tower.projection(vision.post_layernorm(y[:, 0])),
        fixed_size=True,
    )


def first(module: Any, *paths: str) -> Any:
    """The first of these attributes that there is, None where none is."""
    for path in paths:
        try:
            return operator.attrgetter(path)(module)
        except AttributeError:
            continue
    return None


def base_name(kind: type) -> str:
    """The name of transformers' class that a class is, or is derived from."""
    for cls in kind.__mro__:
        if cls.__module__.startswith("transformers.models."):
            return cls.__name__
    return kind.__name__


_FEATURES = re.compile("(CLIP|MetaClip2|Siglip)(Vision)?Model(WithProjection)?")
_INSTEAD = {
    "TimmWrapperForImageClassification": "it wraps a timm model: pass model.timm_model",
    "Siglip2ForImageClassification": "it takes patches of images of any shape, not images. The "
    "SigLIP 2 models of one image size are of class SiglipForImageClassification",
}


def check_class(kind: type) -> None:
    """Refuse a class of models that `split` does not support.

    Raises:
        ModelError: If so; says why, and what to pass instead.
    """
    name = base_name(kind)
    if name in FAMILIES:
        return
    _, *made_for = re.split("For(?=[A-Z])", name, maxsplit=1)  # no "Former"
    task = "".join(made_for)
    if name in _INSTEAD:
        why = f"is not supported: {_INSTEAD[name]}"
    elif issubclass(kind, ImageTower) or _FEATURES.fullmatch(name):
        why = (
            "gives image features, no class scores: make a classifier of text prompts with "
            "vit_reciprocam.libraries.transformers.split.zero_shot(model, processor, prompts)"
        )
    elif task.startswith("ImageClassification"):
        why = (
            "is not supported: it is no Vision Transformer whose parts are known. Supported are "
            + ", ".join(sorted(FAMILIES))
        )
    elif made_for:
        words = " ".join(re.findall("[A-Z][a-z]*", task)).lower()
        why = (
            f"is made for {words}, not to classify whole images: pass a model of "
            "AutoModelForImageClassification"
        )
    else:
        why = (
            "has no classification head, so it has no class scores to explain: load it with "
            "AutoModelForImageClassification"
        )
    raise ModelError(f"transformers' {name} {why}")
