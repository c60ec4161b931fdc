"""Layer-wise relevance propagation through a Vision Transformer (Chefer, Gur, Wolf 2021).

"Transformer Interpretability Beyond Attention Visualization", section 3. A layer's output has
relevance R, and each of its inputs x gets the share that it has in the output Z:

    R_x = x ⊙ (∂Z/∂x)ᵀ (R / Z)

Each rule below is this formula for one kind of layer, with the sum of relevance kept. LayerNorm,
activations, softmax and LayerScale pass relevance on as it is, and biases get none. If the paper is
silent, the rules are those of its authors' public code.

R / Z is large if Z is near 0, so rounding errors grow on the way down, about a million times in
twelve layers. In float32, any code's map differs between machines by some hundredths of its
maximum, on some pictures by much more; in float64 it is the same to nine digits.

Letters of the shapes: b image, T token, D width, C class, in and out features of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import one_hot

from vit_reciprocam.core.split import Attention, Projection, widen
from vit_reciprocam.libraries.common.encoder import Encoder, Layer, Step

__all__ = [
    "Trace",
    "add_rule",
    "copy_rule",
    "linear_rule",
    "matmul_rule",
    "relevance_matrices",
    "run_steps",
    "split_heads",
    "trace_layers",
]

_TINY = 1e-9  # keeps quotients finite, as in the authors' code


def _ratio(r: Tensor, z: Tensor) -> Tensor:
    """Return R / Z, and 0 where Z is 0."""
    near = z + _TINY
    ratio: Tensor = torch.where(z == 0, 0, r / torch.where(near == 0, _TINY, near))
    return ratio


def linear_rule(
    x: Float[Tensor, "*batch in"],
    weight: Float[Tensor, "out in"],
    r: Float[Tensor, "*batch out"],
) -> Float[Tensor, "*batch in"]:
    """Propagate the relevance r of a linear layer's output to its input x.

    Only positive products count: Z = x⁺W⁺ + x⁻W⁻, the αβ rule with α = 1, β = 0.
    """
    x, weight = x.to(r), weight.to(r)
    over, under = x.clamp(min=0), x.clamp(max=0)
    plus, minus = weight.clamp(min=0), weight.clamp(max=0)
    s = _ratio(r, over @ plus.mT + under @ minus.mT)
    return over * (s @ plus) + under * (s @ minus)


def matmul_rule(
    a: Float[Tensor, "*batch m k"],
    b: Float[Tensor, "*batch k n"],
    r: Float[Tensor, "*batch m n"],
) -> tuple[Float[Tensor, "*batch m k"], Float[Tensor, "*batch k n"]]:
    """Propagate the relevance r of a product of matrices, Z = A B, to A and B.

    By the formula alone each factor would get all of the relevance, so both shares are halved.
    """
    a, b = a.to(r), b.to(r)
    s = _ratio(r, a @ b)
    return a * (s @ b.mT) / 2, b * (a.mT @ s) / 2


def add_rule(
    a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"], r: Float[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Propagate the relevance r of a sum, Z = a + b, to a and b, such as a block and its skip path.

    By the formula alone the two shares could grow without bound, with opposite signs. So they are
    scaled (section 3.2): together they sum to the sum of r, in the ratio of the absolute values of
    their own sums. Sums are over each image: over all axes but the first.
    """
    a, b = a.to(r), b.to(r)
    s = _ratio(r, a + b)
    a, b = a * s, b * s
    axes = tuple(range(1, r.ndim))
    sum_a, sum_b, sum_r = (part.sum(dim=axes, keepdim=True) for part in (a, b, r))
    weight = sum_a.abs() + sum_b.abs()
    a = a * _ratio(_ratio(sum_a.abs(), weight) * sum_r, sum_a)
    b = b * _ratio(_ratio(sum_b.abs(), weight) * sum_r, sum_b)
    return a, b


