"""open_clip's image towers -> Split, and prompts as classes of its models."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NoReturn

import open_clip
from open_clip.timm_model import TimmModel
from open_clip.transformer import Attention as CustomAttention
from open_clip.transformer import (
    CustomResidualAttentionBlock,
    ResidualAttentionBlock,
    Transformer,
    VisionTransformer,
)
from torch import Tensor, nn

from vit_reciprocam.adapters.multihead import (
    multihead_attention,
    multihead_output,
    multihead_unknown,
)
from vit_reciprocam.adapters.parts import call_of, has_hooks
from vit_reciprocam.adapters.zero_shot import ZeroShot
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.split import Attention, Cut, Projection, Readout, Split, Tap

__all__ = ["check_prompts", "split", "split_tower", "zero_shot"]


def split(model: nn.Module) -> NoReturn:
    """Refuse a model without prompts.

    Raises:
        ModelError: Always: neither a CLIP model nor its image tower has classes.
    """
    raise ModelError(
        f"open_clip's {type(model).__name__} has no classes until it is given prompts: pass the "
        "CLIP model through vit_reciprocam.adapters.open_clip.zero_shot(model, tokenizer, "
        "['a photo of a dog', 'a photo of a cat'])"
    )


def split_tower(tower: nn.Module) -> Split:
    """Cut an image tower at its last block; its logits are the features before normalisation.

    Raises:
        ModelError: If it is not supported, or if its own code or hooks would be bypassed by running
            its parts.
    """
    name = type(tower).__name__
    base: Any = next((k for k in (VisionTransformer, TimmModel) if isinstance(tower, k)), None)
    if base is None:
        raise ModelError(f"open_clip's {name} is not supported: it is no Vision Transformer")
    if type(tower).forward is not base.forward:
        raise ModelError(f"{name} has a forward of its own, which running its parts would bypass")
    _refuse_hooks(tower, name)
    return _split_timm(tower) if base is TimmModel else _split_vit(tower)


def _refuse_hooks(module: nn.Module, name: str) -> None:
    if has_hooks(module):
        raise ModelError(
            f"the {name} has forward hooks on its {type(module).__name__}, which running its parts "
            "would bypass: remove them first, or put them on the modules inside"
        )


def _split_timm(tower: Any) -> Split:
    """A timm model whose head goes on into the tower's own."""
    from vit_reciprocam.adapters.timm import split as split_trunk

    trunk = copy.copy(tower.trunk)  # a module of its own, which shares all that is inside
    trunk._modules = {**trunk._modules, "head": nn.Sequential(tower.trunk.head, tower.head)}
    trunk.num_classes = -1  # timm's 0 means no head
    return split_trunk(trunk)


def _split_vit(tower: Any) -> Split:
    name = type(tower).__name__
    transformer = tower.transformer
    if type(transformer).forward is not Transformer.forward or not transformer.batch_first:
        raise ModelError(
            f"the {name}'s {type(transformer).__name__} is not open_clip's own, which puts the "
            "batch first"
        )
    _refuse_hooks(transformer, name)
    if tower.pool_type == "none":
        raise ModelError(
            f"this {name} does not pool its tokens (pool_type='none', or a parallel or cascade "
            "attention pooler), so its output is not one vector an image"
        )
    block = transformer.resblocks[-1] if len(transformer.resblocks) else None
    if not isinstance(block, (ResidualAttentionBlock, CustomResidualAttentionBlock)):
        raise ModelError(f"the {name}'s last block is a {type(block).__name__}, not open_clip's")
    because = _head_reads_all(tower) or _unknown(block)
    tap = Tap((block.ln_1,))
    b: Any = block

    def head(y: Tensor) -> Tensor:
        features: Tensor = tower._pool(y)[0]
        return features if tower.proj is None else features @ tower.proj

    def rest(normed: Tensor, x: Tensor) -> Tensor:
        with tap.replaced(normed):
            return head(block(x))

    def finish(heads: Tensor, _normed: Tensor, x: Tensor) -> Tensor:
        x = x + b.ls_1(_attended(b, heads))
        y = x + b.ls_2(b.mlp(b.ln_2(x)))
        return head(y.flatten(0, 1)).view(*y.shape[:2], -1)

    def cut(images: Tensor) -> Cut:
        channels, height, width = images.shape[1:]
        wanted = (tower.conv1.in_channels, *tower.image_size)
        if (channels, height, width) != wanted:
            raise InputError(
                f"this tower takes images of {wanted[0]} channel(s) of {wanted[1]}x{wanted[2]} "
                f"pixels (height x width), got {channels} of {height}x{width}. Resize them, or "
                "create the model with force_image_size="
            )
        return Cut(
            grid=tower.grid_size,
            x=call_of(tower, block, images)[0][0],
            norm=b.ln_1,
            rest=rest,
            readout=None if because else Readout(1, _attention(b.attn), finish),
        )

    return Split(cut=cut, prefix_tokens=1, block=block, tap=tap, direct_because=because)


