"""timm's encoder blocks and attentions by their parts.

Letters of the shapes: B images, T tokens, of which the first R are the readout tokens, D width,
A width of the joined heads; n masks at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from vit_reciprocam.libraries.common.running import same
from vit_reciprocam.libraries.common.whole import kind_of, runs_as, why_not_linear, why_unknown

__all__ = [
    "BlockDescription",
    "after_attention_pool",
    "attention_pool",
    "describe_block",
    "why_unknown_pool",
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
class BlockDescription:
    """An encoder block by its parts.

    Attributes:
        tap: Where F stands in the block.
        attention: The keywords with which the model calls the block, such as a position embedding,
            and R -> the block's attention.
        finish: The joined heads (n, B, R, A), F (n, B, R, D) and X (n, B, R, D) of the readout
            tokens -> the block's output (n, B, R, D).
        why_unknown: Why attention and finish cannot be used, "" if they can.
    """

    tap: Tap
    attention: Callable[[dict[str, Any], int], Attention]
    finish: Callable[[Tensor, Tensor, Tensor], Tensor]
    why_unknown: str


def describe_block(block: nn.Module) -> BlockDescription:
    """Return an encoder block by its parts.

    Raises:
        ModelError: If it has no LayerNorm or attention to cut at.
    """
    b: Any = block
    if isinstance(block, _POST_NORM):
        # its LayerNorms follow attention and MLP: what the attention reads is the stream itself
        return BlockDescription(
            tap=Tap((b.attn,), "input"),
            attention=lambda options, tokens: _attention(b.attn, options, tokens),
            finish=lambda heads, f, x: _finish_post_norm(b, _project_heads(b.attn, heads, f), x),
            why_unknown=_why_unknown_block(block, _POST_NORM, (), b.attn),
        )
    if isinstance(block, vit.ParallelThingsBlock):
        return _describe_parallel_things(b)
    if isinstance(getattr(block, "in_norm", None), nn.Module):
        return _describe_parallel_scaling(b)
    if isinstance(getattr(block, "norm1", None), nn.Module):
        attn = getattr(b, "attn", None)
        return BlockDescription(
            tap=Tap((b.norm1,)),
            attention=lambda options, tokens: _attention(attn, options, tokens),
            finish=lambda heads, f, x: _finish_pre_norm(b, _project_heads(attn, heads, f), x),
            why_unknown=_why_unknown_block(block, _PRE_NORM, (b.norm1,), attn),
        )
    raise ModelError(
        f"the last encoder block is a {type(block).__name__}, which is not supported: it has no "
        "LayerNorm by the name of norm1, which is where this method cuts"
    )


def _why_unknown_block(
    block: nn.Module, kinds: tuple[type, ...], norms: Sequence[nn.Module], *attentions: Any
) -> str:
    """Return why running the block by its parts might not be running it, "" if it is.

    Args:
        block: The block.
        kinds: The classes whose forward is known.
        norms: Modules inside that are called as they are, on all tokens.
        attentions: The attentions inside.
    """
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
            because = linear is not None and why_not_linear(
                linear, f"the last block's {name} projection"
            )
            if because:
                return because
    return why_unknown(block, "timm", "the last block", *norms)


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
    """Return what a residual branch adds: a value after LayerScale and stochastic depth.

    LayerScale is a parameter, gamma_1, in some classes and a module, ls1, in others. Stochastic
    depth is drop_path1 in some, drop_path for both branches in others.
    """
    gamma = getattr(block, f"gamma_{number}", None)
    scaled = gamma * value if gamma is not None else getattr(block, f"ls{number}", same)(value)
    path = getattr(block, f"drop_path{number}", None) or block.drop_path
    branch: Tensor = path(scaled)
    return branch


def _project_heads(
    attention: Any, heads: Float[Tensor, "*batch A"], normed: Float[Tensor, "*batch D"]
) -> Float[Tensor, "*batch D"]:
    """Return the attention's output for joined heads; a gate reads F too."""
    heads = getattr(attention, "norm", same)(heads)
    if getattr(attention, "gate", None) is not None:
        heads = heads * attention.gate(normed).sigmoid()
    out: Tensor = attention.proj_drop(attention.proj(heads))
    return out


