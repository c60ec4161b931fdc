"""timm's Vision Transformers: their split, and some of them as an `Encoder`.

hierarchical.py splits timm's other transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import HybridEmbed, Mlp
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer, global_pool_nlc
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from vit_reciprocam.core.split import Readout, Split
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.libraries.common.changes import (
    find_override,
    has_hooks,
    kind_of,
    refuse_bypassed,
    runs_as,
    why_unknown,
)
from vit_reciprocam.libraries.common.encoder import Encoder, Layer, no_encoder, steps
from vit_reciprocam.libraries.common.running import Call, Grid, find_calls, last_blocks
from vit_reciprocam.libraries.common.split import no_pool, run_again, split_block, split_pool
from vit_reciprocam.libraries.timm.blocks import (
    describe_block,
    describe_pool,
    finish_pool,
    why_unknown_pool,
)
from vit_reciprocam.libraries.timm.hierarchical import split as split_hierarchical
from vit_reciprocam.libraries.validation import check_size

__all__ = ["encoder", "split"]

_HEAD_METHODS = ("forward_head", "pool", "_pool")
# plain models: one stack of blocks that all see the same tokens
_PLAIN = (VisionTransformer, VisionTransformerRelPos, Beit, Eva, NaFlexVit, Cait)


def split(model: nn.Module, *, block: int = -1, pool: bool = False, depth: int = 1) -> Split:
    """Cut a timm model at an encoder block, or before the pooling of its head."""
    name = type(model).__name__
    _check_head(model)
    if not isinstance(model, _PLAIN):
        if block != -1 or pool or depth > 1:
            raise InputError(
                f"block, depth and layer='pool' are for plain ViTs, and this is a {name}"
            )
        return split_hierarchical(model)
    m: Any = model
    every = list(m.blocks_token_only if isinstance(model, Cait) else m.blocks)
    blocks = last_blocks(block, every)
    refuse_bypassed(model, blocks[0], "timm", methods=("forward_features",))
    if pool:
        return _split_pool(m)
    # a user's head may read more tokens
    changed = find_override(model, "timm", *_HEAD_METHODS) and f"{name} has a head of its own"
    return split_block(
        blocks=blocks,
        describe=describe_block,
        enter=functools.partial(_enter, m),
        before=every[:block],
        depth=depth,
        head=lambda y: m.forward_head(m.norm(y)),
        reads=_count_readout_tokens(m)
        or f"the head reads all tokens (global_pool={m.global_pool!r}), not prefix tokens",
        prefix=m.num_prefix_tokens,
        why_unknown=changed or why_unknown(m.norm, "timm", "the norm after the last block"),
        run=_run_class_attention if isinstance(model, Cait) else run_again,
    )


def _run_class_attention(
    block: nn.Module, _call: Call, x: Float[Tensor, "B T D"]
) -> Float[Tensor, "B T D"]:
    """Run a block of CaiT's class attention, which takes patches and class token separately.

    It returns the new class token only, so the unchanged patches are joined to it again.
    """
    return torch.cat([block(x[:, 1:], x[:, :1]), x[:, 1:]], dim=1)


def _check_head(model: Any) -> None:
    """Refuse a model that does not give one score per class."""
    name = type(model).__name__
    if not hasattr(model, "forward_features"):
        raise ModelError(
            f"timm's {name} is not a classifier but gives features: create the model without "
            "features_only"
        )
    if getattr(model, "num_classes", None) == 0 or isinstance(
        getattr(model, "head", None), nn.Identity
    ):
        raise ModelError(
            f"this {name} has no classification head (num_classes=0), so it has no class scores to "
            "explain. Create it with its head, or put one on with "
            "model.reset_classifier(num_classes)"
        )
    if getattr(model, "global_pool", None) == "":
        raise ModelError(
            f"this {name} has no pooling (global_pool=''), so its output is not one score per "
            "class. Create it with global_pool='token' or the pooling that it was trained with"
        )
    if model.training and getattr(model, "distilled_training", False):
        raise ModelError(
            f"this {name} gives two outputs in distilled training: call model.eval() first"
        )
    if isinstance(model, Cait) and model.global_pool != "token":
        raise ModelError(
            "this Cait pools its patches, which its class attention never changes: create it with "
            "global_pool='token'"
        )


def _count_readout_tokens(model: Any) -> int | None:
    """Return the number of tokens that the head reads, from the first on; None if it reads all."""
    if isinstance(model, VisionTransformerDistilled):
        return 2
    pooled = model.global_pool != "token" or getattr(model, "attn_pool", None) is not None
    return None if pooled or not model.num_prefix_tokens else 1


def _enter(
    model: Any, modules: Sequence[nn.Module], images: Float[Tensor, "B channels H W"]
) -> tuple[Grid, list[Call]]:
    """Return the patch grid of images, and the arguments of the model's calls of some modules."""
    embed = model.embeds if isinstance(model, NaFlexVit) else model.patch_embed
    _check_size(model, embed, images)
    if isinstance(embed, HybridEmbed):  # its backbone may round up, so its output gives the grid
        ((features,), _), *calls = find_calls(model, [embed.proj, *modules], images)
        sides = zip(features.shape[2:], embed.patch_size, strict=True)
        rows, columns = (side // patch for side, patch in sides)
    else:
        calls = find_calls(model, modules, images)
        rows, columns = embed.dynamic_feat_size(tuple(images.shape[2:]))
    if isinstance(model, Cait):  # its blocks take patches and class token separately
        calls = [((torch.cat([args[1], args[0]], dim=1),), {}) for args, _ in calls]
    return (rows, columns), calls


def _split_pool(model: Any) -> Split:
    """Cut before the head pools: after the last block and the norm that may follow it."""
    refuse_bypassed(model, model.norm, "timm", methods=("forward_features", *_HEAD_METHODS))
    prefix, pool = model.num_prefix_tokens, getattr(model, "attn_pool", None)
    if model.global_pool == "token":
        raise no_pool(model)
    skipped = 0 if getattr(model, "pool_include_prefix", pool is not None) else prefix

    def tokens(images: Tensor) -> tuple[Grid, Tensor]:
        grid, (((x,), _),) = _enter(model, [model.norm], images)
        return grid, model.norm(x)[:, skipped:]

    def finish(pooled: Tensor) -> Tensor:  # (B, D) -> (B, C)
        logits: Tensor = model.head(model.head_drop(model.fc_norm(pooled)))
        return logits

    readout: Readout | str = ""
    if pool is not None:
        readout = why_unknown_pool(pool) or Readout(
            tokens=pool.latent_len,
            attention=describe_pool(pool),
            finish=lambda heads, _normed, _x: finish(finish_pool(pool, heads)),
        )
    elif model.global_pool != "avg":
        readout = f"the head pools by global_pool={model.global_pool!r}, which is not linear"
        pool = functools.partial(
            global_pool_nlc, pool_type=model.global_pool, reduce_include_prefix=True
        )
    return split_pool(
        tokens=tokens,
        finish=finish,
        block=model.norm,
        prefix=prefix - skipped,
        pool=pool,
        readout=readout,
    )


def _check_size(model: Any, embed: Any, images: Float[Tensor, "B channels H W"]) -> None:
    """Refuse images that the model, which embeds patches by `embed`, cannot take."""
    fits: dict[str, Any] = {}
    if not isinstance(model, NaFlexVit):
        patch_h, patch_w = embed.patch_size
        hybrid = isinstance(embed, HybridEmbed)  # takes any size if there is no position embedding
        if embed.strict_img_size and not (hybrid and getattr(model, "pos_embed", embed) is None):
            advice = (
                ". Resize them, or create the model with img_size=(height, width) or "
                f"dynamic_img_size=True, which take multiples of {patch_h} by {patch_w} pixels"
            )
            fits = {"size": embed.img_size, "advice": advice}
        elif not (hybrid or embed.dynamic_img_pad):
            fits = {"step": (patch_h, patch_w)}
    check_size(images, getattr(model, "in_chans", 3), **fits)  # older timm does not have in_chans


def encoder(model: nn.Module) -> Encoder:
    """Describe a model whose head reads its class token, and a distillation token if it has one."""
    m: Any = model
    if not isinstance(model, VisionTransformer):
        raise no_encoder(model, "the parts of this architecture are not known")
    tokens = _count_readout_tokens(model)
    if tokens is None:
        raise no_encoder(model, "its head reads all tokens, so no token's attention stands for it")
    distilled = (steps(m.head), steps(m.head_dist)) if tokens == 2 else ()
    return Encoder(
        entry=m.blocks[0],
        layers=tuple(_layer(model, number, block) for number, block in enumerate(m.blocks)),
        norm=steps(m.norm),
        heads=distilled or (steps(m.fc_norm, m.head_drop, m.head),),
        logits=lambda y: m.forward_head(m.norm(y)),
    )


def _layer(model: nn.Module, number: int, block: Any) -> Layer:
    what = f"its block {number}"
    if not runs_as(block, Block, ResPostBlock):
        raise no_encoder(model, f"{what} is a {kind_of(block)}, whose parts are not known")
    description, attn, mlp = describe_block(block, what), block.attn, block.mlp
    because = description.why_unknown()
    if not because and getattr(attn, "gate", None) is not None:
        because = f"{what}'s attention is gated"
    if because:
        raise no_encoder(model, because)
    known_mlp = runs_as(mlp, Mlp) and not has_hooks(mlp)  # any other is one step
    after = steps(getattr(attn, "norm", None), attn.proj)
    inner = steps(mlp.fc1, mlp.act, getattr(mlp, "norm", None), mlp.fc2) if known_mlp else (mlp,)
    if runs_as(block, Block):
        before, after = steps(block.norm1), after + steps(block.ls1)
        inner = steps(block.norm2) + inner + steps(block.ls2)
    else:  # a ResPostBlock, whose norms follow
        before, after, inner = (), after + steps(block.norm1), inner + steps(block.norm2)
    return Layer(before, description.attention((0, 0), {}, 0), after, inner)
