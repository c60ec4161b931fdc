"""timm's VisionTransformer and its descendants -> Split."""

from __future__ import annotations

import functools

from timm.layers import Attention as TimmAttention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.split import Attention, Projection, Split

__all__ = ["split"]


def split(model: nn.Module) -> Split:
    """Cut a timm model at its last block.

    Raises:
        ModelError: If it is not a VisionTransformer with a head and pre-norm blocks, or if its own
            code or hooks would be bypassed by running its parts.
    """
    name = type(model).__name__
    if not isinstance(model, VisionTransformer):
        raise ModelError(
            f"timm's {name} is not supported: it is no VisionTransformer, made of encoder blocks "
            "with a LayerNorm before their attention"
        )
    if model.num_classes == 0 or isinstance(model.head, nn.Identity):
        raise ModelError(
            f"this {name} has no classification head (num_classes=0), so it has no class scores to "
            "explain. Create it with its head, or put one on with "
            "model.reset_classifier(num_classes)"
        )
    if model.global_pool == "":
        raise ModelError(
            f"this {name} has no pooling (global_pool=''), so its output is not one score a class. "
            "Create it with global_pool='token' or the pooling that it was trained with"
        )
    if model.training and getattr(model, "distilled_training", False):
        raise ModelError(
            f"this {name} gives two outputs in distilled training: call model.eval() first"
        )
    if not len(model.blocks):
        raise ModelError(f"this {name} has no encoder block")
    block = model.blocks[-1]
    if not isinstance(block, Block):
        raise ModelError(
            f"the last encoder block is a {type(block).__name__}, which is not supported: it has "
            "no LayerNorm of its own before the attention, which is where this method cuts"
        )
    _refuse_bypassed_code(model, VisionTransformer, ("forward", "forward_features"))
    _refuse_bypassed_code(block, Block, ("forward",))
    readout = _readout(model)
    because = _direct_because(model, block.attn, readout)
    return Split(
        prefix_tokens=model.num_prefix_tokens,
        readout=readout,
        grid=functools.partial(_grid, model),
        stem=functools.partial(_stem, model),
        norm=block.norm1,
        rest=functools.partial(_rest, model),
        attention=None if because else _attention(block.attn),
        finish=functools.partial(_finish, model),
        direct_because=because,
    )


def _refuse_bypassed_code(module: nn.Module, base: type, methods: tuple[str, ...]) -> None:
    """The model is run by its parts, so what stands around them must be timm's own."""
    kind = type(module).__name__
    for method in methods:
        if getattr(type(module), method) is not getattr(base, method):
            raise ModelError(
                f"{kind} has a {method} of its own, which running its parts would bypass. Explain "
                f"a plain {base.__name__} with the same weights"
            )
    if module._forward_hooks or module._forward_pre_hooks:
        raise ModelError(
            f"the {kind} has forward hooks, which running its parts would bypass: remove them "
            "first, or put them on the modules inside"
        )


def _readout(model: VisionTransformer) -> int | None:
    if isinstance(model, VisionTransformerDistilled):
        return 2
    return 1 if model.global_pool == "token" and model.attn_pool is None else None


def _direct_because(model: VisionTransformer, attention: TimmAttention, readout: int | None) -> str:
    if readout is None:
        pool = model.global_pool
        return f"the head reads all tokens (global_pool={pool!r}), not only prefix tokens"
    if type(attention).forward is not TimmAttention.forward:
        kind = type(attention).__name__
        return f"the last block's attention is a {kind}, whose parts are not known"
    if getattr(attention, "gate", None) is not None:  # newer than the oldest timm supported
        return "the last block's attention is gated"
    if getattr(type(attention.qkv), "forward", None) is not nn.Linear.forward:
        kind = type(attention.qkv).__name__
        return f"the last block's qkv projection is a {kind}, not a plain Linear"
    for module in (attention, attention.qkv):
        if module._forward_hooks or module._forward_pre_hooks:
            return "the last block's attention has forward hooks"
    return ""


def _grid(model: VisionTransformer, shape: tuple[int, ...]) -> tuple[int, int]:
    embed = model.patch_embed
    channels, height, width = shape[1:]
    wanted = getattr(model, "in_chans", 3)  # newer than the oldest timm supported
    if channels != wanted:
        raise InputError(f"this model takes {wanted} channel(s), got images of {channels}")
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


def _stem(model: VisionTransformer, images: Tensor) -> Tensor:
    x: Tensor = model.patch_drop(model._pos_embed(model.patch_embed(images)))
    x = model.norm_pre(x)
    for block in model.blocks[:-1]:
        x = block(x)
    return x


def _rest(model: VisionTransformer, normed: Tensor, x: Tensor) -> Tensor:
    return _tail(model, model.blocks[-1].attn(normed), x)


def _finish(model: VisionTransformer, heads: Tensor, skip: Tensor) -> Tensor:
    attention = model.blocks[-1].attn
    attended = attention.proj_drop(attention.proj(attention.norm(heads)))
    return _tail(model, attended, skip)


def _tail(model: VisionTransformer, attended: Tensor, x: Tensor) -> Tensor:
    """From the last attention's output (..., tokens, D) to the logits (..., C).

    The tokens are all or the readout tokens alone.
    """
    block = model.blocks[-1]
    x = x + block.drop_path1(block.ls1(attended))
    x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    logits: Tensor = model.forward_head(model.norm(x).flatten(0, -3))
    return logits.view(*x.shape[:-2], -1)


def _attention(attention: TimmAttention) -> Attention:
    weights = attention.qkv.weight.chunk(3)
    biases = (None, None, None) if attention.qkv.bias is None else attention.qkv.bias.chunk(3)
    query, key, value = (Projection(w, b) for w, b in zip(weights, biases, strict=True))
    return Attention(
        heads=attention.num_heads,
        scale=attention.scale,
        query=query,
        key=key,
        value=value,
        query_norm=attention.q_norm,
        key_norm=None if isinstance(attention.k_norm, nn.Identity) else attention.k_norm,
    )
