"""The split of Hugging Face transformers' models, and prompts as classes of its CLIP models."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from vit_reciprocam.core.split import Readout, Split
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.libraries.common.changes import (
    find_override,
    kind_of,
    refuse_bypassed,
    why_unknown,
)
from vit_reciprocam.libraries.common.multihead import (
    multihead_attention,
    multihead_output,
    why_unknown_multihead,
)
from vit_reciprocam.libraries.common.running import Call, Grid, find_calls, get_first, last_blocks
from vit_reciprocam.libraries.common.split import no_pool, run_again, split_block, split_pool
from vit_reciprocam.libraries.common.zero_shot import ZeroShot, check_prompts, fill_template
from vit_reciprocam.libraries.transformers.blocks import describe_block
from vit_reciprocam.libraries.transformers.families import (
    FAMILIES,
    ModelDescription,
    Pooling,
    base_name,
    describe_tower,
    image_tower,
)
from vit_reciprocam.libraries.validation import check_size

__all__ = ["check_class", "split", "split_tower", "zero_shot"]

_TEXTS_AT_ONCE = 256  # to bound the memory for many classes with many templates


@torch.no_grad()
def zero_shot(
    model: nn.Module, processor: Any, prompts: Sequence[str], templates: Sequence[str] = ("{}",)
) -> ZeroShot:
    """Turn a CLIPModel, SiglipModel or MetaClip2Model into a classifier of text prompts.

    The model must be in evaluation mode; `processor` is its processor or its tokenizer. `prompts`
    and `templates` are those of `vit_reciprocam.load`.
    """
    m: Any = model
    if not hasattr(model, "get_text_features"):
        raise ModelError(f"this {type(model).__name__} has no text encoder to compare images with")
    tower = image_tower(model)
    if model.training:
        raise ModelError(f"the {type(model).__name__} is in training mode: call model.eval() first")
    check_prompts(prompts, templates)
    every = [fill_template(template, prompt) for prompt in prompts for template in templates]
    starts = range(0, len(every), _TEXTS_AT_ONCE)
    embedded = [_embed(m, processor, every[start : start + _TEXTS_AT_ONCE]) for start in starts]
    each = normalize(torch.cat(embedded), dim=-1).unflatten(0, (len(prompts), len(templates)))
    return ZeroShot(
        tower,
        each.mean(dim=1),
        scale=m.logit_scale.exp().item(),
        bias=float(getattr(m, "logit_bias", 0.0)),
    )


def _embed(model: Any, processor: Any, texts: list[str]) -> Float[Tensor, "texts E"]:
    """Return the embeddings of texts before normalisation; refuse texts that are too long."""
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


def split(model: nn.Module, *, block: int = -1, pool: bool = False, depth: int = 1) -> Split:
    """Cut a transformers model at an encoder block, or before the pooling of its head.

    A hierarchical model is cut in its last stage, so its maps have the grid of that stage.
    """
    check_class(type(model))
    if isinstance(get_first(model, "classifier", "cls_classifier"), nn.Identity):
        raise ModelError(
            f"this {type(model).__name__} has no classification head (num_labels=0), so it has no "
            "class scores to explain. Load it with its head, or with num_labels=... to train one"
        )
    try:
        description = FAMILIES[base_name(type(model))](model)
    except AttributeError as error:
        raise ModelError(
            f"this {type(model).__name__} is not laid out as expected ({error}): use transformers "
            "5.10 or newer"
        ) from error
    return _split(model, description, block, pool, depth)


_INSTEAD = {
    "TimmWrapperForImageClassification": "it wraps a timm model: pass model.timm_model",
    "Siglip2ForImageClassification": "it takes patches of images of any shape, not images. The "
    "SigLIP 2 models of one image size are of class SiglipForImageClassification",
}


def check_class(kind: type) -> None:
    """Refuse a class of models that `split` does not support, and say what to pass instead."""
    name = base_name(kind)
    if name in FAMILIES:
        return
    if "ForImageClassification" in name:
        known = "it is not a Vision Transformer whose parts are known. Supported are "
        why = f"is not supported: {_INSTEAD.get(name, known + ', '.join(sorted(FAMILIES)))}"
    elif re.fullmatch("ImageTower|(CLIP|MetaClip2|Siglip)(Vision)?Model(WithProjection)?", name):
        why = (
            "gives image features, no class scores: make a classifier of text prompts with "
            "vit_reciprocam.libraries.transformers.split.zero_shot(model, processor, prompts)"
        )
    else:
        why = "has no classification head"
        if task := re.search("For([A-Z].*)", name):  # what follows "For", but not in "Former"
            purpose = re.sub("(?<=[a-z])(?=[A-Z])", " ", task[1]).lower()
            why = f"is made for {purpose}, not to classify whole images"
        why += (
            ", so it has no class scores to explain: load it with AutoModelForImageClassification"
        )
    raise ModelError(f"transformers' {name} {why}")


def split_tower(tower: nn.Module, *, block: int = -1, pool: bool = False, depth: int = 1) -> Split:
    """Cut an image tower, or the tower of a model that has one, with features as logits."""
    tower = image_tower(tower)
    return _split(tower, describe_tower(tower), block, pool, depth)


def _split(
    model: nn.Module, description: ModelDescription, number: int, pool: bool, depth: int
) -> Split:
    refuse_bypassed(model, description.blocks[-1], "transformers")
    if pool:
        return _split_pool(model, description)
    blocks = last_blocks(number, description.blocks)

    def enter(modules: Sequence[nn.Module], images: Tensor) -> tuple[Grid, list[Call]]:
        grid, calls = _enter(model, description, modules, images)
        if description.check_grid is not None:
            description.check_grid(grid)
        return grid, calls

    return split_block(
        blocks=blocks,
        describe=functools.partial(describe_block, post_norm=description.post_norm),
        enter=enter,
        before=list(description.blocks)[:number],
        depth=depth,
        head=description.head,
        reads=description.reads,
        prefix=description.prefix,
        why_unknown=_why_unknown_norm(model, blocks[0]),
    )


def _why_unknown_norm(model: nn.Module, block: nn.Module) -> str:
    """Return why a norm outside the block may read more than one token, or ""."""
    inside = {id(module) for module in block.modules()}
    found = [
        why_unknown(module, "transformers", f"the norm {path}")
        for path, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) and id(module) not in inside
    ]
    return next(filter(None, found), "")


def _enter(
    model: nn.Module,
    description: ModelDescription,
    blocks: Sequence[nn.Module],
    images: Float[Tensor, "B channels H W"],
) -> tuple[Grid, list[Call]]:
    """Return the patch grid of images, and the arguments of the model's calls of some blocks."""
    grid = _patch_grid(model, description, images)  # refuses a wrong size before the model runs
    calls = [
        (tuple(map(_share, args)), {key: _share(value) for key, value in options.items()})
        for args, options in find_calls(model, blocks, images)
    ]
    return grid if description.grid is None else description.grid(*calls[0][0][1:]), calls


