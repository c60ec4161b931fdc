"""A whole Vision Transformer by its parts: plain data, from which any layer's attention is had.

The libraries' own forward passes give no attention weights where a fused kernel makes them, and
relevance needs the input of every linear layer. So the encoder is described here step by step and
run by `baselines`, which compares the logits with the model's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vit_reciprocam.core.split import Attention, Projection
from vit_reciprocam.errors import ModelError
from vit_reciprocam.libraries import library_of
from vit_reciprocam.libraries.common.whole import has_hooks, not_plain, runs_as

__all__ = ["Encoder", "Layer", "Step", "encoder_of", "refused", "steps", "without_rule"]

Step = Callable[[Tensor], Tensor]
"""A `Projection`, which is linear, or anything else, which acts on each number or normalises."""


@dataclass(frozen=True)
class Layer:
    """An encoder block: y = x + after(attention(before(x))), then y + mlp(y).

    Attributes:
        before: From the residual stream to what the attention reads.
        attention: Up to the joined heads; its query too is a `Projection`.
        after: From the joined heads to what is added.
        mlp: From y to what is added.
    """

    before: tuple[Step, ...]
    attention: Attention
    after: tuple[Step, ...]
    mlp: tuple[Step, ...]


@dataclass(frozen=True)
class Encoder:
    """What follows the embedding of patches.

    Attributes:
        entry: The first block, which the model calls with the tokens (B, T, D).
        layers: From the first to the last.
        norm: Steps on the last layer's output.
        heads: Steps from a readout token to logits, one after the other from the first token on;
            the model's logits are their mean. Empty where the head reads more than these tokens.
        logits: The last layer's output -> logits, by the model's own modules.
    """

    entry: nn.Module
    layers: tuple[Layer, ...]
    norm: tuple[Step, ...]
    heads: tuple[tuple[Step, ...], ...]
    logits: Callable[[Tensor], Tensor]


def encoder_of(model: nn.Module) -> Encoder:
    """A supported model by its parts.

    Raises:
        ModelError: If its parts are not known, or if no token's attention stands for its output;
            says which methods it does have.
    """
    library = library_of(model)
    if library and library.encoder:
        encoder: Encoder = library.encoder(model)
        return encoder
    raise refused(model, "its attention is not known layer by layer")


def refused(model: nn.Module, because: str) -> ModelError:
    """The error that names the model, the reason, and what to use instead."""
    return ModelError(
        f"attention of every layer is not to be had from this {type(model).__name__}: {because}. "
        "Rollout, relevance and raw_attention take class-token models of timm's VisionTransformer, "
        "transformers' ViT, DeiT and DINOv2, and torchvision's VisionTransformer. Use ReciproCAM "
        "or a method that needs no attention"
    )


def steps(*modules: Any) -> tuple[Step, ...]:
    """Modules one after the other; Linear as a `Projection`, Sequential opened, None left out."""
    found: list[Step] = []
    for module in modules:
        if module is None or (runs_as(module, nn.Identity) and not has_hooks(module)):
            continue
        if runs_as(module, nn.Sequential) and not has_hooks(module):
            found += steps(*module)
        elif not not_plain(module, ""):
            found.append(Projection(module.weight, module.bias))
        else:
            found.append(module)
    return tuple(found)


def without_rule(encoder: Encoder) -> str:
    """The step that mixes features and is no plain linear layer, or "" if there is none.

    Relevance passes a LayerNorm, an activation or a LayerScale as it is, which would be wrong here.
    """
    every = [step for layer in encoder.layers for step in (*layer.before, *layer.after, *layer.mlp)]
    every += [*encoder.norm, *(step for head in encoder.heads for step in head)]
    for step in every:
        if isinstance(step, nn.Module) and any(one.ndim > 1 for one in step.parameters()):
            return type(step).__name__
    return ""
