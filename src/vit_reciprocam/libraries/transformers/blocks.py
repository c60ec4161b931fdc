"""The encoder blocks of transformers' models, for the closed form and as an `Encoder`."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from vit_reciprocam.core.split import Attention, Projection, Tap
from vit_reciprocam.libraries.common.changes import why_not_linear, why_unknown
from vit_reciprocam.libraries.common.encoder import Encoder, Layer, no_encoder, steps
from vit_reciprocam.libraries.common.running import Grid, get_first, same
from vit_reciprocam.libraries.common.split import BlockDescription
from vit_reciprocam.libraries.transformers.families import FAMILIES, base_name

__all__ = ["describe_block", "encoder"]

# the names under which the classes keep a block's first and second LayerNorm
_NORM_1 = ("layernorm_before", "norm1", "layer_norm1", "layer_norm_1")
_NORM_2 = ("layernorm_after", "norm2", "layer_norm2", "layer_norm_2")


def describe_block(
    block: Any, what: str = "the last block", *, post_norm: bool = False
) -> BlockDescription:
    """Describe a block, which error texts call `what`.

    If its LayerNorms follow attention and MLP, F is the input of the attention.
    """
    tap = Tap((block.attention,), "input") if post_norm else Tap((get_first(block, *_NORM_1),))
    return BlockDescription(
        tap=tap,
        attention=lambda grid, options, tokens: _describe_attention(block, tokens, grid, options),
        finish=lambda heads, _normed, x: _finish_block(block, heads, x),
        why_unknown=lambda: _why_unknown_block(block, what),
        projections=[
            (module, slice(None))
            for module in _projections(_self_attention(block))[1:]
            if isinstance(module, nn.Linear)
        ],
    )


def _why_unknown_block(block: Any, what: str) -> str:
    """Return why running a block by its parts may differ from calling it, or ""."""
    names = ("query", "key", "value")
    for name, linear in zip(names, _projections(_self_attention(block)), strict=True):
        because = why_not_linear(linear, f"{what}'s {name} projection")
        if because:
            return because
    return why_unknown(block, "transformers", what, get_first(block, *_NORM_1))


def _self_attention(block: Any) -> Any:
    """Return the module that contains the projections to query, key and value."""
    return get_first(block, "attention.attention", "attention.self", "attention", "self_attn")


def _projections(attention: Any) -> list[Any]:
    """Return the linear layers that project to query, key and value."""
    names = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))
    return [get_first(attention, *either) for either in names]


def _describe_attention(block: Any, tokens: int, grid: Grid, options: dict[str, Any]) -> Attention:
    """Return the attention of a block, which the model calls with these keyword arguments."""
    module = _self_attention(block)
    query, key, value = (Projection(one.weight, one.bias) for one in _projections(module))
    heads = get_first(module, "num_attention_heads", "num_heads")
    # biases of relative position (1, heads, T, T): those that all blocks share, and this block's
    biases = [options.get("attention_mask"), options.get("relative_position_bias")]
    make_bias = get_first(block, "relative_position_bias") or get_first(
        module, "relative_position_bias"
    )
    if make_bias is not None:
        biases.append(make_bias(grid))
    # a boolean mask hides nothing here
    given = [bias for bias in biases if bias is not None and bias.is_floating_point()]
    bias = sum(given)[0, :, :tokens].permute(2, 1, 0) if given else None
    return Attention(
        heads=heads,
        scale=(query.weight.shape[0] // heads) ** -0.5,
        query=query,
        key=key,
        value=value,
        query_norm=same,
        key_norm=None,
        bias=bias,
    )


def _finish_block(
    block: Any, heads: Float[Tensor, "*batch A"], x: Float[Tensor, "*batch D"]
) -> Float[Tensor, "*batch D"]:
    """Return the block's output for the joined heads and the skip path."""
    project = get_first(block, "attention.o_proj", "self_attn.out_proj", "attention.output.dense")
    x = x + _scale_layer(block, 1, project(heads))
    hidden = get_first(block, *_NORM_2)(x)
    mlp = get_first(block, "mlp")
    hidden = mlp(hidden) if mlp is not None else block.output(block.intermediate(hidden))
    return x + _scale_layer(block, 2, hidden)


def _scale_layer(
    block: Any, number: int, value: Float[Tensor, "*batch D"]
) -> Float[Tensor, "*batch D"]:
    """Apply BEiT's LayerScale; dropout and stochastic depth do nothing in evaluation mode."""
    scale = getattr(block, f"lambda_{number}", None)
    return value if scale is None else scale * value


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
        before=steps(get_first(block, *_NORM_1)),
        attention=description.attention((0, 0), {}, 0),
        after=steps(out, scales[0]),
        mlp=steps(get_first(block, *_NORM_2), *inner, scales[1]),
    )
