"""The trace: how much each patch, as the blocks read it, adds to a class's log-probability.

Hold what the plain pass computed constant where the network is not linear: the attention A, each
norm's deviation σ and each activation's gate Φ(u), such as GELU(u) = u Φ(u). Then the network is
linear in its tokens, and a row vector g goes backwards through it by transposed weights alone:

    g = (W_head[c] - p W_head) through the final norm, at the readout tokens, 0 elsewhere
    for l = L … 1:   g ← g + norm2ᵀ(((g W₂) ⊙ Φ(u_l)) W₁)
                     g ← g + norm1ᵀ((Aᵀ (g W_o)) W_v)
                     t_n ← t_n + <x_l[n], g[n]>
    normᵀ(y) = (y ⊙ w - mean(y ⊙ w)) / σ

x_l is the residual stream into block l, p the probabilities, and t is in nats, with its sign. No
automatic differentiation is used. These are the rules of LibraGrad's FullGrad+ (Mehri et al.,
CVPR 2025), but with log p_c in place of the logit, and without the biases' part.

Letters of the shapes: K targets, b image, T token, R readout tokens, D width, C class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot

from vit_reciprocam.core.split import Projection, widen
from vit_reciprocam.errors import ModelError
from vit_reciprocam.libraries.common.encoder import Encoder, Layer, Step
from vit_reciprocam.methods.lrp import Trace, run_steps, split_heads, trace_layers

__all__ = ["trace_rows"]


def trace_rows(
    encoder: Encoder, tokens: Float[Tensor, "b T D"], targets: Int[Tensor, "b K"]
) -> tuple[Float[Tensor, "b K T"], Float[Tensor, "b C"]]:
    """Return the trace of each token for each target, and the logits."""
    layers = list(trace_layers(encoder, tokens))
    normed = run_steps(encoder.norm, layers[-1].out)
    heads = [run_steps(steps, normed[-1][:, at]) for at, steps in enumerate(encoder.heads)]
    logits = torch.stack([values[-1] for values in heads]).mean(dim=0)
    probabilities = widen(logits).softmax(dim=-1)
    change = (one_hot(targets.T, logits.shape[1]) - probabilities).to(logits)  # (K, b, C)
    rows = torch.stack(
        [
            _transpose_steps(steps, values, change / len(heads))
            for steps, values in zip(encoder.heads, heads, strict=True)
        ],
        dim=2,
    )
    readers = slice(len(heads))
    g = _transpose_steps(encoder.norm, [one[:, readers] for one in normed], rows)
    total = g.new_zeros(*g.shape[:2], tokens.shape[1])
    for layer, trace in zip(reversed(encoder.layers), reversed(layers), strict=True):
        g = _transpose_layer(layer, trace, g)
        total = total + (g * trace.x).sum(dim=-1)
    return total.transpose(0, 1), logits


def _transpose_layer(layer: Layer, t: Trace, g: Float[Tensor, "K b r D"]) -> Tensor:
    """Return g of the block's input (K, b, T, D) for that of the first r tokens of its output."""
    first = slice(g.shape[2])  # only the readout tokens' rows leave the last block
    g = g + _transpose_steps(layer.mlp, [one[:, first] for one in t.mlp], g)
    through = split_heads(
        layer.attention, _transpose_steps(layer.after, [one[:, first] for one in t.after], g)
    )
    read = (t.attention[:, :, first].mT @ through).transpose(2, 3).flatten(3)  # (K, b, T, A)
    read = _transpose_steps(layer.before, t.before, read @ layer.attention.value.weight)
    read[:, :, first] += g
    return read


def _transpose_steps(steps: Sequence[Step], values: Sequence[Tensor], g: Tensor) -> Tensor:
    """Return g of the first step's input for that of the last step's output."""
    for step, x, y in zip(
        reversed(steps), reversed(values[:-1]), reversed(values[1:]), strict=True
    ):
        g = _transpose(step, x, y, g)
    return g


def _transpose(step: Any, x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    """Return g of a step's input x for that of its output y, with its non-linear part constant."""
    if isinstance(step, Projection):
        return g @ step.weight
    weight = getattr(step, "weight", None)
    if isinstance(step, nn.LayerNorm):
        g = g if weight is None else g * weight
        deviation = (x.var(dim=-1, correction=0, keepdim=True) + step.eps).sqrt()
        return (g - g.mean(dim=-1, keepdim=True)) / deviation
    if not any(True for _ in step.parameters()):  # an activation, x times a gate
        half = torch.where(x == 0, 0.5, y / x)  # GELU's and SiLU's gates are 1/2 at 0
        return g * half
    if (
        all(parameter.ndim == 1 for parameter in step.parameters())
        and "Scale" in type(step).__name__
    ):
        scale: Tensor = g * step(torch.ones_like(x[:1, :1]))
        return scale
    raise ModelError(f"the trace has no rule for a {type(step).__name__}")
