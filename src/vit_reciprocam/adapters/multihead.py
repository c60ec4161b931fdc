"""PyTorch's own nn.MultiheadAttention by its parts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from vit_reciprocam.adapters.parts import has_hooks, same
from vit_reciprocam.split import Attention, Projection

__all__ = ["multihead_attention", "multihead_output", "multihead_unknown"]


def multihead_attention(attention: nn.MultiheadAttention) -> Attention:
    """Up to the joined heads."""
    weights = attention.in_proj_weight.chunk(3)
    bias: Any = attention.in_proj_bias
    biases = [None] * 3 if bias is None else bias.chunk(3)
    query, key, value = (Projection(w, b) for w, b in zip(weights, biases, strict=True))
    return Attention(
        heads=attention.num_heads,
        scale=attention.head_dim**-0.5,
        query=query,
        key=key,
        value=value,
        query_norm=same,
        key_norm=None,
    )


def multihead_output(attention: nn.MultiheadAttention, heads: Tensor) -> Tensor:
    """From the joined heads to its output; like the module, without calling its out_proj."""
    return linear(heads, attention.out_proj.weight, attention.out_proj.bias)


def multihead_unknown(attention: nn.Module) -> str:
    """Why running the parts would not be running the attention; empty if it would."""
    if type(attention).forward is not nn.MultiheadAttention.forward:
        kind = type(attention).__name__
        return f"the last block's attention is a {kind}, whose parts are not known"
    if has_hooks(attention):
        return "the last block's attention has forward hooks"
    a: Any = attention
    if a.in_proj_weight is None or a.bias_k is not None or a.add_zero_attn:
        return "the last block's attention has keys or values beside those of its tokens"
    return ""
