"""The grid, the targets and the logits that methods other than ReciproCAM start from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vit_reciprocam.core.split import Split
from vit_reciprocam.core.targets import resolve_targets

__all__ = ["grid_and_targets"]


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
