"""The image towers of transformers' models that compare images with texts.

Letters of the shapes: B images, E width of the features.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vit_reciprocam.errors import ModelError
from vit_reciprocam.libraries.transformers.families import ModelDescription, Pooling, base_name

__all__ = ["ImageTower", "describe_tower", "image_tower"]

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
        config=vision.config,
        blocks=vision.encoder.layers,
        prefix=0 if attention else 1,
        reads="the head pools all patches by attention" if attention else 1,
        head=pooling if attention else lambda y: tower.projection(vision.post_layernorm(y[:, 0])),
        fixed_size=True,
    )
