"""The split of torchvision's Vision and Swin Transformers, and the former as an `Encoder`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerBlockV2,
)
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer

from vit_reciprocam.core.split import Projection, Split, Tap, projections
from vit_reciprocam.errors import ModelError
from vit_reciprocam.libraries.common.changes import kind_of, refuse_bypassed, runs_as, why_unknown
from vit_reciprocam.libraries.common.encoder import Encoder, Layer, no_encoder, steps
from vit_reciprocam.libraries.common.multihead import (
    multihead_attention,
    multihead_output,
    why_unknown_multihead,
)
from vit_reciprocam.libraries.common.running import Call, Grid, find_calls, last_blocks
from vit_reciprocam.libraries.common.split import (
    BlockDescription,
    no_pool,
    run_again,
    split_block,
    split_pool,
)
from vit_reciprocam.libraries.validation import check_size

__all__ = ["encoder", "split", "unsupported"]


def split(model: nn.Module, *, block: int = -1, pool: bool = False, depth: int = 1) -> Split:
    """Cut a torchvision model at an encoder block, or before the pooling of its head.

    A Swin Transformer is cut in its last stage, so its maps have the grid of that stage. The blocks
    there attend within windows. At the image size that the model was trained for, one window covers
    the whole grid; on larger images a kept patch changes the tokens of its own window only.
    """
    if isinstance(model, VisionTransformer):
        if pool:
            raise no_pool(model)
        return _split_vit(model, block, depth)
    if isinstance(model, SwinTransformer):
        return _split_swin(model, block, pool)
    raise unsupported(type(model).__name__, *(cls.__module__ for cls in type(model).__mro__))


def unsupported(name: str, *modules: str) -> ModelError:
    """Return the error for a model by name, whose class and its bases are defined in modules."""
    for task, does in (("detection", "finds boxes in images"), ("segmentation", "labels pixels")):
        if any(module.startswith(f"torchvision.models.{task}") for module in modules):
            return ModelError(
                f"torchvision's {name} {does}, and gives no class scores of an image: pass a "
                "classifier, such as torchvision.models.vit_b_16(), or wrap it in a module that "
                "gives scores (batch, classes) and name where to cut it with target="
            )
    return ModelError(
        f"torchvision's {name} is not supported: it is neither a VisionTransformer nor a "
        "SwinTransformer"
    )


def _split_vit(model: Any, number: int, depth: int) -> Split:
    _check_head(model, model.heads)
    blocks = _find_blocks(model, model.encoder.layers, (EncoderBlock,), number)
    refuse_bypassed(model, blocks[0], "torchvision")

    def enter(modules: Sequence[nn.Module], images: Tensor) -> tuple[Grid, list[Call]]:
        side = model.image_size
        advice = ". Resize them, or create the model with image_size="
        _check_size(model.conv_proj, images, size=(side, side), advice=advice)
        return (side // model.patch_size,) * 2, find_calls(model, modules, images)

    return split_block(
        blocks=blocks,
        describe=_describe_block,
        enter=enter,
        head=lambda y: model.heads(model.encoder.ln(y)[:, 0]),
        before=list(model.encoder.layers)[:number],
        depth=depth,
        reads=1,
        prefix=1,
        why_unknown=why_unknown(model.encoder.ln, "torchvision", "the norm after the last block"),
    )


def _describe_block(block: Any, what: str = "the last block") -> BlockDescription:
    """Describe an `EncoderBlock`, which error texts call `what`."""
    attention = block.self_attention

    def finish(
        heads: Float[Tensor, "n B R A"], _normed: Tensor, x: Float[Tensor, "n B R D"]
    ) -> Float[Tensor, "n B R D"]:
        x = x + block.dropout(multihead_output(attention, heads))
        y: Tensor = x + block.mlp(block.ln_2(x))
        return y

    return BlockDescription(
        tap=Tap((block.ln_1,)),
        attention=lambda *_: multihead_attention(attention),
        finish=finish,
        why_unknown=lambda: (
            why_unknown_multihead(attention, f"{what}'s attention")
            or why_unknown(block, "torchvision", what, block.ln_1)
        ),
    )


def _split_swin(model: Any, number: int, pool: bool) -> Split:
    _check_head(model, model.head)
    last = (model.permute, model.avgpool, model.flatten)  # a cut before the pool calls none of them
    mean = type(model.avgpool) is nn.AdaptiveAvgPool2d and model.avgpool.output_size in (1, (1, 1))
    if pool and not mean:
        raise no_pool(model, f"the head pools by {model.avgpool}")
    blocks = _find_blocks(
        model, model.features[-1], (SwinTransformerBlock, SwinTransformerBlockV2), number
    )
    block = blocks[0]
    refuse_bypassed(model, block, "torchvision", *(last if pool else ()))

    def enter(modules: Sequence[nn.Module], images: Tensor) -> tuple[Grid, list[Call]]:
        stem = model.features[0][0]
        merges = len(model.features) // 2 - 1  # between two stages, 2x2 patches are merged
        step = tuple(side * 2**merges for side in stem.stride)
        advice = ", which the patches of its last stage do not tile"
        _check_size(stem, images, step=step, advice=advice)
        calls = find_calls(model, modules, images)
        ((x, *_), _), *_ = calls  # (B, h, w, D)
        return (x.shape[1], x.shape[2]), calls

    def tokens(images: Float[Tensor, "B channels H W"]) -> tuple[Grid, Float[Tensor, "B T D"]]:
        grid, (call,) = enter([block], images)
        return grid, model.norm(run_again(block, call, call[0][0])).flatten(1, 2)

    if pool:
        return split_pool(tokens=tokens, finish=model.head, block=block)
    # a V2's LayerNorms follow attention and MLP: what the attention reads is the stream itself
    post_norm = isinstance(block, SwinTransformerBlockV2)
    tap = Tap((block.attn,), "input") if post_norm else Tap((block.norm1,))
    return split_block(
        blocks=blocks,
        describe=lambda *_: BlockDescription(tap),
        enter=enter,
        head=lambda y: model.head(model.flatten(model.avgpool(model.permute(model.norm(y))))),
        reads="the head averages all tokens",
    )


def _check_head(model: nn.Module, head: nn.Module) -> None:
    """Refuse a model whose head gives no class scores: the identity or an empty Sequential."""
    last = list(head.modules())[-1]  # an empty Sequential is its own last module
    if isinstance(last, (nn.Identity, nn.Sequential)):
        raise ModelError(
            f"this {type(model).__name__} has no classification head but the identity in its "
            "place, so it has no class scores to explain. Put a Linear there"
        )


def _find_blocks(
    model: nn.Module, blocks: Any, kinds: tuple[type[nn.Module], ...], number: int
) -> list[Any]:
    """Return the blocks from a number on, see `last_blocks`; the first must be of these kinds."""
    found = last_blocks(number, list(blocks) or [None])  # None: an empty model is refused below
    block = found[0]
    if not runs_as(block, *kinds):
        raise ModelError(
            f"the last encoder block of this {type(model).__name__} is a {kind_of(block)}, "
            f"which is not supported: it must be torchvision's {kinds[0].__name__}"
        )
    return found


def _check_size(stem: nn.Module, images: Float[Tensor, "B channels H W"], **fits: Any) -> None:
    """Refuse images that do not fit a model, which takes the channels of its stem's convolution."""
    convolution = next(part for part in stem.modules() if isinstance(part, nn.Conv2d))
    check_size(images, convolution.in_channels, **fits)


