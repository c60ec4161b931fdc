"""timm's attentions and its pooling by attention, each as an `Attention`."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from timm.layers import Attention as PlainAttention
from timm.layers import AttentionPoolLatent, AttentionRope, apply_rot_embed_cat
from timm.models import beit, cait, eva
from timm.models import vision_transformer_relpos as relpos
from torch import Tensor, nn

from vit_reciprocam.core.split import Attention, Projection, projections
from vit_reciprocam.libraries.common.changes import kind_of, runs_as, why_not_linear, why_unknown
from vit_reciprocam.libraries.common.multihead import normed_attention
from vit_reciprocam.libraries.common.running import same

__all__ = [
    "ATTENTIONS",
    "block_diagonal",
    "describe_attention",
    "describe_pool",
    "finish_pool",
    "project_heads",
    "why_unknown_pool",
]

ATTENTIONS = (
    PlainAttention,
    AttentionRope,
    eva.EvaAttention,
    beit.Attention,
    relpos.RelPosAttention,
    cait.ClassAttn,
)


def describe_attention(attention: Any, options: dict[str, Any], tokens: int) -> Attention:
    """Return the attention of a block, which the model calls with these keyword arguments."""
    norms = [getattr(attention, name, nn.Identity()) for name in ("q_norm", "k_norm")]
    rope = options.get("rope")
    half = getattr(attention, "rotate_half", False)

    def rotate(keys: Tensor) -> Tensor:  # (B, N, heads, head dimension); timm has heads before N
        turned: Tensor = apply_rot_embed_cat(keys.transpose(1, 2), rope, half=half)
        return turned.transpose(1, 2).type_as(keys)

    return normed_attention(
        attention,
        _projections(attention),
        *norms,
        rotate=None if rope is None else rotate,
        bias=_bias(attention, options, tokens),
    )


def _projections(attention: Any) -> list[Projection]:
    """Return the projections to query, key and value, from one joint layer or three."""
    if getattr(attention, "qkv", None) is not None:
        query, key, value = projections(attention.qkv.weight.chunk(3), attention.qkv.bias)
        if getattr(attention, "q_bias", None) is not None:  # k_bias is a buffer of zeros
            query = Projection(query.weight, attention.q_bias)
            value = Projection(value.weight, attention.v_bias)
    else:
        names = ("q_proj", "k_proj", "v_proj") if hasattr(attention, "q_proj") else ("q", "k", "v")
        linears = [getattr(attention, name) for name in names]
        query, key, value = (Projection(one.weight, one.bias) for one in linears)
    groups = getattr(attention, "num_kv_groups", 1)
    return [query, *(_repeat_groups(one, attention, groups) for one in (key, value))]


def _repeat_groups(projection: Projection, attention: Any, groups: int) -> Projection:
    """Repeat the keys or values of grouped-query attention for each head that shares them."""
    if groups == 1:
        return projection

    def repeat(rows: Tensor) -> Tensor:
        heads: Tensor = rows.unflatten(0, (-1, attention.head_dim))
        return heads.repeat_interleave(groups, 0).flatten(0, 1)

    bias = projection.bias
    return Projection(repeat(projection.weight), None if bias is None else repeat(bias))


def _bias(attention: Any, options: dict[str, Any], tokens: int) -> Tensor | None:
    """Return what relative position adds to the readout tokens' scores, (T, tokens, heads)."""
    # a bias that all blocks share is passed to the block, under BEiT's or ViTRelPos's name for it
    shared = options.get("shared_rel_pos_bias", options.get("shared_rel_pos"))
    if getattr(attention, "relative_position_bias_table", None) is not None:
        own = attention._get_rel_pos_bias()
        bias = own if shared is None else own + shared
    elif getattr(attention, "rel_pos", None) is not None:
        bias = attention.rel_pos.get_bias()
    else:
        bias = shared
    if bias is None:
        return None
    readout: Tensor = bias.reshape(-1, *bias.shape[-3:])[0, :, :tokens].permute(2, 1, 0)
    return readout


def project_heads(
    attention: Any, heads: Float[Tensor, "*batch A"], normed: Float[Tensor, "*batch D"]
) -> Float[Tensor, "*batch D"]:
    """Return the attention's output for joined heads and F, which a gate reads."""
    heads = getattr(attention, "norm", same)(heads)
    if getattr(attention, "gate", None) is not None:
        heads = heads * attention.gate(normed).sigmoid()
    out: Tensor = attention.proj_drop(attention.proj(heads))
    return out


def block_diagonal(every: list[Any]) -> Projection:
    """Join projections into one, in which each has its own share of the width."""
    weight = torch.block_diag(*(one.weight for one in every))
    if every[0].bias is None:
        return Projection(weight, None)
    return Projection(weight, torch.cat([one.bias for one in every]))


def why_unknown_pool(pool: Any) -> str:
    """Return why a head that pools by attention has no closed form, "" if it has one."""
    if not runs_as(pool, AttentionPoolLatent):
        return f"the head pools by a {kind_of(pool)}, whose parts are not known"
    if pool.pos_embed is not None:
        return "the attention pool adds a position embedding to the tokens"
    because = why_not_linear(pool.kv, "the attention pool's kv projection")
    return because or why_unknown(pool, "timm", "the attention pool")


def describe_pool(pool: Any) -> Attention:
    """Return the attention of a pool, whose queries are learned instead of made from tokens."""

    def query(tokens: Tensor) -> Tensor:
        queries: Tensor = pool.q(pool.latent)
        return queries.expand(tokens.shape[0], -1, -1)

    joint = projections(pool.kv.weight.chunk(2), pool.kv.bias)
    return normed_attention(pool, [query, *joint], pool.q_norm, pool.k_norm)


def finish_pool(pool: Any, heads: Float[Tensor, "*batch R A"]) -> Float[Tensor, "*batch D"]:
    """Return the pooled features for the joined heads of the pool's queries."""
    x = pool.proj_drop(pool.proj(heads))
    if pool.mlp is not None:
        x = x + pool.mlp(pool.norm(x))
    if pool.pool == "token":
        x = x[..., 0, :]
    elif pool.pool == "avg":
        x = x.mean(-2)
    pooled: Tensor = x
    return pooled
