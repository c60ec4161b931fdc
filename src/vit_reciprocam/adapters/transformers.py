"""Hugging Face transformers' models -> Split."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vit_reciprocam.adapters.parts import call_of, same
from vit_reciprocam.adapters.transformers_families import (
    FAMILIES,
    Grid,
    Parts,
    base_name,
    check_class,
    first,
    image_tower,
    tower_parts,
)
from vit_reciprocam.adapters.zero_shot import ZeroShot
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.split import Attention, Cut, Projection, Readout, Split, Tap

__all__ = ["split", "split_tower", "zero_shot"]

_NORM_1 = ("layernorm_before", "norm1", "layer_norm1", "layer_norm_1")
_NORM_2 = ("layernorm_after", "norm2", "layer_norm2", "layer_norm_2")
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
        ModelError: If the model does not compare images with texts, or is not supported.
        InputError: If there is no prompt or template, or one is too long for the model.
    """
    m: Any = model
    if not hasattr(model, "get_text_features"):
        raise ModelError(f"this {type(model).__name__} has no text encoder to compare images with")
    tower = image_tower(model)
    for what, texts in (("prompts", prompts), ("templates", templates)):
        if isinstance(texts, str) or not texts:
            raise InputError(f"{what} must be a list of at least one text; got {texts!r}")
    every = [template.format(prompt) for prompt in prompts for template in templates]
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


def split(model: nn.Module) -> Split:
    """Cut a transformers model at its last block.

    Raises:
        ModelError: If it is not a supported classifier, or if its own code or hooks would be
            bypassed by running its parts.
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
    return _split(model, parts)


def split_tower(tower: nn.Module) -> Split:
    """Cut an image tower at its last block; its features take the place of logits.

    Raises:
        ModelError: If it is not a supported tower, or if its own code or hooks would be bypassed by
            running its parts.
    """
    tower = image_tower(tower)
    return _split(tower, tower_parts(tower))


def _split(model: nn.Module, parts: Parts) -> Split:
    _refuse_bypassed_code(model, parts.block)
    norm = first(parts.block, *_NORM_1)
    because = parts.reads if isinstance(parts.reads, str) else _unknown(parts.block)
    tap = parts.tap or Tap((norm,))
    return Split(
        cut=functools.partial(
            _cut, model, parts, tap, same if tap.side == "input" else norm, not because
        ),
        prefix_tokens=parts.prefix,
        block=parts.block,
        tap=tap,
        direct_because=because,
    )


def _cut(
    model: nn.Module,
    parts: Parts,
    tap: Tap,
    norm: Callable[[Tensor], Tensor],
    closed_form: bool,
    images: Tensor,
) -> Cut:
    grid = _patch_grid(parts, images)
    (x, *others), options = call_of(model, parts.block, images)
    if parts.grid is not None:
        grid = parts.grid(*others)

    def rest(normed: Tensor, x: Tensor) -> Tensor:
        with tap.replaced(normed):
            y = parts.block(x, *others, **options)
        return parts.head(y if isinstance(y, Tensor) else y[0])

    def finish(heads: Tensor, normed: Tensor, skip: Tensor) -> Tensor:
        y = _after_attention(parts.block, heads, skip)
        return parts.head(y.flatten(0, 1)).view(*y.shape[:2], -1)

    readout = None
    if closed_form and isinstance(parts.reads, int):
        attention = _attention(parts.block, parts.reads, grid, options)
        readout = Readout(parts.reads, attention, finish)
    return Cut(grid=grid, x=x, norm=norm, rest=rest, readout=readout)


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


def _attention(block: Any, tokens: int, grid: Grid, options: dict[str, Any]) -> Attention:
    module = _self_attention(block)
    query, key, value = (Projection(one.weight, one.bias) for one in _projections(module))
    heads = first(module, "num_attention_heads", "num_heads")
    # biases by relative position (1, heads, T, T): of all blocks, and of this block
    biases = [options.get("attention_mask"), options.get("relative_position_bias")]
    own = first(block, "relative_position_bias") or first(module, "relative_position_bias")
    if own is not None:
        biases.append(own(grid))
    given = [bias for bias in biases if bias is not None]
    bias = torch.cat(given).sum(dim=0)[:, :tokens].permute(2, 1, 0) if given else None
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
    hidden = first(block, *_NORM_2)(x)
    mlp = first(block, "mlp")
    hidden = mlp(hidden) if mlp is not None else block.output(block.intermediate(hidden))
    return x + _scaled(block, 2, hidden)


def _scaled(block: Any, number: int, value: Tensor) -> Tensor:
    """With BEiT's LayerScale; dropout and stochastic depth do nothing in evaluation mode."""
    scale = getattr(block, f"lambda_{number}", None)
    return value if scale is None else scale * value


def _unknown(block: Any) -> str:
    """Why running the last block's parts would not be running the block; empty if it would."""
    attention = first(block, "attention", "self_attn")
    for module in (block, *attention.modules()):
        kind = type(module).__name__
        if not _is_own(module):
            return f"the last block has a {kind} whose forward is not of transformers"
        if _has_hooks(module):
            return f"the last block's {kind} has forward hooks"
    for projection in _projections(_self_attention(block)):
        if type(projection).forward is not nn.Linear.forward:
            kind = type(projection).__name__
            return f"the last block's attention has a {kind}, not a plain Linear"
    return ""


def _refuse_bypassed_code(model: nn.Module, block: nn.Module) -> None:
    """What calls the block is not run whole, so it must be the library's own, without hooks."""
    path = next(name for name, module in model.named_modules() if module is block)
    steps = path.split(".")
    for depth in range(len(steps)):
        module = model.get_submodule(".".join(steps[:depth]))
        name = type(module).__name__
        if not _is_own(module):
            raise ModelError(
                f"{name} has a forward of its own, which running its parts would bypass. Explain a "
                "plain model of transformers with the same weights"
            )
        if _has_hooks(module):
            raise ModelError(
                f"the {name} has forward hooks, which running its parts would bypass: remove them "
                "first, or put them on the modules inside"
            )


def _is_own(module: nn.Module) -> bool:
    """Whether the module's forward is as its library wrote it."""
    if "forward" in vars(module):
        return False
    kind = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return kind.__module__.partition(".")[0] in ("transformers", "torch", "vit_reciprocam")


def _has_hooks(module: nn.Module) -> bool:
    """Whether somebody put forward hooks on the module.

    transformers' own, which stay on after a call with output_hidden_states=True, do nothing else.
    """
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    ours = "transformers.utils.output_capturing"
    return any(getattr(hook, "__module__", None) != ours for hook in hooks)
