"""torchvision's Vision and Swin Transformers -> Split."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torchvision.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerBlockV2,
)
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer

from vit_reciprocam.adapters.multihead import (
    multihead_attention,
    multihead_output,
    multihead_unknown,
)
from vit_reciprocam.adapters.parts import call_of, has_hooks, same
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.split import Cut, Readout, Split, Tap

__all__ = ["split"]


def split(model: nn.Module) -> Split:
    """Cut a torchvision model at its last block.

    A Swin Transformer's last block attends within windows. At the image size that it was trained
    for, one window covers the whole last grid; on larger images a kept patch changes the tokens of
    its own window only.

    Raises:
        ModelError: If it is no Vision or Swin Transformer with a head, or if its own code or hooks
            would be bypassed by running its parts.
    """
    if isinstance(model, VisionTransformer):
        return _split_vit(model)
    if isinstance(model, SwinTransformer):
        return _split_swin(model)
    raise ModelError(
        f"torchvision's {type(model).__name__} is not supported: it is neither a VisionTransformer "
        "nor a SwinTransformer"
    )


def _split_vit(model: Any) -> Split:
    _check(model, VisionTransformer, model.heads, (model.encoder, model.encoder.layers))
    block = _last(model, model.encoder.layers, (EncoderBlock,))
    because = multihead_unknown(block.self_attention)
    if has_hooks(block):
        because = "the last block has forward hooks"

    def head(y: Tensor) -> Tensor:
        logits: Tensor = model.heads(model.encoder.ln(y)[:, 0])
        return logits

    def rest(normed: Tensor, x: Tensor) -> Tensor:
        with tap.replaced(normed):
            return head(block(x))

    def finish(heads: Tensor, _normed: Tensor, x: Tensor) -> Tensor:
        x = x + block.dropout(multihead_output(block.self_attention, heads))
        y = x + block.mlp(block.ln_2(x))
        return head(y.flatten(0, 1)).view(*y.shape[:2], -1)

    def cut(images: Tensor) -> Cut:
        side = model.image_size
        _check_channels(model.conv_proj, images)
        if images.shape[2:] != (side, side):
            height, width = images.shape[2:]
            raise InputError(
                f"this model takes images of {side}x{side} pixels (height x width), got "
                f"{height}x{width}. Resize them, or create the model with image_size="
            )
        readout = None
        if not because:
            readout = Readout(1, multihead_attention(block.self_attention), finish)
        return Cut(
            grid=(side // model.patch_size,) * 2,
            x=call_of(model, block, images)[0][0],
            norm=block.ln_1,
            rest=rest,
            readout=readout,
        )

    tap = Tap((block.ln_1,))
    return Split(cut=cut, prefix_tokens=1, block=block, tap=tap, direct_because=because)


def _split_swin(model: Any) -> Split:
    _check(model, SwinTransformer, model.head, (model.features, model.features[-1]))
    block = _last(model, model.features[-1], (SwinTransformerBlock, SwinTransformerBlockV2))
    if isinstance(block, SwinTransformerBlockV2):
        # its LayerNorms follow attention and MLP: what the attention reads is the stream itself
        norm, tap = same, Tap((block.attn,), "input")
    else:
        norm, tap = block.norm1, Tap((block.norm1,))
    patch = model.features[0][0]
    merges = len(model.features) // 2 - 1
    step = tuple(side * 2**merges for side in patch.stride)

    def rest(normed: Tensor, x: Tensor) -> Tensor:
        with tap.replaced(normed):
            y = model.norm(block(x))
        logits: Tensor = model.head(model.flatten(model.avgpool(model.permute(y))))
        return logits

    def cut(images: Tensor) -> Cut:
        _check_channels(patch, images)
        height, width = images.shape[2:]
        if not height or not width or height % step[0] or width % step[1]:
            raise InputError(
                f"this model takes images of multiples of {step[0]} by {step[1]} pixels (height x "
                f"width), which the patches of its last stage tile, got {height}x{width}"
            )
        x = call_of(model, block, images)[0][0]
        return Cut(grid=(x.shape[1], x.shape[2]), x=x, norm=norm, rest=rest)

    return Split(
        cut=cut,
        prefix_tokens=0,
        block=block,
        tap=tap,
        direct_because="the head averages all tokens",
    )


def _check(model: nn.Module, base: Any, head: nn.Module, around: Iterable[nn.Module]) -> None:
    """The model is run by its parts, so what stands around them must be torchvision's own.

    Args:
        model: The model.
        base: torchvision's class.
        head: What gives its class scores.
        around: Modules inside that are not called when the parts are.

    Raises:
        ModelError: If it is not, or if there is no head.
    """
    name = type(model).__name__
    last = list(head.modules())[-1]
    if isinstance(last, (nn.Identity, nn.Sequential)):  # the last of modules is Sequential if empty
        raise ModelError(
            f"this {name} has no classification head but the identity in its place, so it has no "
            "class scores to explain. Put a Linear there"
        )
    if type(model).forward is not base.forward:
        raise ModelError(
            f"{name} has a forward of its own, which running its parts would bypass. Explain a "
            f"plain {base.__name__} with the same weights"
        )
    for module in (model, *around):
        if has_hooks(module):
            raise ModelError(
                f"the {name} has forward hooks on its {type(module).__name__}, which running its "
                "parts would bypass: remove them first, or put them on the modules inside"
            )


def _last(model: nn.Module, blocks: Any, kinds: tuple[type[nn.Module], ...]) -> Any:
    """The last block, of a kind whose forward is torchvision's.

    Raises:
        ModelError: If there is none.
    """
    block = blocks[-1] if len(blocks) else None
    if not any(type(block).forward is kind.forward for kind in kinds if block is not None):
        raise ModelError(
            f"the last encoder block of this {type(model).__name__} is a {type(block).__name__}, "
            f"which is not supported: it must be torchvision's {kinds[0].__name__}"
        )
    return block


def _check_channels(stem: nn.Module, images: Tensor) -> None:
    convolution: Any = next(part for part in stem.modules() if isinstance(part, nn.Conv2d))
    if images.shape[1] != convolution.in_channels:
        raise InputError(
            f"this model takes {convolution.in_channels} channel(s), got images of "
            f"{images.shape[1]}"
        )
