"""timm's models -> Split."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import HybridEmbed
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer, global_pool_nlc
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from vit_reciprocam.core.split import MeanPool, Readout, Split
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.libraries.common.blocks import run_again, split_block
from vit_reciprocam.libraries.common.pooling import no_pool, split_pool
from vit_reciprocam.libraries.common.running import Call, blocks_from, calls_of
from vit_reciprocam.libraries.common.whole import is_own, refuse_bypassed, unknown_inside
from vit_reciprocam.libraries.timm.blocks import (
    after_attention_pool,
    attention_pool,
    attention_pool_unknown,
    block_parts,
)
from vit_reciprocam.libraries.timm.hierarchical import split as split_stages

__all__ = ["split"]

_HEAD = ("forward_head", "pool", "_pool")
_PLAIN = (VisionTransformer, VisionTransformerRelPos, Beit, Eva, NaFlexVit, Cait)


def split(model: nn.Module, *, block: int = -1, pool: bool = False) -> Split:
    """Cut a timm model at an encoder block, or before the pooling of its head.

    Raises:
        ModelError: If it is not a Vision Transformer with a head, or if its own code or hooks would
            be bypassed by running its parts.
        InputError: If it has no such block, or no pooling to cut at.
    """
    name = type(model).__name__
    _check_head(model)
    if not isinstance(model, _PLAIN):
        if block != -1 or pool:
            raise InputError(f"block and layer='pool' are for plain ViTs, and this is a {name}")
        return split_stages(model)
    m: Any = model
    last = blocks_from(block, m.blocks_token_only if isinstance(model, Cait) else m.blocks)
    refuse_bypassed(model, last[0], "timm", methods=("forward_features",))
    if pool:
        return _split_pool(m)
    parts = block_parts(last[0])
    tokens = _readout_tokens(m)
    if tokens is None:
        because = f"the head reads all tokens (global_pool={m.global_pool!r}), not prefix tokens"
    elif len(last) > 1:
        because = "the cut is not in the last block"
    elif not is_own(model, "timm", *_HEAD):  # which may read more than the readout tokens
        because = f"{name} has a head of its own"
    else:
        because = parts.unknown or unknown_inside(m.norm, "timm", "the norm after the last block")
    return split_block(
        blocks=last,
        calls=functools.partial(_calls, m, last),
        tap=parts.tap,
        head=lambda y: m.forward_head(m.norm(y)),
        because=because,
        prefix=m.num_prefix_tokens,
        tokens=tokens or 0,
        attention=lambda _grid, options: parts.attention(options, tokens or 0),
        after=parts.after,
        run=_class_attention if isinstance(model, Cait) else run_again,
    )


def _class_attention(block: nn.Module, _call: Call, x: Tensor) -> Tensor:
    """CaiT's, which takes patches and class token apart."""
    return torch.cat([block(x[:, 1:], x[:, :1]), x[:, 1:]], dim=1)


def _check_head(model: Any) -> None:
    name = type(model).__name__
    if not hasattr(model, "forward_features"):
        raise ModelError(
            f"timm's {name} is no classifier but gives features: create the model without "
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
            f"this {name} has no pooling (global_pool=''), so its output is not one score a class. "
            "Create it with global_pool='token' or the pooling that it was trained with"
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


def _readout_tokens(model: Any) -> int | None:
    if isinstance(model, VisionTransformerDistilled):
        return 2
    pooled = model.global_pool != "token" or getattr(model, "attn_pool", None) is not None
    return None if pooled or not model.num_prefix_tokens else 1


def _calls(
    model: Any, modules: Sequence[nn.Module], images: Tensor
) -> tuple[tuple[int, int], list[Call]]:
    """The patch grid of images, and how the model calls some of its modules for them."""
    embed = model.embeds if isinstance(model, NaFlexVit) else model.patch_embed
    _check_size(model, embed, tuple(images.shape[1:]))
    if isinstance(embed, HybridEmbed):  # its backbone may round up
        ((features,), _), *calls = calls_of(model, [embed.proj, *modules], images)
        sides = zip(features.shape[2:], embed.patch_size, strict=True)
        rows, columns = (side // patch for side, patch in sides)
    else:
        calls = calls_of(model, modules, images)
        rows, columns = embed.dynamic_feat_size(tuple(images.shape[2:]))
    if isinstance(model, Cait):
        calls = [((torch.cat([args[1], args[0]], dim=1),), {}) for args, _ in calls]
    return (rows, columns), calls


def _split_pool(model: Any) -> Split:
    """Cut before the head pools: after the last block and the norm that may follow it."""
    refuse_bypassed(model, model.norm, "timm", methods=("forward_features", *_HEAD))
    prefix, pool = model.num_prefix_tokens, getattr(model, "attn_pool", None)
    if model.global_pool == "token":
        raise no_pool(model)
    with_prefix = getattr(model, "pool_include_prefix", pool is not None)
    skipped = 0 if with_prefix else prefix

    def tokens(images: Tensor) -> tuple[tuple[int, int], Tensor]:
        grid, (((x,), _),) = _calls(model, [model.norm], images)
        return grid, model.norm(x)[:, skipped:]

    def finish(pooled: Tensor) -> Tensor:
        logits: Tensor = model.head(model.head_drop(model.fc_norm(pooled)))
        return logits

    readout: Readout | MeanPool | str = MeanPool(finish)
    if pool is not None:
        readout = attention_pool_unknown(pool) or Readout(
            tokens=pool.latent_len,
            attention=attention_pool(pool),
            finish=lambda heads, _normed, _x: finish(after_attention_pool(pool, heads)),
        )
    elif model.global_pool != "avg":
        readout = f"the head pools by global_pool={model.global_pool!r}, which is not linear"
    by_kind = functools.partial(
        global_pool_nlc, pool_type=model.global_pool, reduce_include_prefix=True
    )
    return split_pool(
        tokens=tokens,
        pool=by_kind if pool is None else pool,
        finish=finish,
        readout=readout,
        block=model.norm,
        prefix=prefix - skipped,
    )


def _check_size(model: Any, embed: Any, shape: tuple[int, ...]) -> None:
    """Refuse images (channels, height, width) that the model cannot take."""
    channels, height, width = shape
    wanted = getattr(model, "in_chans", 3)  # newer than the oldest timm supported
    if channels != wanted:
        raise InputError(f"this model takes {wanted} channel(s), got images of {channels}")
    if isinstance(model, NaFlexVit):
        return
    patch_h, patch_w = embed.patch_size
    hybrid = isinstance(embed, HybridEmbed)  # which takes any size, if its positions do
    if embed.strict_img_size and not (hybrid and getattr(model, "pos_embed", embed) is None):
        if (height, width) != tuple(embed.img_size):
            want_h, want_w = embed.img_size
            raise InputError(
                f"this model takes images of {want_h}x{want_w} pixels (height x width), got "
                f"{height}x{width}. Resize them, or create the model with img_size=(height, width) "
                f"or dynamic_img_size=True, which take multiples of {patch_h} by {patch_w} pixels"
            )
    elif not height or not width:
        raise InputError(f"images are empty: {height}x{width} pixels")
    elif not (hybrid or embed.dynamic_img_pad) and (height % patch_h or width % patch_w):
        raise InputError(
            f"this model takes images of multiples of {patch_h} by {patch_w} pixels "
            f"(height x width), got {height}x{width}"
        )
