"""The definition: H run once per mask, for any H."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vit_reciprocam.core.masks import Masking, mask_matrix
from vit_reciprocam.core.split import Cut

__all__ = ["direct_rows", "under_masks"]


def direct_rows(
    cut: Cut, prefix_tokens: int, maskings: Sequence[Masking], *, null: bool = False
) -> Callable[[int, int], Tensor]:
    """Return what `closed_form_rows` does, by running H once per mask as the definition says."""
    run = under_masks(cut, maskings[0].layer)
    patches = cut.grid[0] * cut.grid[1]
    size = patches + null  # rows of one masking

    def masks(start: int, stop: int) -> Iterator[np.ndarray]:
        if start == 0:  # row 0 is the unmasked image
            yield np.ones((1, prefix_tokens + patches))
        for number, masking in enumerate(maskings):
            first = 1 + number * size + null  # row of the first patch's mask
            inside = range(max(start - first, 0), min(stop - first, patches))
            yield mask_matrix(
                cut.grid,
                masking,
                prefix_tokens=prefix_tokens,
                patches=inside,
                null=null and start < first <= stop,
            )

    def rows(start: int, stop: int) -> Tensor:
        return run(torch.from_numpy(np.concatenate([*masks(start, stop)])).to(cut.x))

    return rows


def under_masks(cut: Cut, layer: str) -> Callable[[Tensor], Tensor]:
    """Return H as a function of masks (M, T) that returns the logits (M, B, C)."""
    x, at_norm = cut.x, layer != "block"
    tokens = cut.norm(x) if at_norm else x

    def run(masks: Float[Tensor, "M T"]) -> Tensor:
        masked = (tokens * _shape_masks(masks, cut)).flatten(0, 1)
        if at_norm:
            logits = cut.rest(masked, x.repeat(masks.shape[0], *(1,) * (x.ndim - 1)))
        else:
            logits = cut.rest(cut.norm(masked), masked)
        rows: Tensor = logits.unflatten(0, (masks.shape[0], -1))
        return rows

    return run


def _shape_masks(masks: Float[Tensor, "M T"], cut: Cut) -> Tensor:
    """Return masks in the shape (M, 1, ...) that multiplies the tokens of all images."""
    if cut.x.ndim == 3:
        return masks[:, None, :, None]
    masks = masks.unflatten(1, cut.grid)[:, None]
    return masks[:, :, None] if cut.channels_first else masks[..., None]
