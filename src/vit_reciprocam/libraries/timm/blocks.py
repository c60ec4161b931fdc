"""What the closed form needs to know of timm's encoder blocks, attentions and attention pools."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import Attention as PlainAttention
from timm.layers import AttentionPoolLatent, AttentionRope, apply_rot_embed_cat
from timm.models import beit, cait, eva
from timm.models import vision_transformer as vit
from timm.models import vision_transformer_relpos as relpos
from torch import Tensor, nn

from vit_reciprocam.core.split import Attention, Projection, Tap, projections
from vit_reciprocam.errors import ModelError
from vit_reciprocam.libraries.common.changes import kind_of, runs_as, why_not_linear, why_unknown
from vit_reciprocam.libraries.common.multihead import normed_attention
from vit_reciprocam.libraries.common.running import Grid, same
from vit_reciprocam.libraries.common.split import BlockDescription

__all__ = ["describe_block", "describe_pool", "finish_pool", "why_unknown_pool"]

_ATTENTIONS = (
    PlainAttention,
    AttentionRope,
    eva.EvaAttention,
    beit.Attention,
    relpos.RelPosAttention,
    cait.ClassAttn,
)
_POST_NORM = (vit.ResPostBlock, relpos.ResPostRelPosBlock, eva.EvaBlockPostNorm)
_BLOCKS = (
    vit.Block,
    relpos.RelPosBlock,
    eva.EvaBlock,
    beit.Block,
    cait.LayerScaleBlockClassAttn,
    *_POST_NORM,
)


def describe_block(block: Any, what: str = "the last block") -> BlockDescription:
    """Describe a block, which error texts call `what`; refuse one without a LayerNorm to cut at."""
    if isinstance(block, vit.ParallelThingsBlock):
        return _describe_parallel_things(block, what)
    if isinstance(getattr(block, "in_norm", None), nn.Module):
        return _describe_parallel_scaling(block, what)
    attention = getattr(block, "attn", None)
    norms: list[Any] = []
    if isinstance(block, _POST_NORM):
        # its LayerNorms follow attention and MLP: what the attention reads is the stream itself
        tap, finish = Tap((block.attn,), "input"), _finish_post_norm
    elif isinstance(getattr(block, "norm1", None), nn.Module):
        tap, finish, norms = Tap((block.norm1,)), _finish_pre_norm, [block.norm1]
    else:
        raise ModelError(
            f"{what.replace('last', 'last encoder')} is a {type(block).__name__}, which is not "
            "supported: it has no LayerNorm by the name of norm1, which is where this method cuts"
        )
    return BlockDescription(
        tap=tap,
        attention=lambda _grid, options, tokens: _describe_attention(attention, options, tokens),
        finish=lambda heads, f, x: finish(block, _project_heads(attention, heads, f), x),
        why_unknown=lambda: _why_unknown_block(block, what, _BLOCKS, norms, attention),
        projections=_find_projections(attention),
    )


def _find_projections(attention: Any) -> list[tuple[nn.Module, slice]]:
    """Return the modules that project keys and values, each with its part of their output."""
    joint = getattr(attention, "qkv", None)
    if (
        getattr(attention, "num_kv_groups", 1) != 1
        or getattr(attention, "q_bias", None) is not None
    ):
        return []  # shared by several heads, or the weight is used without its module
    if isinstance(joint, nn.Linear):
        width = joint.out_features // 3
        return [(joint, slice(width, 2 * width)), (joint, slice(2 * width, None))]
    names = ("k_proj", "v_proj") if hasattr(attention, "k_proj") else ("k", "v")
    modules = [getattr(attention, name, None) for name in names]
    return [(one, slice(None)) for one in modules if isinstance(one, nn.Linear)]


def _why_unknown_block(
    block: nn.Module,
    what: str,
    kinds: tuple[type, ...],
    norms: Sequence[nn.Module],
    *attentions: Any,
) -> str:
    """Return why running a block by its parts may differ from calling it, or "".

    The forward of the classes `kinds` is known; the norms are called as they are, on all tokens.
    """
    if not runs_as(block, *kinds):
        return f"{what} is a {kind_of(block)}, whose parts are not known"
    for attention in attentions:
        if not runs_as(attention, *_ATTENTIONS):
            return f"{what}'s attention is a {kind_of(attention)}, whose parts are not known"
    for module in (block, *attentions):
        for name in ("in_proj", "qkv", "q", "k", "v", "q_proj", "k_proj", "v_proj"):
            linear = getattr(module, name, None)
            because = linear is not None and why_not_linear(linear, f"{what}'s {name} projection")
            if because:
                return because
    return why_unknown(block, "timm", what, *norms)


def _finish_pre_norm(
    block: Any, attended: Float[Tensor, "*batch D"], x: Float[Tensor, "*batch D"]
) -> Float[Tensor, "*batch D"]:
    """Run the rest of a block whose LayerNorms precede attention and MLP."""
    x = x + _branch(block, attended, 1)
    y: Tensor = x + _branch(block, block.mlp(block.norm2(x)), 2)
    return y


def _finish_post_norm(
    block: Any, attended: Float[Tensor, "*batch D"], x: Float[Tensor, "*batch D"]
) -> Float[Tensor, "*batch D"]:
    """Run the rest of a block whose LayerNorms follow attention and MLP."""
    x = x + block.drop_path1(block.norm1(attended))
    y: Tensor = x + block.drop_path2(block.norm2(block.mlp(x)))
    return y


def _branch(block: Any, value: Float[Tensor, "*batch D"], number: int) -> Float[Tensor, "*batch D"]:
    """Apply LayerScale and stochastic depth to what a residual branch adds.

    LayerScale is a parameter, gamma_1, in some classes and a module, ls1, in others. Stochastic
    depth is drop_path1 in some, drop_path for both branches in others.
    """
    gamma = getattr(block, f"gamma_{number}", None)
    scaled = gamma * value if gamma is not None else getattr(block, f"ls{number}", same)(value)
    path = getattr(block, f"drop_path{number}", None) or block.drop_path
    branch: Tensor = path(scaled)
    return branch


def _describe_parallel_scaling(block: Any, what: str) -> BlockDescription:
    """Describe a block with attention and MLP side by side after one LayerNorm, as in ViT-22B.

    Both read F, so the MLP is masked too.
    """

    def attention(*_given: Any) -> Attention:
        joint = block.in_proj
        _, *projected = projections(joint.weight.split(block.in_split), joint.bias)
        return normed_attention(block, projected, block.q_norm, block.k_norm)

    def finish(heads: Tensor, normed: Tensor, x: Tensor) -> Tensor:
        # the input projection makes the MLP's hidden units, then the queries, keys and values
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

    return BlockDescription(
        tap=Tap((block.in_norm,)),
        attention=attention,
        finish=finish,
        why_unknown=lambda: _why_unknown_block(
            block, what, (vit.ParallelScalingBlock,), (block.in_norm,)
        ),
    )


def _describe_parallel_things(block: Any, what: str) -> BlockDescription:
    """Describe a block of attentions side by side, then MLPs side by side (Touvron et al. 2022).

    Each attention has its own LayerNorm. F holds the outputs of these norms, one after the other
    along the width, and the attentions become one that has all their heads: block-diagonal weights
    let each head read its own share of F.
    """
    branches = list(block.attns)
    count = len(branches)

    def attention(_grid: Grid, options: dict[str, Any], tokens: int) -> Attention:
        every = [_describe_attention(branch.attn, options, tokens) for branch in branches]
        return dataclasses.replace(
            every[0],
            heads=sum(one.heads for one in every),
            query=_block_diagonal([one.query for one in every]),
            key=_block_diagonal([one.key for one in every]),
            value=_block_diagonal([one.value for one in every]),
        )

    def finish(heads: Tensor, normed: Tensor, x: Tensor) -> Tensor:
        shares = zip(branches, heads.chunk(count, -1), normed.chunk(count, -1), strict=True)
        attended = [b.drop_path(b.ls(_project_heads(b.attn, h, f))) for b, h, f in shares]
        x = x + torch.stack(attended).sum(dim=0)
        return x + torch.stack([mlp(x) for mlp in block.ffns]).sum(dim=0)

    input_norms, attentions = [b.norm for b in branches], [b.attn for b in branches]

    def why() -> str:
        kinds = (vit.ParallelThingsBlock,)
        because = _why_unknown_block(block, what, kinds, input_norms, *attentions)
        # the joined attention has one query norm, so it cannot have one for each branch
        if not because and not all(isinstance(one.q_norm, nn.Identity) for one in attentions):
            because = f"{what}'s parallel attentions have query and key norms"
        return because

    return BlockDescription(Tap(tuple(input_norms)), attention, finish, why)


def _describe_attention(attention: Any, options: dict[str, Any], tokens: int) -> Attention:
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


def _project_heads(
    attention: Any, heads: Float[Tensor, "*batch A"], normed: Float[Tensor, "*batch D"]
) -> Float[Tensor, "*batch D"]:
    """Return the attention's output for joined heads and F, which a gate reads."""
    heads = getattr(attention, "norm", same)(heads)
    if getattr(attention, "gate", None) is not None:
        heads = heads * attention.gate(normed).sigmoid()
    out: Tensor = attention.proj_drop(attention.proj(heads))
    return out


def _block_diagonal(every: list[Any]) -> Projection:
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
