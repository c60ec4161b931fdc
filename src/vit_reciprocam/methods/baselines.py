"""Methods to compare with: attention rollout, raw attention, relevance, and null baselines.

All have one signature, f(model, images, targets=None, **settings) -> (B, K, h, w): the method's own
values on the patch grid, in at least float32, on the model's device. `targets` are those of
`ReciproCAM`; only relevance depends on them, and the others give the same map for every target.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vit_reciprocam.core.scores import fuse_evidence
from vit_reciprocam.core.split import Split, widen
from vit_reciprocam.core.targets import resolve_targets
from vit_reciprocam.errors import InputError, ModelError, check_choice
from vit_reciprocam.libraries.common.encoder import Encoder, encoder_of, step_without_rule
from vit_reciprocam.libraries.common.running import find_call
from vit_reciprocam.libraries.dispatch import split_model
from vit_reciprocam.libraries.validation import check_images, check_mode
from vit_reciprocam.methods import PRESETS
from vit_reciprocam.methods.lrp import relevance_matrices, trace_layers
from vit_reciprocam.methods.null import NULLS
from vit_reciprocam.methods.trace import trace_rows
from vit_reciprocam.reciprocam import reciprocam

__all__ = [
    "grid_and_targets",
    "null_baseline",
    "raw_attention",
    "relevance",
    "rollout",
    "split_and_check",
    "trace",
    "traced",
]

Images = Float[Tensor, "B ch H W"]
Maps = Float[Tensor, "B K h w"]

_GIB = 2**30
_FUSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda heads: heads.mean(dim=1),
    "max": lambda heads: heads.amax(dim=1),
    "min": lambda heads: heads.amin(dim=1),
}


def rollout(
    model: nn.Module,
    images: Images,
    targets: Any = None,
    *,
    head_fusion: str = "mean",
    discard_ratio: float = 0.0,
    start_layer: int = 0,
    memory_limit: int = _GIB,
) -> Maps:
    """Attention rollout (Abnar & Zuidema 2020): how attention flows through all layers.

    With A_l the weights of layer l fused over heads, and rows of A_l + I scaled to sum to 1,

        rollout = (A_L + I) ... (A_2 + I) (A_1 + I),

    and the map is the class token's row over the patches, or the mean of two rows if the head reads
    a distillation token too. The paper fuses heads by the mean; the other settings are common
    additions to it. The cost is about two forward passes: the model's own, and one part by part.

    Args:
        model: Classifier whose head reads its class token; also DINOv2.
        images: Preprocessed images.
        targets: Classes, as in `ReciproCAM`; only their number matters.
        head_fusion: Fusion of the heads: "mean", "max" or "min".
        discard_ratio: Share of each image's fused weights, the smallest ones, that is set to 0.
        start_layer: First layer of the product, counted from 0.
        memory_limit: Bytes that a chunk of images may take, roughly.

    Raises:
        InputError: If the images, targets or settings do not fit.
        ModelError: If the model's attention is not known layer by layer, with the reason.
    """
    check_choice("head_fusion", head_fusion, _FUSIONS)
    if not 0 <= discard_ratio < 1:
        raise InputError(f"discard_ratio must be from 0 to below 1; got {discard_ratio}")

    def rows_and_logits(encoder: Encoder, tokens: Tensor, _chosen: Tensor) -> tuple[Tensor, Tensor]:
        fused = []
        for trace in trace_layers(encoder, tokens):
            weights = widen(_FUSIONS[head_fusion](trace.attention))
            fused.append(_drop_smallest(weights, discard_ratio))
        rows = _product_rows(fused[start_layer:], _readouts(encoder), normalise=True)
        return rows[:, None], encoder.logits(trace.out)

    return _maps_by_layer(
        model, images, targets, rows_and_logits, start_layer, memory_limit, "rollout"
    )


def raw_attention(
    model: nn.Module, images: Images, targets: Any = None, *, memory_limit: int = _GIB
) -> Maps:
    """The class token's attention in the last layer, the mean over heads.

    If the head reads a distillation token too, it is the mean of both tokens' attention.

    Args:
        model: Classifier whose head reads its class token; also DINOv2.
        images: Preprocessed images.
        targets: Classes, as in `ReciproCAM`; only their number matters.
        memory_limit: Bytes that a chunk of images may take, roughly.

    Raises:
        InputError: If the images or targets do not fit.
        ModelError: If the model's attention is not known layer by layer, with the reason.
    """

    def rows_and_logits(encoder: Encoder, tokens: Tensor, _chosen: Tensor) -> tuple[Tensor, Tensor]:
        trace = deque(trace_layers(encoder, tokens), maxlen=1).pop()
        rows = widen(trace.attention).mean(dim=1)[:, : _readouts(encoder)]
        return rows.mean(dim=1, keepdim=True), encoder.logits(trace.out)

    return _maps_by_layer(model, images, targets, rows_and_logits, 0, memory_limit, "raw_attention")


def relevance(
    model: nn.Module,
    images: Images,
    targets: Any = None,
    *,
    start_layer: int = 0,
    memory_limit: int = _GIB,
) -> Maps:
    """Relevance (Chefer, Gur, Wolf 2021), "transformer attribution" in its authors' code.

    With R_l the relevance of layer l's attention weights A_l, found by layer-wise relevance
    propagation from the target's logit (`methods.lrp`), and ∇A_l that logit's gradient,

        Ā_l = mean over heads of (∇A_l ⊙ R_l)⁺,    map = row of (Ā_L + I) ... (Ā_1 + I).

    Rows are not normalised, as in the authors' code. The row is the class token's; if the head
    reads a distillation token too, relevance starts in both heads and the map is the mean of both
    rows. LayerScale and query and key norms, which the paper's models do not have, pass relevance
    on as a LayerNorm does. In float32 the map carries rounding errors of some hundredths of its
    maximum, on some pictures much more; for a model in float64 they are negligible.

    The cost is about nine forward passes for one target, and six for each further one.

    Args:
        model: Classifier whose head reads its class token.
        images: Preprocessed images.
        targets: Classes, as in `ReciproCAM`.
        start_layer: First layer of the product, counted from 0.
        memory_limit: Bytes that a chunk of images may take, roughly.

    Raises:
        InputError: If the images, targets or settings do not fit.
        ModelError: If the model has parts for which the paper has no rule, with the reason.
    """

    def rows_and_logits(encoder: Encoder, tokens: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        logits, matrices = relevance_matrices(encoder, tokens)
        rows = [
            _product_rows(matrices(target)[start_layer:], _readouts(encoder), normalise=False)
            for target in chosen.T
        ]
        return torch.stack(rows, dim=1), logits

    return _maps_by_layer(
        model, images, targets, rows_and_logits, start_layer, memory_limit, "relevance"
    )


def trace(
    model: nn.Module, images: Images, targets: Any = None, *, memory_limit: int = _GIB
) -> Maps:
    """Return the trace: what each patch, as the blocks read it, adds to log p of each target.

    See `methods.trace`. Values are in nats, with their sign.

    Args:
        model: Model of a supported library whose head reads only its class token or tokens.
        images: Preprocessed images.
        targets: Classes, as in `ReciproCAM`.
        memory_limit: Bytes that a chunk of images may take, roughly.

    Raises:
        InputError: If the images or targets do not fit.
        ModelError: If the model has parts for which the trace has no rule, with the reason.
    """
    return _maps_by_layer(model, images, targets, trace_rows, 0, memory_limit, "trace")


def traced(
    model: nn.Module, images: Images, targets: Any = None, *, memory_limit: int = _GIB
) -> Maps:
    """Return the fused evidence of `METHODS["deep"]` plus twice the trace.

    Both are divided by their largest value first. Evidence says which windows speak for a class,
    the trace where their content came from. Arguments and errors are those of `trace`.
    """
    split = split_and_check(model, images)
    _, chosen, _ = grid_and_targets(split, images, targets)
    evidence = reciprocam(model, images, chosen, **PRESETS["deep"])
    path = trace(model, images, chosen, memory_limit=memory_limit)
    return fuse_evidence(torch.stack([evidence, path, path]))


def _product_rows(matrices: list[Tensor], readouts: int, *, normalise: bool) -> Tensor:
    """Return the readout tokens' mean row (b, T) of (A_L + I) ... (A_1 + I), from A_l (b, T, T).

    The row is multiplied from the left, one matrix after the other: no product of matrices is made.
    """
    row = torch.zeros_like(matrices[0][:, :1])
    row[..., :readouts] = 1 / readouts
    for a in reversed(matrices):
        if normalise:  # the rows of A + I then sum to 1
            row = row / (a.sum(dim=-1) + 1)[:, None]
        row = row @ a + row
    return row[:, 0]


def _drop_smallest(weights: Tensor, ratio: float) -> Tensor:
    """Set the smallest weights (b, T, T) of each image to 0, a share `ratio` of them."""
    flat = weights.flatten(1)
    smallest = flat.topk(int(flat.shape[1] * ratio), dim=1, largest=False).indices
    return flat.scatter(1, smallest, 0.0).view_as(weights)


def _readouts(encoder: Encoder) -> int:
    """Return how many tokens the head reads: the class token, perhaps a distillation token too."""
    return max(1, len(encoder.heads))


def _maps_by_layer(
    model: nn.Module,
    images: Tensor,
    targets: Any,
    rows_and_logits: Callable[[Encoder, Tensor, Tensor], tuple[Tensor, Tensor]],
    start_layer: int,
    memory_limit: int,
    method: str,
) -> Tensor:
    """Return maps from `rows_and_logits`, a function of an encoder, tokens and targets (b, K).

    The function returns rows (b, K or 1, T) of a matrix over tokens, and the logits, which must be
    those of the model itself.
    """
    split = split_and_check(model, images)
    encoder = encoder_of(model)
    if method == "relevance":
        _check_rules(model, encoder)
    if not 0 <= start_layer < len(encoder.layers):
        raise InputError(
            f"start_layer must be from 0 to {len(encoder.layers) - 1}, the last layer; "
            f"got {start_layer}"
        )
    if memory_limit <= 0:
        raise InputError(f"memory_limit must be a positive number of bytes; got {memory_limit}")
    with torch.inference_mode(False), torch.no_grad():
        grid, resolved, logits = grid_and_targets(split, images, targets)
        tokens = find_call(model, encoder.entry, images)[0][0]
        chosen = torch.from_numpy(resolved).to(tokens.device)
        found = []
        at_once = max(1, memory_limit // _bytes_per_image(encoder, tokens))
        for part in torch.arange(len(images)).split(at_once):
            rows, own_logits = rows_and_logits(encoder, tokens[part], chosen[part])
            if part[0] < len(logits):
                _check_same(model, method, own_logits[: len(logits)], logits[part[: len(logits)]])
            found.append(rows)
        maps: Tensor = torch.cat(found)[..., split.prefix_tokens :].unflatten(-1, grid)
        return maps.repeat(1, chosen.shape[1] // maps.shape[1], 1, 1)


def _check_rules(model: nn.Module, encoder: Encoder) -> None:
    """Refuse a model with a step for which relevance has no rule."""
    name, step = type(model).__name__, step_without_rule(encoder)
    because = f"it has a {step}, which is not a plain linear layer" if step else ""
    if not encoder.heads:
        because = "its head reads more than its class token"
    if because:
        raise ModelError(
            f"relevance is not supported for this {name}: {because}. Use rollout, or ReciproCAM"
        )


def _check_same(model: nn.Module, method: str, own_logits: Tensor, logits: Tensor) -> None:
    """Refuse a model that is not the sum of its parts, such as one with hooks inside."""
    # in half precision some models take the softmax in float32, and the parts here do not
    tolerance = max(1e-4, torch.finfo(logits.dtype).eps ** 0.5)
    if not (own_logits - logits).abs().max() <= tolerance * logits.abs().max():
        raise ModelError(
            f"this {type(model).__name__} is not supported by {method}: its forward differs from "
            "that of its parts, perhaps by hooks or changed modules. Use ReciproCAM"
        )


def _bytes_per_image(encoder: Encoder, tokens: Tensor) -> int:
    """Return roughly the bytes that relevance keeps per image."""
    count, width = tokens.shape[1:]
    heads = sum(layer.attention.heads for layer in encoder.layers)
    # four matrices (T, T) per head, and 30 vectors of width D per token and layer
    numbers = 4 * heads * count**2 + 30 * len(encoder.layers) * count * width
    return numbers * tokens.element_size()


def null_baseline(
    name: str, model: nn.Module, images: Images, targets: Any = None, **settings: Any
) -> Maps:
    """Return a null baseline's values on the model's grid, the same for every target.

    One image runs through the model, to find the grid and the number of classes; all of them do if
    `targets` is a function of the logits. Only the number of targets matters.
    """
    split = split_and_check(model, images)
    grid, chosen, _ = grid_and_targets(split, images, 0 if targets is None else targets)
    pictures = widen(images.detach()).cpu().numpy()
    drawn = torch.from_numpy(NULLS[name].draw(pictures, grid, **settings)).to(images.device)
    return drawn[:, None].repeat(1, chosen.shape[1], 1, 1)


def split_and_check(model: nn.Module, images: Tensor) -> Split:
    """Return a model's split; refuse a wrong model or mode, and images that do not fit."""
    split = split_model(model)
    check_mode(model)
    check_images(model, images)
    return split


def grid_and_targets(
    split: Split, images: Tensor, targets: Any
) -> tuple[tuple[int, int], np.ndarray, Tensor]:
    """Return the patch grid, the targets (B, K), and the logits of the images that ran.

    Only the first image runs, unless the targets follow from the logits: then all do.
    """
    with torch.no_grad():
        cut = split.cut(images if targets is None or callable(targets) else images[:1])
        logits = cut.rest(cut.norm(cut.x), cut.x)
    scores = np.zeros((len(images), logits.shape[1]), dtype=np.float32)
    scores[: len(logits)] = logits.float().cpu().numpy()
    return cut.grid, resolve_targets(targets, scores), logits