def _attention(attention: Any, options: dict[str, Any], tokens: int) -> Attention:
    """Return an attention by its parts.

    Args:
        attention: The module.
        options: The keywords with which the model calls the block.
        tokens: R, how many readout tokens ask.
    """
    query, key, value = _projections(attention)
    key_norm = getattr(attention, "k_norm", None)
    rope = options.get("rope")
    half = getattr(attention, "rotate_half", False)

    def rotate(keys: Tensor) -> Tensor:  # (B, N, heads, head dimension); timm has heads before N
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
    """Return the projections to query, key and value, joined in one layer or apart."""
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
    """Repeat keys or values of grouped-query attention, once per head that shares them."""
    if groups == 1:
        return projection

    def repeat(rows: Tensor) -> Tensor:
        heads: Tensor = rows.unflatten(0, (-1, attention.head_dim))
        return heads.repeat_interleave(groups, 0).flatten(0, 1)

    bias = projection.bias
    return Projection(repeat(projection.weight), None if bias is None else repeat(bias))


def _bias(attention: Any, options: dict[str, Any], tokens: int) -> Tensor | None:
    """Return what relative position adds to the scores of the first tokens, (T, tokens, heads)."""
    # a bias that all blocks share comes with the call, as BEiT or as ViTRelPos names it
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


def _describe_parallel_scaling(block: Any) -> BlockDescription:
    """Describe a block with attention and MLP side by side after one LayerNorm, as in ViT-22B.

    F is what both read, so the MLP is masked too.
    """

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
        why_unknown=_why_unknown_block(block, (vit.ParallelScalingBlock,), (block.in_norm,)),
    )


def _describe_parallel_things(block: Any) -> BlockDescription:
    """Describe a block of attentions side by side, then MLPs side by side (Touvron et al. 2022).

    Each attention has its own LayerNorm. F holds the outputs of these norms, one after the other
    along the width, and the attentions become one that has all their heads: block-diagonal weights
    let each head read its own share of F.
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

    def finish(heads: Tensor, normed: Tensor, x: Tensor) -> Tensor:
        own = zip(branches, heads.chunk(count, -1), normed.chunk(count, -1), strict=True)
        attended = [b.drop_path(b.ls(_project_heads(b.attn, h, f))) for b, h, f in own]
        x = x + torch.stack(attended).sum(dim=0)
        return x + torch.stack([mlp(x) for mlp in block.ffns]).sum(dim=0)

    input_norms, attentions = [b.norm for b in branches], [b.attn for b in branches]
    because = _why_unknown_block(block, (vit.ParallelThingsBlock,), input_norms, *attentions)
    query_norms = [branch.attn.q_norm for branch in branches]
    # one attention has one query norm, but here each branch has weights of its own
    if not because and not all(isinstance(norm, nn.Identity) for norm in query_norms):
        because = "the last block's parallel attentions have query and key norms"
    return BlockDescription(
        tap=Tap(tuple(branch.norm for branch in branches)),
        attention=attention,
        finish=finish,
        why_unknown=because,
    )


def _block_diagonal(every: list[Any]) -> Projection:
    """Return one projection in which each of several reads and writes its own share."""
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


def attention_pool(pool: Any) -> Attention:
    """Return the attention of a pooling head: learned queries ask, no token does."""
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


def after_attention_pool(
    pool: Any, heads: Float[Tensor, "*batch R A"]
) -> Float[Tensor, "*batch D"]:
    """Return the pooled features for the joined heads of a pooling head's queries."""
    x = pool.proj_drop(pool.proj(heads))
    if pool.mlp is not None:
        x = x + pool.mlp(pool.norm(x))
    if pool.pool == "token":
        x = x[..., 0, :]
    elif pool.pool == "avg":
        x = x.mean(-2)
    pooled: Tensor = x
    return pooled
