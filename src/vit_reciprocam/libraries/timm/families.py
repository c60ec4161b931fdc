"""timm's hierarchical and other transformers: the last attention of each, and what follows it.

How to read a family: its function takes a model of the timm class that `_family` names and returns
the `LastBlock`. Most use `at_norm1(block, finish, layout)`: `block` is the last block in which
tokens attend to each other, F is the output of its norm1, `finish` repeats what the model's own
`forward_features` does after that block, and `layout` is that of the block's input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vit_reciprocam.core.split import Tap
from vit_reciprocam.errors import ModelError
from vit_reciprocam.libraries.common.running import get_first, same
from vit_reciprocam.libraries.timm.last_block import (
    LastBlock,
    MethodInputTap,
    at_attention_input,
    at_norm1,
    at_reordered_norm1,
    call_each,
    keep,
    rows_to_channels,
    tokens_to_channels,
)

__all__ = ["FAMILIES", "REFUSED", "unsupported"]

_Describe = Callable[[Any], LastBlock]

FAMILIES: dict[str, _Describe] = {}
"""The name of a timm class -> the function that describes the last block of its models."""

REFUSED = {
    "ByobNet": "its blocks have convolutions, or attend over four interleaved grids (MobileViT)",
    "CrossVit": "it has two token grids, of small and of large patches, and its head reads both",
    "EdgeNeXt": "its attention is between channels, not between tokens",
    "Gemma4VitClassifier": "its pooler reads where patches lie, which is not passed on here",
    "SHViT": "its attention follows a norm over all tokens together and reads part of their width",
    "SwiftFormer": "its attention weighs tokens by one sum and compares no two of them",
} | dict.fromkeys(
    ("ConvNeXt", "EfficientNet", "FocalNet", "MambaOut", "MlpMixer", "ResNet", "Sequencer2d"),
    "it has no attention, which is where this method cuts",
)
"""The name of a timm class -> the reason why its models are not supported."""


def unsupported(model: nn.Module, reason: str) -> ModelError:
    """Return the error that names the model and the reason."""
    return ModelError(f"timm's {type(model).__name__} is not supported: {reason}")


def _family(*names: str) -> Callable[[_Describe], _Describe]:
    """Register the function below it in `FAMILIES` for timm's classes of these names."""

    def register(describe: _Describe) -> _Describe:
        FAMILIES.update(dict.fromkeys(names, describe))
        return describe

    return register


def _last_of_stages(m: Any) -> Any:
    return m.stages[-1].blocks[-1]


_CLASS_TOKEN: dict[str, Any] = {
    "prefix": 1,
    "because": "the parts of its last attention are not known",
}
# the block takes rows or channels, but its norm takes tokens
_ROWS_AS_TOKENS: dict[str, Any] = {
    "layout": "rows",
    "arrange": lambda x: x.flatten(1, 2),
    "restore": lambda x, grid: x.unflatten(1, grid),
}
_CHANNELS_AS_TOKENS: dict[str, Any] = {
    "layout": "channels",
    "arrange": lambda x: x.flatten(2).transpose(1, 2),
    "restore": tokens_to_channels,
}


@_family("CSATv2")
def _csat(m: Any) -> LastBlock:
    return at_norm1(m.stages[-1][-1], keep, **_CHANNELS_AS_TOKENS)


@_family("CoaT")
def _coat(m: Any) -> LastBlock:
    if m.parallel_blocks is not None:
        raise unsupported(m, "its last blocks join three token grids, and its head reads all")
    return at_norm1(m.serial_blocks4[-1], call_each(m.norm4), **_CLASS_TOKEN)


@_family("ConVit", "VOLO", "Xcit")
def _class_attention(m: Any) -> LastBlock:
    """Find the last of the blocks that take the class token along with the patches."""
    blocks = get_first(m, "cls_attn_blocks", "post_network", "blocks")
    if not blocks:
        raise unsupported(m, "it has no class attention")
    return at_norm1(blocks[-1], call_each(m.norm), **_CLASS_TOKEN)


