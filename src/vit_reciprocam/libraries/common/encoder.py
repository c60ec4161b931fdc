"""A whole Vision Transformer, step by step: plain data for methods that need every attention.

If a fused kernel computes attention, a library's own forward pass never holds the attention
weights, and relevance needs the input of every linear layer. So the encoder is described here step
by step. `methods.baselines` runs the steps, and compares the logits with the model's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vit_reciprocam.core.split import Attention, Projection
from vit_reciprocam.errors import ModelError
from vit_reciprocam.libraries import LIBRARIES, library_of
from vit_reciprocam.libraries.common.changes import has_hooks, runs_as, why_not_linear

__all__ = ["Encoder", "Layer", "Step", "encoder_of", "no_encoder", "step_without_rule", "steps"]

Step = Callable[[Tensor], Tensor]
"""A function of tokens (..., D): a linear layer as a `Projection`, an activation, or a norm."""


@dataclass(frozen=True)
class Layer:
    """An encoder block: y = x + after(attention(before(x))), then y + mlp(y).

    Attributes:
        before: The steps from the residual stream x to what the attention reads.
        attention: The attention up to the joined heads; its query is a `Projection` too.
        after: The steps from the joined heads to what is added to x.
        mlp: The steps from y to what is added to y.
    """

    before: tuple[Step, ...]
    attention: Attention
    after: tuple[Step, ...]
    mlp: tuple[Step, ...]


@dataclass(frozen=True)
class Encoder:
    """The part of a model that follows the embedding of patches.

    Attributes:
        entry: The first block, which the model calls with the tokens (B, T, D).
        layers: The encoder blocks, from the first to the last.
        norm: The steps on the last layer's output.
        heads: Steps from each readout token, in the order of the tokens, to its logits; the model's
            logits are their mean. Empty if the head reads more than these tokens.
        logits: The last layer's output (B, T, D) -> logits (B, C), by the model's own modules.
    """

    entry: nn.Module
    layers: tuple[Layer, ...]
    norm: tuple[Step, ...]
    heads: tuple[tuple[Step, ...], ...]
    logits: Callable[[Tensor], Tensor]


def encoder_of(model: nn.Module) -> Encoder:
    """Return the `Encoder` of a model; refuse one whose attention is not known in every layer."""
    library = library_of(model)
    if library and library.encoder:
        encoder: Encoder = library.encoder(model)
        return encoder
    raise no_encoder(model, "its attention is not known layer by layer")


def no_encoder(model: nn.Module, because: str) -> ModelError:
    """Return the error that names a model, the reason, and what to use instead."""
    known = "; ".join(f"{one.module}: {one.encodes}" for one in LIBRARIES.values() if one.encodes)
    return ModelError(
        f"attention of every layer is not available from this {type(model).__name__}: {because}. "
        f"Rollout, relevance and raw_attention take class-token models ({known}). Use ReciproCAM "
        "or a method that needs no attention"
    )


def steps(*modules: Any) -> tuple[Step, ...]:
    """Return the steps of modules that run one after the other.

    A Linear becomes a `Projection`, a Sequential its modules; None and Identity are left out. A
    module with hooks or with a forward of its own stays as it is, so that calling it runs them.
    """
    found: list[Step] = []
    for module in modules:
        if module is None or (runs_as(module, nn.Identity) and not has_hooks(module)):
            continue
        if runs_as(module, nn.Sequential) and not has_hooks(module):
            found += steps(*module)
        elif not why_not_linear(module, ""):
            found.append(Projection(module.weight, module.bias))
        else:
            found.append(module)
    return tuple(found)


def step_without_rule(encoder: Encoder) -> str:
    """Return the class of a step that mixes features and is not a plain Linear, "" if none does.

    Relevance passes through a step without a rule as it is. That is right for a LayerNorm, an
    activation or a LayerScale, whose parameters have one dimension, and wrong for such a step.
    """
    every = [step for layer in encoder.layers for step in (*layer.before, *layer.after, *layer.mlp)]
    every += [*encoder.norm, *(step for head in encoder.heads for step in head)]
    for step in every:
        if isinstance(step, nn.Module) and any(one.ndim > 1 for one in step.parameters()):
            return type(step).__name__
    return ""
