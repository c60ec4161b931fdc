"""Scores of a cut under its masks, and evidence: what a window says over no window.

The paper scales each map from its smallest to its largest score, so that a patch which speaks
against a class looks like one which says nothing. The all-null mask, under which no patch is kept,
gives a natural zero: with p_n the probability under mask n and p_0 that under the all-null mask,

    evidence_n = log p_n - log p_0        (in nats)

is positive where a window makes the class more probable than no window, and negative where it makes
it less probable.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vit_reciprocam.core.closed_form import closed_form_rows
from vit_reciprocam.core.direct import direct_rows
from vit_reciprocam.core.masks import Masking
from vit_reciprocam.core.split import Cut, MeanPool, Readout, widen
from vit_reciprocam.core.targets import resolve_targets
from vit_reciprocam.errors import ModelError

__all__ = ["Scores", "compute_scores", "fuse_evidence", "scale_evidence", "to_numpy"]

_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "probability": lambda logits: logits.softmax(dim=-1),
    "log-probability": lambda logits: logits.log_softmax(dim=-1),
    "logit": lambda logits: logits,
}
"""Name of a score -> the function from logits (..., C) to scores (..., C)."""

_NOT_FINITE = (
    "the model's {} hold NaN or infinity for finite images: look at its weights, or run it in "
    "float32 if it is in half precision"
)


@dataclass(frozen=True)
class Scores:
    """Scores of the explained classes, with the prediction of the unmasked images.

    Attributes:
        scores: Scores (B, K, h, w); if several maskings are fused, the fused evidence.
        evidence: Signed evidence (B, K, h, w); None if the all-null mask was not computed.
        logits: Logits (B, C) of the unmasked images.
        targets: Explained classes (B, K).
    """

    scores: Tensor
    evidence: Tensor | None
    logits: np.ndarray
    targets: np.ndarray


def compute_scores(
    cut: Cut,
    prefix_tokens: int,
    maskings: Sequence[Masking],
    targets: Any,
    *,
    score: str,
    with_evidence: bool,
    path: str,
    memory_limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Return the scores of a cut under the masks of one masking, or of several that are fused.

    Arguments are those of `ReciproCAM`; `path` is "closed-form" or "direct".
    """
    size = with_evidence + cut.grid[0] * cut.grid[1]  # rows of one masking
    count = 1 + len(maskings) * size
    limit = memory_limit or _default_limit(cut.x.device, path)
    at_once = max(1, limit // _row_bytes(cut, path))
    if path == "direct":
        rows = direct_rows(cut, prefix_tokens, maskings, null=with_evidence)
    else:
        rows = closed_form_rows(
            cut, prefix_tokens, maskings, null=with_evidence, rows_at_once=at_once
        )
    # Evidence compares logarithms. They are taken of softmax, whose largest logit is subtracted
    # first, so nothing is rounded at the size of the logits.
    score_rows = _SCORES["log-probability" if with_evidence else score]
    chunks = math.ceil(count / at_once)
    bounds = [count * chunk // chunks for chunk in range(chunks + 1)]
    for start, stop in itertools.pairwise(bounds):
        values = rows(start, stop)  # (stop - start, B, C)
        if start == 0:  # row 0 is the prediction
            logits = to_numpy(values[0].clone())
            if not np.isfinite(logits).all():
                raise ModelError(_NOT_FINITE.format("logits"))
            chosen = resolve_targets(targets, logits)
        values = score_rows(widen(values))
        if not isinstance(targets, str):  # "all" wants every class, in order
            index = torch.from_numpy(chosen[None]).to(values.device)
            values = values.take_along_dim(index, dim=-1)
        if start == 0:
            every = values if chunks == 1 else values.new_empty(count, *values.shape[1:])
        if chunks > 1:
            every[start:stop] = values
        if progress is not None:
            progress(stop, count)
    if not every.sum().isfinite():
        raise ModelError(_NOT_FINITE.format("scores under the masks"))
    rows_last = every[1:].permute(1, 2, 0)
    if not with_evidence:
        return Scores(rows_last.unflatten(2, cut.grid), None, logits, chosen)
    by_masking = rows_last.unflatten(2, (len(maskings), size)).movedim(2, 0)
    scores = by_masking[..., 1:].unflatten(3, cut.grid)
    evidence = scores - by_masking[..., :1, None]
    if len(maskings) > 1:
        fused = fuse_evidence(evidence)
        return Scores(fused, fused, logits, chosen)
    return Scores(
        scores[0].exp() if score == "probability" else scores[0], evidence[0], logits, chosen
    )


def to_numpy(values: Tensor) -> np.ndarray:
    """Return a tensor as a float32 array on the host."""
    return values.float().cpu().numpy()


def fuse_evidence(evidence: Float[Tensor, "m B K h w"]) -> Float[Tensor, "B K h w"]:
    """Return the sum of several maskings' evidence, each divided by its own largest value.

    If none of its values is positive, it is divided by the largest absolute value, so that it keeps
    its sign.
    """
    largest = evidence.amax(dim=(-2, -1), keepdim=True)
    size = evidence.abs().amax(dim=(-2, -1), keepdim=True)
    scale = torch.where(largest > 0, largest, size)
    return (evidence / scale.masked_fill(scale == 0, 1.0)).sum(dim=0)


def scale_evidence(evidence: Float[Tensor, "*maps h w"]) -> Float[Tensor, "*maps h w"]:
    """Return the positive part over its maximum, as `core.maps.positive_part` does in NumPy."""
    positive = evidence.clamp(min=0)
    most = positive.amax(dim=(-2, -1), keepdim=True)
    return positive / most.masked_fill(most == 0, float("inf"))


def _default_limit(device: torch.device, path: str) -> int:
    """Return the number of bytes that a chunk of masks may take by default."""
    if device.type == "cpu":  # the caches decide: measured on both paths
        return 2**25 if path == "closed-form" else 2**27
    return torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 2**30


def _row_bytes(cut: Cut, path: str) -> int:
    """Return roughly the bytes that one mask takes: 20 vectors per token that H computes."""
    numbers = cut.x.numel()
    if path == "closed-form" and isinstance(cut.readout, MeanPool):
        numbers = numbers // cut.x.shape[1]
    elif path == "closed-form" and isinstance(cut.readout, Readout):
        numbers = numbers // cut.x.shape[1] * cut.readout.tokens
    return 20 * numbers * cut.x.element_size()
