"""transformers' ViT, DeiT and DINOv2 as an `Encoder`."""

from __future__ import annotations

from typing import Any

from torch import nn

from vit_reciprocam.libraries.common.encoder import Encoder, Layer, no_encoder, steps
from vit_reciprocam.libraries.transformers.blocks import NORM_1, NORM_2, describe_block
from vit_reciprocam.libraries.transformers.families import FAMILIES, base_name, get_first

__all__ = ["encoder"]

_CLASS_TOKEN = ("ViT", "ViTMSN", "DeiT", "Dinov2", "Dinov2WithRegisters")


def encoder(model: nn.Module) -> Encoder:
    """Describe a model whose head reads its class token.

    DINOv2's head reads the mean of all patches too, so `heads` is empty: relevance is not defined.
    """
    m: Any = model
    family = base_name(type(model)).partition("For")[0]
    if family not in _CLASS_TOKEN:
        raise no_encoder(model, "the parts of this architecture, or its class token, are not known")
    description = FAMILIES[base_name(type(model))](model)
    heads: tuple[Any, ...] = (get_first(m, "cls_classifier", "classifier"),)
    if description.reads == 2:
        heads += (m.distillation_classifier,)
    blocks = description.blocks
    return Encoder(
        entry=blocks[0],
        layers=tuple(_layer(model, number, block) for number, block in enumerate(blocks)),
        norm=steps(m.base_model.layernorm),
        heads=tuple(steps(head) for head in heads) if isinstance(description.reads, int) else (),
        logits=description.head,
    )


def _layer(model: nn.Module, number: int, block: Any) -> Layer:
    description = describe_block(block, f"its block {number}")
    if because := description.why_unknown():
        raise no_encoder(model, because)
    out = get_first(block, "attention.o_proj", "attention.output.dense")
    mlp = get_first(block, "mlp")
    inner: tuple[Any, ...] = (mlp,)
    if mlp is None:  # two modules of the block take its place
        act = block.intermediate.intermediate_act_fn
        inner = (block.intermediate.dense, act, block.output.dense)
    elif get_first(mlp, "fc1") is not None:
        inner = (mlp.fc1, get_first(mlp, "activation_fn", "activation"), mlp.fc2)
    scales = (get_first(block, "layer_scale1"), get_first(block, "layer_scale2"))
    return Layer(
        before=steps(get_first(block, *NORM_1)),
        attention=description.attention((0, 0), {}, 0),
        after=steps(out, scales[0]),
        mlp=steps(get_first(block, *NORM_2), *inner, scales[1]),
    )
