"""Hugging Face transformers' models -> Split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vit_reciprocam.core.split import Attention, MeanPool, Projection, Readout, Split, Tap
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.libraries.common.blocks import run_again, split_block
from vit_reciprocam.libraries.common.multihead import (
    multihead_attention,
    multihead_output,
    multihead_unknown,
)
from vit_reciprocam.libraries.common.pooling import no_pool, split_pool
from vit_reciprocam.libraries.common.running import Call, blocks_from, calls_of, same
from vit_reciprocam.libraries.common.whole import (
    is_own,
    kind_of,
    not_plain,
    refuse_bypassed,
    unknown_inside,
)
from vit_reciprocam.libraries.common.zero_shot import ZeroShot, check_prompts, filled
from vit_reciprocam.libraries.transformers.families import (
    FAMILIES,
    Grid,
    Parts,
    Pooling,
    base_name,
    check_class,
    first,
    image_tower,
    tower_parts,
)

__all__ = [
    "NORM_1",
    "NORM_2",
    "attention_of",
    "split",
    "split_tower",
    "unknown_parts",
    "zero_shot",
]

NORM_1 = ("layernorm_before", "norm1", "layer_norm1", "layer_norm_1")
NORM_2 = ("layernorm_after", "norm2", "layer_norm2", "layer_norm_2")
_TEXTS_AT_ONCE = 256


@torch.no_grad()
def zero_shot(
    model: nn.Module, processor: Any, prompts: Sequence[str], templates: Sequence[str] = ("{}",)
) -> ZeroShot:
    """A classifier of text prompts.

    Args:
        model: CLIPModel, SiglipModel or MetaClip2Model, in evaluation mode.
        processor: Its processor or tokenizer.
        prompts: One a class.
        templates: What "{}" of a template is replaced by a prompt gives one text; a class is the
            mean of its texts' normalised embeddings.

    Raises:
        ModelError: If the model does not compare images with texts, is not supported, or is in
            training mode.
        InputError: If there is no prompt or template, or one that cannot be used.
    """
    m: Any = model
    if not hasattr(model, "get_text_features"):
        raise ModelError(f"this {type(model).__name__} has no text encoder to compare images with")
    tower = image_tower(model)
    if model.training:
        raise ModelError(f"the {type(model).__name__} is in training mode: call model.eval() first")
    check_prompts(prompts, templates)
    every = [filled(template, prompt) for prompt in prompts for template in templates]
    embedded = torch.cat(
        [
            _embed(m, processor, every[start : start + _TEXTS_AT_ONCE])
            for start in range(0, len(every), _TEXTS_AT_ONCE)
        ]
    )
    return ZeroShot(
        tower,
        normalize(embedded, dim=-1).unflatten(0, (len(prompts), len(templates))).mean(dim=1),
        scale=m.logit_scale.exp().item(),
        bias=float(getattr(m, "logit_bias", 0.0)),
    )


def _embed(model: Any, processor: Any, texts: list[str]) -> Tensor:
    longest = model.config.text_config.max_position_embeddings
    tokenizer = getattr(processor, "tokenizer", processor)
    # SigLIP was trained on padded texts and reads the last position
    padding = {"padding": "max_length", "max_length": longest}
    siglip = hasattr(model, "logit_bias")
    tokens = tokenizer(texts, return_tensors="pt", **(padding if siglip else {"padding": True}))
    count = tokens["input_ids"].shape[1]
    if count > longest:
        text = max(texts, key=len)
        raise InputError(f"a prompt has {count} tokens, the model takes {longest}: {text!r}")
    device = model.logit_scale.device
    features = model.get_text_features(**{key: value.to(device) for key, value in tokens.items()})
    embedded: Tensor = features.pooler_output
    return embedded


def split(model: nn.Module, *, block: int = -1, pool: bool = False) -> Split:
    """Cut a transformers model at an encoder block, or before the pooling of its head.

    A hierarchical model's blocks are those of its last stage, whose grid the maps have.

    Raises:
        ModelError: If it is not a supported classifier, or if its own code or hooks would be
            bypassed by running its parts.
        InputError: If it has no such block, or no pooling to cut at.
    """
    check_class(type(model))
    if isinstance(first(model, "classifier", "cls_classifier"), nn.Identity):
        raise ModelError(
            f"this {type(model).__name__} has no classification head (num_labels=0), so it has no "
            "class scores to explain. Load it with its head, or with num_labels=... to train one"
        )
    try:
        parts = FAMILIES[base_name(type(model))](model)
    except AttributeError as error:
        raise ModelError(
            f"this {type(model).__name__} is not laid out as expected ({error}): use transformers "
            "5.10 or newer"
        ) from error
    return _split(model, parts, block, pool)


def split_tower(tower: nn.Module, *, block: int = -1, pool: bool = False) -> Split:
    """Cut an image tower alike; its features take the place of logits.

    Raises:
        ModelError: If it is not a supported tower, or if its own code or hooks would be bypassed by
            running its parts.
        InputError: If it has no such block, or no pooling to cut at.
    """
    tower = image_tower(tower)
    return _split(tower, tower_parts(tower), block, pool)


def _split(model: nn.Module, parts: Parts, number: int, pool: bool) -> Split:
    refuse_bypassed(model, parts.blocks[-1], "transformers")
    if pool:
        return _split_pool(model, parts)
    blocks = blocks_from(number, parts.blocks)
    if isinstance(parts.reads, str):
        because = parts.reads
    else:
        because = unknown_parts(blocks[0]) if number == -1 else "the cut is not in the last block"
        because = because or _unknown_norm(model, blocks[0])

    def calls(images: Tensor) -> tuple[Grid, list[Call]]:
        grid, called = _calls(model, parts, blocks, images)
        if parts.check_grid is not None:
            parts.check_grid(grid)
        return grid, called

    tokens = parts.reads if isinstance(parts.reads, int) else 0
    block = blocks[0]
    return split_block(
        blocks=blocks,
        calls=calls,
        tap=Tap((block.attention,), "input") if parts.post_norm else Tap((first(block, *NORM_1),)),
        head=parts.head,
        because=because,
        prefix=parts.prefix,
        tokens=tokens,
        attention=lambda grid, options: attention_of(block, tokens, grid, options),
        after=lambda heads, _normed, x: _after_attention(block, heads, x),
    )


def _unknown_norm(model: nn.Module, block: nn.Module) -> str:
    """Why the norm after the last block may look at more than one token; empty if it does not."""
    inside = {id(module) for module in block.modules()}
    found = [
        unknown_inside(module, "transformers", f"the norm {path}")
        for path, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) and id(module) not in inside
    ]
    return next(filter(None, found), "")


def _calls(
    model: nn.Module, parts: Parts, blocks: Sequence[nn.Module], images: Tensor
) -> tuple[Grid, list[Call]]:
    """The patch grid of images, and how the model calls some of its blocks for them."""
    grid = _patch_grid(parts, images)
    calls = [
        (tuple(map(_shared, args)), {key: _shared(value) for key, value in options.items()})
        for args, options in calls_of(model, blocks, images)
    ]
    return grid if parts.grid is None else parts.grid(*calls[0][0][1:]), calls


def _shared(value: Any) -> Any:
    """Masks and biases (B, heads, T, T) as (1, heads, T, T): images differ in none.

    A tracer has transformers make masks, which hide nothing, for each image of a batch.
    """
    return value[:1] if isinstance(value, Tensor) and value.ndim == 4 else value


def _split_pool(model: nn.Module, parts: Parts) -> Split:
    """Cut before the head pools: after the last block and the norm that may follow it."""
    block = parts.blocks[-1]
    pooling = parts.head if isinstance(parts.head, Pooling) else parts.pooling
    if pooling is None:
        because = parts.reads if isinstance(parts.reads, str) else ""
        raise no_pool(first(model, "vision") or model, because)
    if pooling.around is not None:
        refuse_bypassed(model, block, "transformers", pooling.around)

    def tokens(images: Tensor) -> tuple[Grid, Tensor]:
        grid, (call,) = _calls(model, parts, [block], images)
        return grid, pooling.tokens(run_again(block, call, call[0][0]))

    readout: MeanPool | Readout | str = MeanPool(pooling.finish)
    if pooling.attention is not None:
        readout = _pool_unknown(pooling.attention) or _attending(pooling)
    return split_pool(
        tokens=tokens,
        pool=pooling.pool,
        finish=pooling.finish,
        readout=readout,
        block=block,
        prefix=pooling.prefix,
    )


def _attending(pooling: Pooling) -> Readout:
    """SigLIP's head: a learned probe asks, then an MLP."""
    head = pooling.attention

    def finish(heads: Tensor, _normed: Tensor, _x: Tensor) -> Tensor:
        y = multihead_output(head.attention, heads)
        y = y + head.mlp(head.layernorm(y))
        return pooling.finish(y[..., 0, :])

    return Readout(1, multihead_attention(head.attention, head.probe[0]), finish)


