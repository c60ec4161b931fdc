"""timm's encoder blocks and attentions by their parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Attention as PlainAttention
from timm.layers import AttentionPoolLatent, AttentionRope, apply_rot_embed_cat
from timm.models import beit, cait, eva
from timm.models import vision_transformer as vit
from timm.models import vision_transformer_relpos as relpos
from torch import Tensor, nn

from vit_reciprocam.core.split import Attention, Projection, Tap, projections
from vit_reciprocam.errors import ModelError
from vit_reciprocam.libraries.common.running import same
from vit_reciprocam.libraries.common.whole import kind_of, not_plain, runs_as, unknown_inside

__all__ = [
    "BlockParts",
    "after_attention_pool",
    "attention_pool",
    "attention_pool_unknown",
    "block_parts",
]

_PRE_NORM = (
    vit.Block,
    relpos.RelPosBlock,
    eva.EvaBlock,
    beit.Block,
    cait.LayerScaleBlockClassAttn,
)
_POST_NORM = (vit.ResPostBlock, relpos.ResPostRelPosBlock, eva.EvaBlockPostNorm)
_ATTENTIONS = (
    PlainAttention,
    AttentionRope,
    eva.EvaAttention,
    beit.Attention,
    relpos.RelPosAttention,
    cait.ClassAttn,
)


@dataclass(frozen=True)
class BlockParts:
    """An encoder block as an adapter needs it.

    `options` are the keywords that the model calls it with, such as a position embedding.

    Attributes:
        tap: Where F stands in the block.
        attention: (options, readout tokens R) -> the attention by its parts.
        after: (joined heads, F, X), of the readout tokens -> the block's output.
        unknown: Why attention and after cannot be used; empty where they can.
    """

    tap: Tap
    attention: Callable[[dict[str, Any], int], Attention]
    after: Callable[[Tensor, Tensor, Tensor], Tensor]
    unknown: str


def block_parts(block: nn.Module) -> BlockParts:
    """An encoder block by its parts.

    Raises:
        ModelError: If it has no LayerNorm or attention to cut at.
    """
    b: Any = block
    if isinstance(block, _POST_NORM):
        # its LayerNorms follow attention and MLP: what the attention reads is the stream itself
        return BlockParts(
            tap=Tap((b.attn,), "input"),
            attention=lambda options, tokens: _attention(b.attn, options, tokens),
            after=lambda heads, f, x: _post_norm(b, _out(b.attn, heads, f), x),
            unknown=_unknown(block, _POST_NORM, (), b.attn),
        )
    if isinstance(block, vit.ParallelThingsBlock):
        return _parallel_things(b)
    if isinstance(getattr(block, "in_norm", None), nn.Module):
        return _parallel_scaling(b)
    if isinstance(getattr(block, "norm1", None), nn.Module):
        attn = getattr(b, "attn", None)
        return BlockParts(
            tap=Tap((b.norm1,)),
            attention=lambda options, tokens: _attention(attn, options, tokens),
            after=lambda heads, f, x: _pre_norm(b, _out(attn, heads, f), x),
            unknown=_unknown(block, _PRE_NORM, (b.norm1,), attn),
        )
    raise ModelError(
        f"the last encoder block is a {type(block).__name__}, which is not supported: it has no "
        "LayerNorm by the name of norm1, which is where this method cuts"
    )


def _unknown(
    block: nn.Module, kinds: tuple[type, ...], norms: Sequence[nn.Module], *attentions: Any
) -> str:
    """Why running the parts would not be running the block; empty if it would."""
    if not runs_as(block, *kinds):
        return f"the last block is a {kind_of(block)}, whose parts are not known"
    for attention in attentions:
        if not runs_as(attention, *_ATTENTIONS):
            return (
                f"the last block's attention is a {kind_of(attention)}, whose parts are not known"
            )
    for module in (block, *attentions):
        for name in ("in_proj", "qkv", "q", "k", "v", "q_proj", "k_proj", "v_proj"):
            linear = getattr(module, name, None)
            because = linear is not None and not_plain(
                linear, f"the last block's {name} projection"
            )
            if because:
                return because
    return unknown_inside(block, "timm", "the last block", *norms)


def _pre_norm(block: Any, attended: Tensor, x: Tensor) -> Tensor:
    x = x + _branch(block, attended, 1)
    y: Tensor = x + _branch(block, block.mlp(block.norm2(x)), 2)
    return y


def _post_norm(block: Any, attended: Tensor, x: Tensor) -> Tensor:
    x = x + block.drop_path1(block.norm1(attended))
    y: Tensor = x + block.drop_path2(block.norm2(block.mlp(x)))
    return y


def _branch(block: Any, value: Tensor, number: int) -> Tensor:
    """A residual branch: LayerScale, as a module or a parameter, and stochastic depth."""
    gamma = getattr(block, f"gamma_{number}", None)
    scaled = gamma * value if gamma is not None else getattr(block, f"ls{number}", same)(value)
    path = getattr(block, f"drop_path{number}", None) or block.drop_path
    branch: Tensor = path(scaled)
    return branch


def _out(attention: Any, heads: Tensor, normed: Tensor) -> Tensor:
    """From the joined heads to the attention's output."""
    heads = getattr(attention, "norm", same)(heads)
    if getattr(attention, "gate", None) is not None:
        heads = heads * attention.gate(normed).sigmoid()
    out: Tensor = attention.proj_drop(attention.proj(heads))
    return out


