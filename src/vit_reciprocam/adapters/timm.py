"""timm's models -> Split."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer, global_pool_nlc
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from vit_reciprocam.adapters.parts import (
    block_index,
    call_of,
    calls_of,
    infer_grid,
    is_own,
    refuse_bypassed,
    unknown_inside,
)
from vit_reciprocam.adapters.pooling import no_pool, split_pool
from vit_reciprocam.adapters.timm_blocks import (
    BlockParts,
    after_attention_pool,
    attention_pool,
    attention_pool_unknown,
    block_parts,
)
from vit_reciprocam.adapters.timm_stages import split as split_stages
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.split import Cut, MeanPool, Readout, Split

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
    blocks = list(m.blocks_token_only if isinstance(model, Cait) else m.blocks)
    last = blocks[block_index(block, len(blocks)) :]
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
    return Split(
        cut=functools.partial(_cut, m, last, parts, None if because else tokens),
        prefix_tokens=m.num_prefix_tokens,
        block=last[0],
        tap=parts.tap,
        direct_because=because,
    )


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


def _cut(
    model: Any, blocks: list[nn.Module], parts: BlockParts, tokens: int | None, images: Tensor
) -> Cut:
    grid = _grid(model, tuple(images.shape))
    calls = calls_of(model, blocks, images)
    args, options = calls[0]
    apart = isinstance(model, Cait)  # its class attention takes patches and class token apart
    x = torch.cat([args[1], args[0]], dim=1) if apart else args[0]

    def head(y: Tensor) -> Tensor:
        logits: Tensor = model.forward_head(model.norm(y))
        return logits

    def rest(normed: Tensor, x: Tensor) -> Tensor:
        patches, y = (x[:, 1:], x[:, :1]) if apart else (None, x)
        for block, (_, options) in zip(blocks, calls, strict=True):
            with parts.tap.replaced(normed) if block is blocks[0] else contextlib.nullcontext():
                y = block(patches, y) if apart else block(y, **options)
        return head(y)

    def finish(heads: Tensor, normed: Tensor, skip: Tensor) -> Tensor:
        y = parts.after(heads, normed, skip)
        return head(y.flatten(0, 1)).view(*y.shape[:2], -1)

    readout = None
    if tokens is not None:
        readout = Readout(tokens, parts.attention(options, tokens), finish)
    return Cut(
        grid=grid or infer_grid(x.shape[1] - model.num_prefix_tokens, *images.shape[2:]),
        x=x,
        norm=parts.norm,
        rest=rest,
        readout=readout,
    )


def _split_pool(model: Any) -> Split:
    """Cut before the head pools: after the last block and the norm that may follow it."""
    refuse_bypassed(model, model.norm, "timm", methods=("forward_features", *_HEAD))
    prefix, pool = model.num_prefix_tokens, getattr(model, "attn_pool", None)
    if model.global_pool == "token":
        raise no_pool(model)
    with_prefix = getattr(model, "pool_include_prefix", pool is not None)
    skipped = 0 if with_prefix else prefix

    def tokens(images: Tensor) -> tuple[tuple[int, int], Tensor]:
        grid = _grid(model, tuple(images.shape))
        (x,), _ = call_of(model, model.norm, images)
        found = grid or infer_grid(x.shape[1] - prefix, *images.shape[2:])
        return found, model.norm(x)[:, skipped:]

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


def _grid(model: Any, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The patch grid of an image size that the model can take, None where it does not tell."""
    channels, height, width = shape[1:]
    wanted = getattr(model, "in_chans", 3)  # newer than the oldest timm supported
    if channels != wanted:
        raise InputError(f"this model takes {wanted} channel(s), got images of {channels}")
    embed = getattr(model, "patch_embed", None)
    if embed is None:
        if not isinstance(model, NaFlexVit):
            return None
        rows, columns = model.embeds.dynamic_feat_size((height, width))
        return int(rows), int(columns)
    patch_h, patch_w = embed.patch_size
    if embed.strict_img_size:
        if (height, width) != tuple(embed.img_size):
            want_h, want_w = embed.img_size
            raise InputError(
                f"this model takes images of {want_h}x{want_w} pixels (height x width), got "
                f"{height}x{width}. Resize them, or create the model with img_size=(height, width) "
                f"or dynamic_img_size=True, which take multiples of {patch_h} by {patch_w} pixels"
            )
    elif not height or not width:
        raise InputError(f"images are empty: {height}x{width} pixels")
    elif not embed.dynamic_img_pad and (height % patch_h or width % patch_w):
        raise InputError(
            f"this model takes images of multiples of {patch_h} by {patch_w} pixels "
            f"(height x width), got {height}x{width}"
        )
    rows, columns = embed.dynamic_feat_size((height, width))
    return int(rows), int(columns)
