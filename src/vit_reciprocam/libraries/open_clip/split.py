"""The split of open_clip's image towers, and prompts as classes of its models."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any, NoReturn

import open_clip
from jaxtyping import Float
from open_clip.timm_model import TimmModel
from open_clip.transformer import Attention as CustomAttention
from open_clip.transformer import (
    AttentionalPooler,
    CustomResidualAttentionBlock,
    ResidualAttentionBlock,
    Transformer,
    VisionTransformer,
)
from torch import Tensor, nn

from vit_reciprocam.core.split import Attention, Readout, Split, Tap, projections
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.libraries.common.changes import (
    find_override,
    kind_of,
    refuse_bypassed,
    runs_as,
    why_unknown,
)
from vit_reciprocam.libraries.common.multihead import (
    multihead_attention,
    multihead_output,
    normed_attention,
    why_unknown_multihead,
)
from vit_reciprocam.libraries.common.running import Call, Grid, find_calls, last_blocks
from vit_reciprocam.libraries.common.split import BlockDescription, no_pool, split_block, split_pool
from vit_reciprocam.libraries.common.zero_shot import ZeroShot, check_prompts, fill_template

__all__ = ["split", "split_tower", "zero_shot"]

_POOL_METHODS = ("_pool", "_global_pool")


def split(model: nn.Module, **_options: Any) -> NoReturn:
    """Refuse every model: neither a CLIP model nor its image tower has classes without prompts."""
    raise ModelError(
        f"open_clip's {type(model).__name__} has no classes until it is given prompts: pass the "
        "CLIP model through vit_reciprocam.libraries.open_clip.split.zero_shot(model, tokenizer, "
        "['a photo of a dog', 'a photo of a cat'])"
    )


def split_tower(tower: nn.Module, *, block: int = -1, pool: bool = False, depth: int = 1) -> Split:
    """Cut an image tower; its features, before normalisation, take the place of logits."""
    if isinstance(tower, TimmModel):
        return _split_timm(tower, block, pool, depth)
    if isinstance(tower, VisionTransformer):
        return _split_vit(tower, block, pool, depth)
    name = type(tower).__name__
    raise ModelError(f"open_clip's {name} is not supported: it is not a Vision Transformer")


def _split_timm(tower: Any, block: int, pool: bool, depth: int) -> Split:
    """Cut a tower around a timm model.

    The tower's own head is put behind the timm model's. So for the code in libraries/timm it is one
    classifier, whose logits are the features.
    """
    refuse_bypassed(tower, tower.trunk, "open_clip")
    from vit_reciprocam.libraries.timm.split import split as split_trunk

    trunk = copy.copy(tower.trunk)  # shares its modules, but a new head is put in the copy only
    trunk._modules = {**trunk._modules, "head": nn.Sequential(tower.trunk.head, tower.head)}
    trunk.num_classes = -1  # it has a head now, and 0 would say that it has none
    return split_trunk(trunk, block=block, pool=pool, depth=depth)


def _split_vit(tower: Any, number: int, pool: bool, depth: int) -> Split:
    name = type(tower).__name__
    transformer = tower.transformer
    if not isinstance(transformer, Transformer) or not transformer.batch_first:
        raise ModelError(
            f"the {name}'s {kind_of(transformer)} is not open_clip's own, which puts the batch "
            "first"
        )
    if tower.pool_type == "none":
        raise ModelError(
            f"this {name} does not pool its tokens (pool_type='none', or a parallel or cascade "
            "attention pooler), so its output is not one vector per image"
        )
    every = list(transformer.resblocks)
    blocks = last_blocks(number, every or [None])
    block = blocks[0]
    if not isinstance(block, (ResidualAttentionBlock, CustomResidualAttentionBlock)):
        raise ModelError(f"the {name}'s last block is a {kind_of(block)}, not open_clip's")
    refuse_bypassed(tower, block, "open_clip", methods=_POOL_METHODS if pool else ())
    if pool:
        return _split_pool(tower, block)
    reads: int | str = 1
    if tower.attn_pool is not None:
        reads = "the head's attention pooler reads all tokens, not the class token"
    elif tower.pool_type != "tok":
        reads = f"the head reads all patches (pool_type={tower.pool_type!r}), not the class token"
    changed = find_override(tower, "open_clip", *_POOL_METHODS) and f"{name} has a pool of its own"

    return split_block(
        blocks=blocks,
        describe=_describe_block,
        enter=functools.partial(_enter, tower),
        before=every[:number],
        depth=depth,
        head=lambda y: _project(tower, tower._pool(y)[0]),
        reads=reads,
        prefix=1,
        why_unknown=changed
        or why_unknown(tower.ln_post, "open_clip", "the norm after the last block"),
    )


def _describe_block(block: Any, what: str = "the last block") -> BlockDescription:
    """Describe a block, which error texts call `what`."""

    def finish(
        heads: Float[Tensor, "n B R A"], _normed: Tensor, x: Float[Tensor, "n B R D"]
    ) -> Float[Tensor, "n B R D"]:
        x = x + block.ls_1(_project_heads(block, heads))
        y: Tensor = x + block.ls_2(block.mlp(block.ln_2(x)))
        return y

    return BlockDescription(
        tap=Tap((block.ln_1,)),
        attention=lambda *_: _describe_attention(block.attn),
        finish=finish,
        why_unknown=lambda: _why_unknown_block(block, what),
    )


def _split_pool(tower: Any, block: nn.Module) -> Split:
    """Cut after the LayerNorm of an attention pooler, or before the mean of all patches."""
    pooler = tower.attn_pool
    if pooler is None and tower.pool_type == "tok":
        raise no_pool(tower)

    def tokens(images: Float[Tensor, "B channels H W"]) -> tuple[Grid, Float[Tensor, "B T D"]]:
        grid, (((x, *_), _),) = _enter(tower, [block], images)
        y = block(x)
        if pooler is not None:
            return grid, pooler.ln_k(y)
        return grid, (y if tower.final_ln_after_pool else tower.ln_post(y))[:, 1:]

    def finish_mean(mean: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch E"]:
        return _project(tower, tower.ln_post(mean) if tower.final_ln_after_pool else mean)

    if pooler is None:
        return split_pool(tokens=tokens, finish=finish_mean, block=block)
    # the pooler has one output per query; the head reads the first, or the mean of the others
    read = slice(0, 1) if tower.pool_type == "tok" else slice(1, None)

    def attend(normed: Float[Tensor, "B T D"]) -> Float[Tensor, "B R width"]:
        with Tap((pooler.ln_k,)).replaced(normed):
            attended: Tensor = pooler(normed)[:, read]
        return attended

    def finish_pooler(attended: Float[Tensor, "*batch R width"]) -> Float[Tensor, "*batch E"]:
        return _project(tower, tower.ln_post(attended).mean(dim=-2))

    queries = pooler.ln_q(pooler.query)[read]
    return split_pool(
        tokens=tokens,
        finish=finish_pooler,
        pool=attend,
        readout=_why_unknown_pooler(pooler)
        or Readout(
            tokens=len(queries),
            attention=multihead_attention(pooler.attn, queries),
            finish=lambda heads, _f, _x: finish_pooler(multihead_output(pooler.attn, heads)),
        ),
        block=block,
        prefix=1,
    )


def _why_unknown_pooler(pooler: Any) -> str:
    """Return why running an attention pooler by its parts may differ from calling it, or ""."""
    if not runs_as(pooler, AttentionalPooler):
        return f"the attention pooler is a {kind_of(pooler)}, whose parts are not known"
    return why_unknown_multihead(pooler.attn, "the attention pooler's attention") or why_unknown(
        pooler, "open_clip", "the attention pooler", pooler.ln_k
    )


def _project(tower: Any, pooled: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch E"]:
    """Return the features of what the tower pools."""
    return pooled if tower.proj is None else pooled @ tower.proj


def _enter(
    tower: Any, blocks: Sequence[nn.Module], images: Float[Tensor, "B channels H W"]
) -> tuple[Grid, list[Call]]:
    """Return the patch grid and the calls of some blocks; refuse images of another size."""
    channels, height, width = images.shape[1:]
    wanted = (tower.conv1.in_channels, *tower.image_size)
    if (channels, height, width) != wanted:
        raise InputError(
            f"this tower takes images of {wanted[0]} channel(s) of {wanted[1]}x{wanted[2]} "
            f"pixels (height x width), got {channels} of {height}x{width}. Resize them, or "
            "create the model with force_image_size="
        )
    return tower.grid_size, find_calls(tower, blocks, images)


def _why_unknown_block(block: Any, what: str) -> str:
    """Return why running a block by its parts may differ from calling it, or ""."""
    kinds = (ResidualAttentionBlock, CustomResidualAttentionBlock)
    if not runs_as(block, *kinds):
        return f"{what} is a {kind_of(block)}, whose parts are not known"
    if find_override(block, "open_clip", "attention"):
        return f"{what} has an attention method of its own"
    because = ""
    if not runs_as(block.attn, CustomAttention):
        because = why_unknown_multihead(block.attn, f"{what}'s attention")
    elif block.attn.scaled_cosine:
        because = f"{what}'s attention is a scaled cosine"
    return because or why_unknown(block, "open_clip", what, block.ln_1)


def _describe_attention(attention: Any) -> Attention:
    """Return the attention of a block, which is PyTorch's class or open_clip's own."""
    if isinstance(attention, nn.MultiheadAttention):
        return multihead_attention(attention)
    joint = projections(attention.in_proj_weight.chunk(3), attention.in_proj_bias)
    return normed_attention(attention, joint, attention.ln_q, attention.ln_k)


def _project_heads(block: Any, heads: Float[Tensor, "*batch A"]) -> Float[Tensor, "*batch D"]:
    """Return what joined heads add to the residual stream, before LayerScale."""
    attention = block.attn
    if isinstance(attention, nn.MultiheadAttention):
        return multihead_output(attention, heads)
    if attention.head_scale is not None:
        separate = heads.unflatten(-1, (attention.num_heads, -1))
        heads = (separate * attention.head_scale.squeeze(-1)).flatten(-2)
    out: Tensor = block.ln_attn(attention.out_drop(attention.out_proj(attention.ln_inner(heads))))
    return out


def zero_shot(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], templates: Sequence[str] = ("{}",)
) -> ZeroShot:
    """Turn the image tower of a CLIP model into a classifier of text prompts.

    The model must be in evaluation mode; its tokenizer, from `open_clip.get_tokenizer`, cuts off
    what is too long for it. `prompts` and `templates` are those of `vit_reciprocam.load`.
    """
    m: Any = model
    if any(not hasattr(m, part) for part in ("visual", "encode_text", "logit_scale")):
        raise ModelError(
            f"{type(model).__name__} is not a CLIP model of open_clip, with an image and a text "
            "tower"
        )
    if model.training:
        raise ModelError(f"the {type(model).__name__} is in training mode: call model.eval() first")
    check_prompts(prompts, templates)
    fills = [functools.partial(fill_template, template) for template in templates]
    classes = open_clip.build_zero_shot_classifier(
        m, tokenizer, list(prompts), fills, device=m.logit_scale.device
    )
    tower = m.visual
    if getattr(tower, "output_tokens", False):  # CoCa's tower returns all tokens too
        tower = copy.copy(tower)
        tower.output_tokens = False
    bias = getattr(m, "logit_bias", None)
    return ZeroShot(
        tower,
        classes.T,
        scale=m.logit_scale.exp().item(),
        bias=0.0 if bias is None else bias.item(),
    )