def _pool_unknown(head: Any) -> str:
    """Why running the attention pool's parts would not be running it; empty if it would."""
    if not is_own(head, "transformers"):
        return f"the head pools by a {kind_of(head)}, whose forward is not of transformers"
    return multihead_unknown(head.attention, "the head's attention") or unknown_inside(
        head, "transformers", "the head's attention pool"
    )


def _patch_grid(parts: Parts, images: Tensor) -> Grid:
    """The grid of an image size, where patches do not overlap and are not merged.

    Raises:
        InputError: If the model cannot take images of that size.
    """
    config, (channels, height, width) = parts.config, images.shape[1:]
    if channels != config.num_channels:
        raise InputError(
            f"this model takes {config.num_channels} channel(s), got images of {channels}"
        )
    if parts.fixed_size and (height, width) != _pair(config.image_size):
        want_h, want_w = _pair(config.image_size)
        raise InputError(
            f"this model takes images of {want_h}x{want_w} pixels (height x width), got "
            f"{height}x{width}: resize them"
        )
    patch_h, patch_w = _pair(getattr(config, "patch_size", 1))
    if height < patch_h or width < patch_w:
        raise InputError(
            f"images of {height}x{width} pixels are smaller than a patch, {patch_h}x{patch_w}"
        )
    return height // patch_h, width // patch_w


