"""PyTorch's own nn.MultiheadAttention by its parts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from vit_reciprocam.core.split import Attention, projections
from vit_reciprocam.libraries.common.running import same
from vit_reciprocam.libraries.common.whole import has_hooks, kind_of, runs_as

__all__ = ["multihead_attention", "multihead_output", "multihead_unknown"]


def multihead_attention(
    attention: nn.MultiheadAttention, asking: Tensor | None = None
) -> Attention:
    """Up to the joined heads.

    Args:
        attention: The module.
        asking: (R, D) of a pool that has learned queries, so that no token asks.
    """
    a: Any = attention
    if a.in_proj_weight is not None:
        weights = a.in_proj_weight.chunk(3)
    else:  # tokens of another width than the queries
        weights = (a.q_proj_weight, a.k_proj_weight, a.v_proj_weight)
    query, key, value = projections(weights, a.in_proj_bias)

    def ask(tokens: Tensor) -> Tensor:
        return query(tokens if asking is None else asking.expand(tokens.shape[0], -1, -1))

    return Attention(
        heads=attention.num_heads,
        scale=attention.head_dim**-0.5,
        query=ask,
        key=key,
        value=value,
        query_norm=same,
        key_norm=None,
    )


def multihead_output(attention: nn.MultiheadAttention, heads: Tensor) -> Tensor:
    """From the joined heads to its output; like the module, without calling its out_proj."""
    return linear(heads, attention.out_proj.weight, attention.out_proj.bias)


def multihead_unknown(attention: nn.Module, what: str = "the last block's attention") -> str:
    """Why running the parts would not be running the attention; empty if it would."""
    if not runs_as(attention, nn.MultiheadAttention):
        return f"{what} is a {kind_of(attention)}, whose parts are not known"
    if has_hooks(attention):
        return f"{what} has forward hooks"
    a: Any = attention
    if a.bias_k is not None or a.add_zero_attn:
        return f"{what} has keys or values beside those of its tokens"
    return ""
