"""PyTorch's nn.MultiheadAttention, and libraries' own attentions, as an `Attention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from vit_reciprocam.core.split import Attention, projections
from vit_reciprocam.libraries.common.changes import has_hooks, kind_of, runs_as
from vit_reciprocam.libraries.common.running import same

__all__ = [
    "multihead_attention",
    "multihead_output",
    "normed_attention",
    "why_unknown_multihead",
]


def normed_attention(
    module: Any, projected: Sequence[Any], query_norm: nn.Module, key_norm: nn.Module, **more: Any
) -> Attention:
    """Return the attention of a module with `num_heads`, `scale`, and norms of queries and keys."""
    query, key, value = projected  # functions of tokens
    known = None if isinstance(key_norm, nn.Identity) else key_norm
    return Attention(module.num_heads, module.scale, query, key, value, query_norm, known, **more)


def multihead_attention(
    attention: nn.MultiheadAttention, queries: Float[Tensor, "R D"] | None = None
) -> Attention:
    """Return the attention up to the joined heads; learned `queries` replace those of tokens."""
    a: Any = attention
    if a.in_proj_weight is not None:
        weights = a.in_proj_weight.chunk(3)
    else:  # the tokens are not as wide as the queries
        weights = (a.q_proj_weight, a.k_proj_weight, a.v_proj_weight)
    query, key, value = projections(weights, a.in_proj_bias)

    def project_queries(tokens: Tensor) -> Tensor:  # (B, R, D) -> (B, R, A)
        return query(tokens if queries is None else queries.expand(tokens.shape[0], -1, -1))

    scale = attention.head_dim**-0.5
    return Attention(attention.num_heads, scale, project_queries, key, value, same, None)


def multihead_output(
    attention: nn.MultiheadAttention, heads: Float[Tensor, "*batch A"]
) -> Float[Tensor, "*batch D"]:
    """Project the joined heads to the attention's output."""
    # nn.MultiheadAttention does not call its out_proj either, so hooks on it never run
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