def copy_rule(x: Float[Tensor, "*shape"], *r: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Add up the relevance of one x that is read in several places, with an r for each.

    By the formula, with Z = x in each place, x gets the sum of all r, but none where x is 0.
    """
    x = x.to(r[0])
    return x * torch.stack([_ratio(one, x) for one in r]).sum(dim=0)


class Trace(NamedTuple):
    """What an encoder block computed. A list holds the input of each step, then the last output."""

    x: Tensor  # input of the block (b, T, D)
    before: list[Tensor]  # steps from x to what the attention reads
    query: Tensor  # queries (b, heads, T, head dimension), normed if the block norms them
    key: Tensor  # the same for keys
    value: Tensor
    attention: Tensor  # attention weights (b, heads, T, T)
    after: list[Tensor]  # steps from the joined heads to what is added to x
    y: Tensor  # sum of x and what the attention adds, (b, T, D)
    mlp: list[Tensor]  # steps from y to what is added to y
    out: Tensor  # output of the block (b, T, D)


def run_steps(steps: Sequence[Step], x: Tensor) -> list[Tensor]:
    """Return the input of each step, and the last output."""
    values = [x]
    for step in steps:
        values.append(step(values[-1]))
    return values


def trace_layers(encoder: Encoder, x: Float[Tensor, "b T D"]) -> Iterator[Trace]:
    """Run an encoder on its tokens layer by layer, and yield what each computed."""
    for layer in encoder.layers:  # step by step: fused kernels do not give attention weights
        a = layer.attention
        before = run_steps(layer.before, x)
        query = a.query_norm(split_heads(a, a.query(before[-1])))
        key = split_heads(a, a.key(before[-1]))
        key = key if a.key_norm is None else a.key_norm(key)
        value = split_heads(a, a.value(before[-1]))
        attention = (query @ key.mT * a.scale).softmax(dim=-1)
        after = run_steps(layer.after, (attention @ value).transpose(1, 2).flatten(2))
        y = x + after[-1]
        mlp = run_steps(layer.mlp, y)
        out = y + mlp[-1]
        yield Trace(x, before, query, key, value, attention, after, y, mlp, out)
        x = out


def split_heads(attention: Attention, joined: Tensor) -> Tensor:
    """Split joined heads (..., T, A) into (..., heads, T, head dimension)."""
    apart: Tensor = joined.unflatten(-1, (attention.heads, -1))
    return apart.transpose(-3, -2)


def relevance_matrices(
    encoder: Encoder, tokens: Float[Tensor, "b T D"]
) -> tuple[Float[Tensor, "b C"], Callable[[Tensor], list[Tensor]]]:
    """Return the logits, and a function of targets that returns relevance-weighted attention.

    Section 3.3 of the paper: with R_l the relevance of layer l's attention weights A_l, found by
    propagating relevance from the target's logit down, and ∇A_l the gradient of that logit,

        Ā_l = mean over heads of (∇A_l ⊙ R_l)⁺.

    The function takes targets (b,), one per image, and returns Ā_1 to Ā_L, (b, T, T) each. The
    encoder must have one head per readout token.
    """
    with torch.enable_grad():
        traces = list(trace_layers(encoder, tokens.detach().requires_grad_()))
        normed = run_steps(encoder.norm, traces[-1].out)[-1]
        heads = [run_steps(steps, normed[:, at]) for at, steps in enumerate(encoder.heads)]
        logits = torch.stack([values[-1] for values in heads]).mean(dim=0)

    @torch.no_grad()
    def matrices(targets: Tensor) -> list[Tensor]:
        wanted = one_hot(targets, logits.shape[1]).to(widen(logits))
        gradients = torch.autograd.grad(
            logits, [t.attention for t in traces], wanted.to(logits), retain_graph=True
        )
        r = _heads_relevance(encoder, normed, heads, wanted)
        found = []
        for layer, trace, gradient in zip(
            reversed(encoder.layers), reversed(traces), reversed(gradients), strict=True
        ):
            r, r_attention = _layer_relevance(layer, trace, r)
            found.append((gradient * r_attention).clamp(min=0).mean(dim=1))
        return found[::-1]

    return logits.detach(), matrices


def _heads_relevance(
    encoder: Encoder, tokens: Tensor, heads: Sequence[list[Tensor]], r: Tensor
) -> Tensor:
    """Propagate relevance from the logits (b, C), the classifier heads' mean, to (b, T, D)."""
    each = [r] if len(heads) == 1 else add_rule(heads[0][-1] / 2, heads[1][-1] / 2, r)
    found = torch.zeros_like(tokens, dtype=r.dtype)
    for at, (steps, values, one) in enumerate(zip(encoder.heads, heads, each, strict=True)):
        found[:, at] = copy_rule(values[0], _steps_relevance(steps, values, one))
    return found


def _layer_relevance(layer: Layer, t: Trace, r: Tensor) -> tuple[Tensor, Tensor]:
    """Propagate relevance from a layer's output to x (b, T, D), and to its attention weights."""
    r_y, r_mlp = add_rule(t.y, t.mlp[-1], r)
    r = copy_rule(t.y, r_y, _steps_relevance(layer.mlp, t.mlp, r_mlp))
    r_x, r_after = add_rule(t.x, t.after[-1], r)
    r_heads = split_heads(layer.attention, _steps_relevance(layer.after, t.after, r_after))
    r_attention, r_value = matmul_rule(t.attention, t.value, r_heads)
    r_query, r_key = matmul_rule(t.query, t.key.mT, r_attention)
    r_normed = _projections_relevance(layer.attention, t.before[-1], r_query, r_key.mT, r_value)
    return copy_rule(t.x, r_x, _steps_relevance(layer.before, t.before, r_normed)), r_attention


def _projections_relevance(
    attention: Attention, x: Tensor, r_query: Tensor, r_key: Tensor, r_value: Tensor
) -> Tensor:
    """Propagate relevance from queries, keys and values (b, heads, T, head dimension) to x."""
    assert isinstance(attention.query, Projection)
    total = torch.zeros_like(x, dtype=r_value.dtype)
    shares = (attention.query, r_query), (attention.key, r_key), (attention.value, r_value)
    for projection, r in shares:  # they are one linear layer: no copy rule
        total += linear_rule(x, projection.weight, r.transpose(1, 2).flatten(2))
    return total


def _steps_relevance(steps: Sequence[Step], values: Sequence[Tensor], r: Tensor) -> Tensor:
    """Propagate relevance from the last output of steps to their first input."""
    for step, x in zip(reversed(steps), reversed(values[:-1]), strict=True):
        if isinstance(step, Projection):
            r = linear_rule(x, step.weight, r)
    return r
