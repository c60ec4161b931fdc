"""timm's VisionTransformer as an `Encoder`."""

from __future__ import annotations

from typing import Any

from timm.layers import Mlp
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import nn

from vit_reciprocam.libraries.common.changes import has_hooks, kind_of, runs_as
from vit_reciprocam.libraries.common.encoder import Encoder, Layer, no_encoder, steps
from vit_reciprocam.libraries.timm.blocks import describe_block
from vit_reciprocam.libraries.timm.split import count_readout_tokens

__all__ = ["encoder"]


def encoder(model: nn.Module) -> Encoder:
    """Describe a model whose head reads its class token, and a distillation token if it has one."""
    m: Any = model
    if not isinstance(model, VisionTransformer):
        raise no_encoder(model, "the parts of this architecture are not known")
    tokens = count_readout_tokens(model)
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
