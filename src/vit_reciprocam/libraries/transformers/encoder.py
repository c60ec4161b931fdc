"""transformers' ViT, DeiT and DINOv2 -> Encoder."""

from __future__ import annotations

from typing import Any

from torch import nn

from vit_reciprocam.libraries.common.encoder import Encoder, Layer, refused, steps
from vit_reciprocam.libraries.transformers.families import FAMILIES, base_name, first
from vit_reciprocam.libraries.transformers.split import NORM_1, NORM_2, attention_of, unknown_parts

__all__ = ["encoder"]

_CLASS_TOKEN = ("ViT", "ViTMSN", "DeiT", "Dinov2", "Dinov2WithRegisters")


def encoder(model: nn.Module) -> Encoder:
    """A model with a class token that its head reads.

    DINOv2's head reads the mean of all patches too, so it has rollout and no relevance.

    Raises:
        ModelError: If it is none, or if the parts of one of its blocks are not known.
    """
    m: Any = model
    family = base_name(type(model)).partition("For")[0]
    if family not in _CLASS_TOKEN:
        raise refused(model, "the parts of this architecture, or its class token, are not known")
    parts = FAMILIES[base_name(type(model))](model)
    heads: tuple[Any, ...] = (first(m, "cls_classifier", "classifier"),)
    if parts.reads == 2:
        heads += (m.distillation_classifier,)
    return Encoder(
        entry=parts.blocks[0],
        layers=tuple(_layer(model, number, block) for number, block in enumerate(parts.blocks)),
        norm=steps(m.base_model.layernorm),
        heads=tuple(steps(head) for head in heads) if isinstance(parts.reads, int) else (),
        logits=parts.head,
    )


def _layer(model: nn.Module, number: int, block: Any) -> Layer:
    unknown = unknown_parts(block)
    if unknown:
        raise refused(model, unknown.replace("the last block", f"its block {number}"))
    out = first(block, "attention.o_proj", "attention.output.dense")
    mlp = first(block, "mlp")
    inner: tuple[Any, ...] = (mlp,)
    if mlp is None:
        act = block.intermediate.intermediate_act_fn
        inner = (block.intermediate.dense, act, block.output.dense)
    elif first(mlp, "fc1") is not None:
        inner = (mlp.fc1, first(mlp, "activation_fn", "activation"), mlp.fc2)
    scales = (first(block, "layer_scale1"), first(block, "layer_scale2"))
    return Layer(
        before=steps(first(block, *NORM_1)),
        attention=attention_of(block, 0, (0, 0), {}),
        after=steps(out, scales[0]),
        mlp=steps(first(block, *NORM_2), *inner, scales[1]),
    )