def _head_reads_all(tower: Any) -> str:
    if tower.attn_pool is not None:
        return "the head's attention pooler reads all tokens, not the class token"
    if tower.pool_type != "tok":
        return f"the head reads all patches (pool_type={tower.pool_type!r}), not the class token"
    return ""


def _unknown(block: Any) -> str:
    """Why running the parts would not be running the block; empty if it would."""
    kinds = (ResidualAttentionBlock, CustomResidualAttentionBlock)
    if not any(type(block).forward is kind.forward for kind in kinds):
        return f"the last block is a {type(block).__name__}, whose parts are not known"
    if has_hooks(block):
        return "the last block has forward hooks"
    attention = block.attn
    if type(attention).forward is not CustomAttention.forward:
        return multihead_unknown(attention)
    if has_hooks(attention):
        return "the last block's attention has forward hooks"
    return "the last block's attention is a scaled cosine" if attention.scaled_cosine else ""


def _attention(attention: Any) -> Attention:
    if isinstance(attention, nn.MultiheadAttention):
        return multihead_attention(attention)
    weights, bias = attention.in_proj_weight.chunk(3), attention.in_proj_bias
    biases = [None] * 3 if bias is None else bias.chunk(3)
    query, key, value = (Projection(w, b) for w, b in zip(weights, biases, strict=True))
    return Attention(
        heads=attention.num_heads,
        scale=attention.scale,
        query=query,
        key=key,
        value=value,
        query_norm=attention.ln_q,
        key_norm=None if isinstance(attention.ln_k, nn.Identity) else attention.ln_k,
    )


def _attended(block: Any, heads: Tensor) -> Tensor:
    """From the joined heads to what the residual stream is given, before LayerScale."""
    attention = block.attn
    if isinstance(attention, nn.MultiheadAttention):
        return multihead_output(attention, heads)
    if attention.head_scale is not None:
        each = heads.unflatten(-1, (attention.num_heads, -1))
        heads = (each * attention.head_scale.squeeze(-1)).flatten(-2)
    out: Tensor = block.ln_attn(attention.out_drop(attention.out_proj(attention.ln_inner(heads))))
    return out


def zero_shot(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], templates: Sequence[str] = ("{}",)
) -> ZeroShot:
    """The image tower of a CLIP model with prompts as its classes.

    Args:
        model: open_clip's, with its text tower, in evaluation mode.
        tokenizer: Texts -> their tokens, from `open_clip.get_tokenizer`.
        prompts: One a class, whole sentences or, with templates, names. open_clip's tokenizers cut
            what is too long for the model.
        templates: Sentences with a place {} for the prompt; a class is the mean of their normalised
            embeddings.

    Raises:
        ModelError: If it is no such model, or if it is in training mode.
        InputError: If there is no prompt or template, or one that cannot be used.
    """
    m: Any = model
    if any(not hasattr(m, part) for part in ("visual", "encode_text", "logit_scale")):
        raise ModelError(
            f"{type(model).__name__} is not a CLIP model of open_clip, with an image and a text "
            "tower"
        )
    if model.training:
        raise ModelError(f"the {type(model).__name__} is in training mode: call model.eval() first")
    check_prompts(prompts, templates)
    classes = open_clip.build_zero_shot_classifier(
        m, tokenizer, list(prompts), list(templates), device=m.logit_scale.device
    )
    tower = m.visual
    if getattr(tower, "output_tokens", False):  # CoCa's gives all tokens beside the features
        tower = copy.copy(tower)
        tower.output_tokens = False
    bias = getattr(m, "logit_bias", None)
    return ZeroShot(
        tower,
        classes.T,
        scale=m.logit_scale.exp().item(),
        bias=0.0 if bias is None else bias.item(),
    )


def check_prompts(prompts: Sequence[str], templates: Sequence[str]) -> None:
    """Refuse what cannot be prompts and templates.

    Raises:
        InputError: If they are not lists of texts, or a template has no place for the prompt.
    """
    for what, texts in (("prompts", prompts), ("templates", templates)):
        if isinstance(texts, str) or not texts or not all(isinstance(one, str) for one in texts):
            raise InputError(f"{what} must be a list of at least one text, got {texts!r}")
    for template in templates:
        if "{}" not in template:
            raise InputError(f"the template {template!r} has no place {{}} for the prompt")
