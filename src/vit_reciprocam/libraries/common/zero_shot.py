"""Text prompts as classes: an image tower, compared with the embeddings of the prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from vit_reciprocam.core.split import Cut, MeanPool, Readout, Split
from vit_reciprocam.errors import InputError

__all__ = ["ZeroShot", "check_prompts", "filled", "with_scores"]


class ZeroShot(nn.Module):
    """Images -> one score a prompt: scale · cosine(image, prompt) + bias (Radford et al. 2021).

    Attributes:
        tower: Images -> features (B, E).
    """

    prompts: Tensor

    def __init__(
        self,
        tower: nn.Module,
        prompts: Float[Tensor, "C E"],
        *,
        scale: float,
        bias: float = 0.0,
    ) -> None:
        """Join a tower and prompts.

        Args:
            tower: Images -> features (B, E).
            prompts: Text embeddings, one a class; their length does not matter.
            scale: Of the cosines, exp(logit_scale) of a trained model.
            bias: logit_bias of SigLIP models.
        """
        super().__init__()
        self.tower = tower
        self.register_buffer("prompts", normalize(prompts.detach(), dim=-1))
        self.num_classes = len(prompts)
        self.scale = float(scale)
        self.bias = float(bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C)."""
        return self.scores(self.tower(images))

    def scores(self, features: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch C"]:
        """Logits of image features."""
        cosine: Tensor = normalize(features, dim=-1) @ self.prompts.T
        return cosine * self.scale + self.bias


def with_scores(tower: Split, scores: Callable[[Tensor], Tensor]) -> Split:
    """The split of a tower, whose features become scores."""

    def cut(images: Tensor) -> Cut:
        inner = tower.cut(images)
        readout = inner.readout
        if isinstance(readout, Readout):
            finish = readout.finish
            readout = dataclasses.replace(
                readout, finish=lambda heads, normed, x: scores(finish(heads, normed, x))
            )
        elif isinstance(readout, MeanPool):
            after = readout.finish
            readout = MeanPool(lambda means: scores(after(means)))
        return dataclasses.replace(
            inner, rest=lambda normed, x: scores(inner.rest(normed, x)), readout=readout
        )

    return dataclasses.replace(tower, cut=cut)


def check_prompts(prompts: Sequence[str], templates: Sequence[str]) -> None:
    """Refuse what cannot be prompts and templates.

    Raises:
        InputError: If they are not lists of texts, or a template has no place for the prompt.
    """
    for what, texts in (("prompts", prompts), ("templates", templates)):
        listed = isinstance(texts, Sequence) and not isinstance(texts, str)
        if not listed or not texts or not all(isinstance(one, str) for one in texts):
            raise InputError(f"{what} must be a list of at least one text, got {texts!r}")
    for template in templates:
        if "{}" not in template:
            raise InputError(f"the template {template!r} has no place {{}} for the prompt")


def filled(template: str, prompt: str) -> str:
    """A template with the prompt in its place {}; other braces stay as they are."""
    return template.replace("{}", prompt)
