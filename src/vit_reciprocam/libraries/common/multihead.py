"""PyTorch's nn.MultiheadAttention as an `Attention`."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from vit_reciprocam.core.split import Attention, projections
from vit_reciprocam.libraries.common.changes import has_hooks, kind_of, runs_as
from vit_reciprocam.libraries.common.running import same

__all__ = ["multihead_attention", "multihead_output", "why_unknown_multihead"]


def multihead_attention(
    attention: nn.MultiheadAttention, queries: Float[Tensor, "R D"] | None = None
) -> Attention:
    """Return the attention up to the joined heads.

    A pool has learned `queries`. They are projected in place of the readout tokens.
    """
    a: Any = attention
    if a.in_proj_weight is not None:
        weights = a.in_proj_weight.chunk(3)
    else:  # the tokens are not as wide as the queries
        weights = (a.q_proj_weight, a.k_proj_weight, a.v_proj_weight)
    query, key, value = projections(weights, a.in_proj_bias)

    def project_queries(tokens: Tensor) -> Tensor:  # (B, R, D) -> (B, R, A)
        return query(tokens if queries is None else queries.expand(tokens.shape[0], -1, -1))

    return Attention(
        heads=attention.num_heads,
        scale=attention.head_dim**-0.5,
        query=project_queries,
        key=key,
        value=value,
        query_norm=same,
        key_norm=None,
    )


def multihead_output(
    attention: nn.MultiheadAttention, heads: Float[Tensor, "*batch A"]
) -> Float[Tensor, "*batch D"]:
    """Project the joined heads to the attention's output.

    Its out_proj is not called, because nn.MultiheadAttention does not call it either, so hooks on
    it never run.
    """
    return linear(heads, attention.out_proj.weight, attention.out_proj.bias)


def why_unknown_multihead(attention: nn.Module, what: str) -> str:
    """Return why running the attention, named `what`, by its parts may differ, "" if not."""
    if not runs_as(attention, nn.MultiheadAttention):
        return f"{what} is a {kind_of(attention)}, whose parts are not known"
    if has_hooks(attention):
        return f"{what} has forward hooks"
    a: Any = attention
    if a.bias_k is not None or a.add_zero_attn:
        return f"{what} has keys or values beside those of its tokens"
    return ""