@_family("DaVit")
def _davit(m: Any) -> LastBlock:
    """Find the last block that attends between patches; later ones attend between channels."""
    blocks = [block for pair in m.stages[-1].blocks for block in pair]
    spatial = [at for at, block in enumerate(blocks) if type(block).__name__ == "SpatialBlock"]
    if not spatial:
        raise unsupported(m, "its last stage attends between channels, not between tokens")
    last = spatial[-1]
    return at_norm1(blocks[last], call_each(*blocks[last + 1 :], m.norm_pre), **_CHANNELS_AS_TOKENS)


@_family("DeepseekVitClassifier", "Qwen3VitClassifier")
def _encoder(m: Any) -> LastBlock:
    """Find the last block inside the encoder; some models merge patches after it."""
    encoder, norm = m.encoder, getattr(m.encoder, "norm", same)
    merge = getattr(encoder, "aligner", None) or getattr(encoder, "merger", None) or same
    return at_norm1(encoder.blocks[-1], lambda y, grid: merge(norm(y).unflatten(1, grid)))


@_family("EfficientFormer")
def _efficientformer(m: Any) -> LastBlock:
    return at_norm1(_last_of_stages(m), call_each(m.norm))


@_family("EfficientFormerV2")
def _efficientformer_v2(m: Any) -> LastBlock:
    block = _last_of_stages(m)
    return at_attention_input(block, block.token_mixer, call_each(m.norm))


@_family("EfficientVit", "EfficientVitLarge", "EfficientVitMsra")
def _efficientvit(m: Any) -> LastBlock:
    block = _last_of_stages(m)
    return at_attention_input(block, get_first(block, "context_module.main", "mixer.m"), keep)


@_family("FastVit")
def _fastvit(m: Any) -> LastBlock:
    block = _last_of_stages(m)
    # a block that mixes by convolution has no norm and is refused later; until then any tap will do
    tap = Tap((getattr(block, "norm", m),))
    return at_norm1(block, call_each(m.final_conv), "channels", tap=tap)


@_family("GlobalContextVit")
def _gcvit(m: Any) -> LastBlock:
    """Pass on the global query of each image, which its blocks take beside X."""
    finish = call_each(m.stages[-1].norm, rows_to_channels)
    return at_norm1(_last_of_stages(m), finish, "rows", batched=True)


@_family("Hiera")
def _hiera(m: Any) -> LastBlock:
    """Put the tokens into the order of the image; the block keeps them in that of mask units."""
    block, number = m.blocks[-1], len(m.blocks) - 1
    number -= block.do_expand  # such a block pools only after the cut
    grid = m.reroll.schedule[number][1]
    # reroll puts tokens into the order of the image, so it turns their numbers into that order
    order = m.reroll(torch.arange(grid[0] * grid[1]).view(1, -1, 1), number).flatten()
    back = order.argsort()
    return at_reordered_norm1(
        block, keep, lambda x: x[:, order], lambda x: x[:, back], grid=tuple(grid)
    )


@_family("HieraDet")
def _hieradet(m: Any) -> LastBlock:
    return at_norm1(m.blocks[-1], keep, "rows")


@_family("Levit")
def _levit(m: Any) -> LastBlock:
    layout = "channels" if m.use_conv else "tokens"
    block = _last_of_stages(m)
    return at_attention_input(block, block.attn, keep, layout)


@_family("MaxxVit")
def _maxxvit(m: Any) -> LastBlock:
    """Find the attention in a block of CoAtNet, MaxViT, or a model with parallel attentions."""
    block = _last_of_stages(m)
    if type(block).__name__ == "TransformerBlock2d":
        norm = getattr(block.norm1, "norm", block.norm1)  # norm1 may pool after its norm
        return at_norm1(block, call_each(m.norm), "channels", tap=Tap((norm,)))
    part = getattr(block, "attn_grid", None) or getattr(block, "attn", block)
    if getattr(block, "nchw_attn", False):
        return at_norm1(part, call_each(m.norm), "channels", attention=part)
    return at_norm1(part, call_each(rows_to_channels, m.norm), "rows", attention=part)


@_family("MetaFormer")
def _metaformer(m: Any) -> LastBlock:
    block = _last_of_stages(m)
    if m.stages[-1].use_nchw:
        return at_norm1(block, keep, "channels")
    return at_norm1(block, tokens_to_channels)