def _pair(size: Any) -> Grid:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _self_attention(block: Any) -> Any:
    """The module that holds the projections to queries, keys and values."""
    return first(block, "attention.attention", "attention.self", "attention", "self_attn")


def _projections(attention: Any) -> list[Any]:
    names = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))
    return [first(attention, *either) for either in names]


def attention_of(block: Any, tokens: int, grid: Grid, options: dict[str, Any]) -> Attention:
    """Return the attention of a block by its parts."""
    module = _self_attention(block)
    query, key, value = (Projection(one.weight, one.bias) for one in _projections(module))
    heads = first(module, "num_attention_heads", "num_heads")
    # biases by relative position (1, heads, T, T): of all blocks, and of this block
    biases = [options.get("attention_mask"), options.get("relative_position_bias")]
    own = first(block, "relative_position_bias") or first(module, "relative_position_bias")
    if own is not None:
        biases.append(own(grid))
    # a mask of truth values hides nothing
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


def _after_attention(block: Any, heads: Tensor, x: Tensor) -> Tensor:
    """From the joined heads and the skip path to the block's output."""
    attended = first(block, "attention.o_proj", "self_attn.out_proj", "attention.output.dense")
    x = x + _scaled(block, 1, attended(heads))
    hidden = first(block, *NORM_2)(x)
    mlp = first(block, "mlp")
    hidden = mlp(hidden) if mlp is not None else block.output(block.intermediate(hidden))
    return x + _scaled(block, 2, hidden)


def _scaled(block: Any, number: int, value: Tensor) -> Tensor:
    """With BEiT's LayerScale; dropout and stochastic depth do nothing in evaluation mode."""
    scale = getattr(block, f"lambda_{number}", None)
    return value if scale is None else scale * value


def unknown_parts(block: Any) -> str:
    """Why running the last block's parts would not be running the block; empty if it would."""
    names = ("query", "key", "value")
    for name, linear in zip(names, _projections(_self_attention(block)), strict=True):
        because = not_plain(linear, f"the last block's {name} projection")
        if because:
            return because
    return unknown_inside(block, "transformers", "the last block", first(block, *NORM_1))