def _share(value: Any) -> Any:
    """Return masks and biases (B, heads, T, T) as (1, heads, T, T), anything else as it is.

    They are the same for all images, and with one row they fit any number of masked images. Under a
    tracer, transformers makes a mask that hides nothing for each image of a batch.
    """
    return value[:1] if isinstance(value, Tensor) and value.ndim == 4 else value


def _split_pool(model: nn.Module, description: ModelDescription) -> Split:
    """Cut before the head pools: after the last block and the norm that may follow it."""
    block, head = description.blocks[-1], description.head
    pooling = head if isinstance(head, Pooling) else description.pooling
    if pooling is None:
        because = description.reads if isinstance(description.reads, str) else ""
        raise no_pool(get_first(model, "vision") or model, because)
    if pooling.around is not None:
        refuse_bypassed(model, block, "transformers", pooling.around)

    def tokens(images: Float[Tensor, "B channels H W"]) -> tuple[Grid, Float[Tensor, "B T D"]]:
        grid, (call,) = _enter(model, description, [block], images)
        return grid, pooling.tokens(run_again(block, call, call[0][0]))

    readout: Readout | str = ""
    if pooling.attention is not None:
        readout = _why_unknown_pool(pooling.attention) or _attention_pool(pooling)
    return split_pool(
        tokens=tokens,
        finish=pooling.finish,
        block=block,
        prefix=pooling.prefix,
        pool=pooling.attention,
        readout=readout,
    )


def _attention_pool(pooling: Pooling) -> Readout:
    """Return what the closed form needs of SigLIP's head: attention of a learned query, an MLP."""
    head = pooling.attention

    def finish(heads: Float[Tensor, "n B 1 A"], _normed: Tensor, _x: Tensor) -> Tensor:
        y = multihead_output(head.attention, heads)
        y = y + head.mlp(head.layernorm(y))
        return pooling.finish(y[..., 0, :])

    return Readout(1, multihead_attention(head.attention, head.probe[0]), finish)


def _why_unknown_pool(head: Any) -> str:
    """Return why running an attention pool by its parts may differ from calling it, or ""."""
    if find_override(head, "transformers"):
        return f"the head pools by a {kind_of(head)}, whose forward is not of transformers"
    return why_unknown_multihead(head.attention, "the head's attention") or why_unknown(
        head, "transformers", "the head's attention pool"
    )


def _patch_grid(
    model: Any, description: ModelDescription, images: Float[Tensor, "B channels H W"]
) -> Grid:
    """Return the grid of non-overlapping patches; refuse images that the model cannot take."""
    config = get_first(model, "vision.config", "config.vision_config", "config")
    size = _pair(config.image_size) if description.fixed_size else None
    check_size(images, config.num_channels, size=size, advice=": resize them")
    height, width = images.shape[2:]
    patch_h, patch_w = _pair(getattr(config, "patch_size", 1))
    if height < patch_h or width < patch_w:
        raise InputError(
            f"images of {height}x{width} pixels are smaller than a patch, {patch_h}x{patch_w}"
        )
    return height // patch_h, width // patch_w


def _pair(size: Any) -> Grid:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)