def encoder(model: nn.Module) -> Encoder:
    """Describe a VisionTransformer; refuse one with a block whose parts are not known."""
    m: Any = model
    if not isinstance(model, VisionTransformer):
        raise no_encoder(model, "the parts of this architecture are not known")
    return Encoder(
        entry=m.encoder.layers[0],
        layers=tuple(_layer(model, number, block) for number, block in enumerate(m.encoder.layers)),
        norm=steps(m.encoder.ln),
        heads=(steps(m.heads),),
        logits=lambda y: m.heads(m.encoder.ln(y)[:, 0]),
    )


def _layer(model: nn.Module, number: int, block: Any) -> Layer:
    what = f"its block {number}"
    if not runs_as(block, EncoderBlock):
        raise no_encoder(model, f"{what} is a {kind_of(block)}, whose parts are not known")
    if unknown := _describe_block(block, what).why_unknown():
        raise no_encoder(model, unknown)
    attention = block.self_attention
    query, _, _ = projections(attention.in_proj_weight.chunk(3), attention.in_proj_bias)
    out = Projection(attention.out_proj.weight, attention.out_proj.bias)
    return Layer(
        before=steps(block.ln_1),
        attention=dataclasses.replace(multihead_attention(attention), query=query),
        after=(out, *steps(block.dropout)),
        mlp=steps(block.ln_2, block.mlp),
    )