def _attention(attention: Any, options: dict[str, Any], tokens: int) -> Attention:
    query, key, value = _projections(attention)
    key_norm = getattr(attention, "k_norm", None)
    rope = options.get("rope")
    half = getattr(attention, "rotate_half", False)

    def rotate(keys: Tensor) -> Tensor:
        turned: Tensor = apply_rot_embed_cat(keys.transpose(1, 2), rope, half=half)
        return turned.transpose(1, 2).type_as(keys)

    return Attention(
        heads=attention.num_heads,
        scale=attention.scale,
        query=query,
        key=key,
        value=value,
        query_norm=getattr(attention, "q_norm", same),
        key_norm=None if isinstance(key_norm, nn.Identity) else key_norm,
        rotate=None if rope is None else rotate,
        bias=_bias(attention, options, tokens),
    )


def _projections(attention: Any) -> list[Projection]:
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
    return [query, *(_every_head(one, attention, groups) for one in (key, value))]


def _every_head(projection: Projection, attention: Any, groups: int) -> Projection:
    """Keys or values of grouped-query attention, once for each head that shares them."""
    if groups == 1:
        return projection

    def repeat(rows: Tensor) -> Tensor:
        heads: Tensor = rows.unflatten(0, (-1, attention.head_dim))
        return heads.repeat_interleave(groups, 0).flatten(0, 1)

    bias = projection.bias
    return Projection(repeat(projection.weight), None if bias is None else repeat(bias))


def _bias(attention: Any, options: dict[str, Any], tokens: int) -> Tensor | None:
    """What relative position adds to the scores of the first tokens, (T, tokens, heads)."""
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
    asked: Tensor = bias.reshape(-1, *bias.shape[-3:])[0, :, :tokens].permute(2, 1, 0)
    return asked


def _parallel_scaling(block: Any) -> BlockParts:
    """Attention and MLP side by side after one LayerNorm, as in ViT-22B: both are masked."""

    def attention(options: dict[str, Any], tokens: int) -> Attention:
        joint = block.in_proj
        _, query, key, value = projections(joint.weight.split(block.in_split), joint.bias)
        return Attention(
            heads=block.num_heads,
            scale=block.scale,
            query=query,
            key=key,
            value=value,
            query_norm=block.q_norm,
            key_norm=None if isinstance(block.k_norm, nn.Identity) else block.k_norm,
        )

    def after(heads: Tensor, normed: Tensor, x: Tensor) -> Tensor:
        hidden = block.in_proj(normed).split(block.in_split, dim=-1)[0]
        if block.mlp_bias is not None:
            hidden = hidden + block.mlp_bias
        hidden = block.mlp_drop(block.mlp_act(hidden))
        if block.out_proj is not None:
            out = block.out_proj(torch.cat([heads, hidden], dim=-1))
        else:
            out = block.attn_out_proj(heads) + block.mlp_out_proj(hidden)
        y: Tensor = x + block.drop_path(block.ls(out))
        return y

    return BlockParts(
        tap=Tap((block.in_norm,)),
        attention=attention,
        after=after,
        unknown=_unknown(block, (vit.ParallelScalingBlock,), (block.in_norm,)),
    )


