"""Text prompts as classes: images are compared with the embeddings of the prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from vit_reciprocam.core.split import Cut, MeanPool, Readout, Split
from vit_reciprocam.errors import InputError

__all__ = ["ZeroShot", "add_scores", "check_prompts", "fill_template"]


class ZeroShot(nn.Module):
    """A classifier whose classes are text prompts (Radford et al. 2021).

    Its logits (B, C) are scale · cosine(image features, prompt embedding) + bias.

    Attributes:
        tower: Images (B, 3, H, W) -> features (B, E).
        prompts: Text embeddings (C, E), normalised.
    """

    prompts: Tensor

    def __init__(
        self,
        tower: nn.Module,
        prompts: Float[Tensor, "C E"],
        *,
        scale: float,  # exp(logit_scale) of a trained model
        bias: float = 0.0,  # logit_bias of SigLIP
    ) -> None:
        """Join a tower and text embeddings of any length, one per class."""
        super().__init__()
        self.tower = tower
        self.register_buffer("prompts", normalize(prompts.detach(), dim=-1))
        self.num_classes = len(prompts)
        self.scale = float(scale)
        self.bias = float(bias)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C"]:
        """Return the logits of images."""
        return self.scores(self.tower(images))

    def scores(self, features: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch C"]:
        """Return the logits of image features."""
        cosine: Tensor = normalize(features, dim=-1) @ self.prompts.T
        return cosine * self.scale + self.bias


def add_scores(tower: Split, scores: Callable[[Tensor], Tensor]) -> Split:
    """Return a tower's split with `scores`, features (..., E) -> logits (..., C), put behind it."""

    def cut(images: Tensor) -> Cut:
        inner = tower.cut(images)
        readout = inner.readout
        if isinstance(readout, Readout):
            finish = readout.finish
            readout = dataclasses.replace(
                readout, finish=lambda heads, normed, x: scores(finish(heads, normed, x))
            )
        elif isinstance(readout, MeanPool):
            finish_mean = readout.finish
            readout = MeanPool(lambda means: scores(finish_mean(means)))
        return dataclasses.replace(
            inner, rest=lambda normed, x: scores(inner.rest(normed, x)), readout=readout
        )

    return dataclasses.replace(tower, cut=cut)


def check_prompts(prompts: Sequence[str], templates: Sequence[str]) -> None:
    """Refuse prompts and templates that are not lists of texts, or a template without {}."""
    for what, texts in (("prompts", prompts), ("templates", templates)):
        listed = isinstance(texts, Sequence) and not isinstance(texts, str)
        if not listed or not texts or not all(isinstance(one, str) for one in texts):
            raise InputError(f"{what} must be a list of at least one text, got {texts!r}")
    for template in templates:
        if "{}" not in template:
            raise InputError(f"the template {template!r} has no place {{}} for the prompt")


def fill_template(template: str, prompt: str) -> str:
    """Return a template with the prompt in place of {}; other braces stay as they are."""
    return template.replace("{}", prompt)