@_family("MultiScaleVit")
def _mvit(m: Any) -> LastBlock:
    shared = _CLASS_TOKEN if m.global_pool == "token" else {}
    settings = shared | {"prefix": int(m.cls_token is not None)}
    # the block gives the tokens and the size of their grid
    return at_norm1(_last_of_stages(m), lambda y, _: m.norm(y[0]), **settings)


@_family("Nest")
def _nest(m: Any) -> LastBlock:
    """Remove the axis of the blocks of patches, (B, 1, T, D): the last level has only one."""
    block = m.levels[-1].transformer_encoder[-1]
    finish = call_each(m.norm, rows_to_channels)
    return at_reordered_norm1(block, finish, lambda x: x[:, 0], lambda x: x[:, None])


@_family("NextViT")
def _nextvit(m: Any) -> LastBlock:
    return at_norm1(_last_of_stages(m), call_each(m.norm), "channels")


@_family("PoolingVisionTransformer")
def _pit(m: Any) -> LastBlock:
    prefix = m.cls_token.shape[1]
    settings = _CLASS_TOKEN | {"prefix": prefix}
    block = m.transformers[-1].blocks[-1]
    return at_norm1(block, lambda y, _: m.norm(y[:, :prefix]), **settings)


@_family("PyramidVisionTransformerV2")
def _pvt_v2(m: Any) -> LastBlock:
    norm = m.stages[-1].norm
    return at_norm1(_last_of_stages(m), lambda y, grid: tokens_to_channels(norm(y), grid))


@_family("SwinTransformer")
def _swin(m: Any) -> LastBlock:
    return at_norm1(m.layers[-1].blocks[-1], call_each(m.norm), "rows")


@_family("SwinTransformerV2")
def _swin_v2(m: Any) -> LastBlock:
    """Cut the residual stream: its attention reads that, since norms follow attention and MLP."""
    block = m.layers[-1].blocks[-1]
    tap = MethodInputTap((block,), method="_attn")
    return at_norm1(block, call_each(m.norm), "rows", tap=tap)


@_family("SwinTransformerV2Cr")
def _swin_v2_cr(m: Any) -> LastBlock:
    """Cut the residual stream, for the same reason as in Swin V2."""
    block = _last_of_stages(m)
    tap = MethodInputTap((block,), method="_shifted_window_attn")
    return at_norm1(block, call_each(rows_to_channels), "rows", tap=tap)


@_family("TinyVit")
def _tiny_vit(m: Any) -> LastBlock:
    """Cut at the norm inside the attention, which takes windows; the grid must be one window."""
    block = _last_of_stages(m)
    return at_norm1(
        block,
        call_each(rows_to_channels),
        tap=Tap((block.attn.norm,)),
        one_window=block.window_size,
        **_ROWS_AS_TOKENS,
    )


@_family("TNT")
def _tnt(m: Any) -> LastBlock:
    """Take X inside the block, after the inner pixels have been added to the patches."""
    block = m.blocks[-1]
    tap = Tap((block.norm_out,))

    def run(x: Tensor) -> Tensor:
        x = x + block.drop_path(block.attn_out(block.norm_out(x)))
        y: Tensor = x + block.drop_path(block.mlp(block.norm_mlp(x)))
        return y

    return at_norm1(block, call_each(m.norm), tap=tap, run=run, **_CLASS_TOKEN)


@_family("Twins")
def _twins(m: Any) -> LastBlock:
    """Repeat the position block, which follows a stage's first block, if that is the last too."""
    blocks, position = m.blocks[-1], m.pos_block[-1]
    if len(blocks) > 1:
        return at_norm1(blocks[-1], call_each(m.norm))
    return at_norm1(blocks[-1], lambda y, grid: m.norm(position(y, grid)))


@_family("VisionTransformerSAM")
def _sam(m: Any) -> LastBlock:
    return at_norm1(m.blocks[-1], call_each(rows_to_channels, m.neck), "rows")


@_family("Visformer")
def _visformer(m: Any) -> LastBlock:
    return at_norm1(m.stage3[-1], call_each(m.norm), "channels")