def _parallel_things(block: Any) -> BlockParts:
    """Several attentions side by side, each with its LayerNorm, then several MLPs (Touvron 2022).

    F holds the output of each LayerNorm, one after the other along the width, and the attentions
    are one with all their heads.
    """
    branches = list(block.attns)
    count = len(branches)

    def attention(options: dict[str, Any], tokens: int) -> Attention:
        every = [_attention(branch.attn, options, tokens) for branch in branches]
        first = every[0]
        return Attention(
            heads=sum(one.heads for one in every),
            scale=first.scale,
            query=_block_diagonal([one.query for one in every]),
            key=_block_diagonal([one.key for one in every]),
            value=_block_diagonal([one.value for one in every]),
            query_norm=first.query_norm,
            key_norm=first.key_norm,
        )

    def after(heads: Tensor, normed: Tensor, x: Tensor) -> Tensor:
        own = zip(branches, heads.chunk(count, -1), normed.chunk(count, -1), strict=True)
        attended = [b.drop_path(b.ls(_out(b.attn, h, f))) for b, h, f in own]
        x = x + torch.stack(attended).sum(dim=0)
        return x + torch.stack([mlp(x) for mlp in block.ffns]).sum(dim=0)

    input_norms, attentions = [b.norm for b in branches], [b.attn for b in branches]
    unknown = _unknown(block, (vit.ParallelThingsBlock,), input_norms, *attentions)
    norms = [branch.attn.q_norm for branch in branches]
    if not unknown and not all(isinstance(norm, nn.Identity) for norm in norms):
        unknown = "the last block's parallel attentions have query and key norms"
    return BlockParts(
        tap=Tap(tuple(branch.norm for branch in branches)),
        attention=attention,
        after=after,
        unknown=unknown,
    )


def _block_diagonal(every: list[Any]) -> Projection:
    weight = torch.block_diag(*(one.weight for one in every))
    if every[0].bias is None:
        return Projection(weight, None)
    return Projection(weight, torch.cat([one.bias for one in every]))


def attention_pool_unknown(pool: Any) -> str:
    """Why a pooling head's attention has no closed form; empty if it has."""
    if not runs_as(pool, AttentionPoolLatent):
        return f"the head pools by a {kind_of(pool)}, whose parts are not known"
    if pool.pos_embed is not None:
        return "the attention pool adds a position embedding to the tokens"
    because = not_plain(pool.kv, "the attention pool's kv projection")
    return because or unknown_inside(pool, "timm", "the attention pool")


def attention_pool(pool: Any) -> Attention:
    """The attention of a pooling head: learned queries, so no token asks."""
    key, value = projections(pool.kv.weight.chunk(2), pool.kv.bias)
    return Attention(
        heads=pool.num_heads,
        scale=pool.scale,
        query=lambda tokens: pool.q(pool.latent).expand(tokens.shape[0], -1, -1),
        key=key,
        value=value,
        query_norm=pool.q_norm,
        key_norm=None if isinstance(pool.k_norm, nn.Identity) else pool.k_norm,
    )


def after_attention_pool(pool: Any, heads: Tensor) -> Tensor:
    """From the joined heads (..., R, A) to the pooled features (..., D)."""
    x = pool.proj_drop(pool.proj(heads))
    if pool.mlp is not None:
        x = x + pool.mlp(pool.norm(x))
    if pool.pool == "token":
        x = x[..., 0, :]
    elif pool.pool == "avg":
        x = x.mean(-2)
    pooled: Tensor = x
    return pooled
