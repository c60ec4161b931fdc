"""torchvision's VisionTransformer as an `Encoder`."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer

from vit_reciprocam.core.split import Projection, projections
from vit_reciprocam.libraries.common.changes import kind_of, runs_as
from vit_reciprocam.libraries.common.encoder import Encoder, Layer, no_encoder, steps
from vit_reciprocam.libraries.common.multihead import multihead_attention
from vit_reciprocam.libraries.torchvision.split import describe_block

__all__ = ["encoder"]


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
    if unknown := describe_block(block, what).why_unknown():
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
