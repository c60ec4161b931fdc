"""How well a saliency map lies on the object: pure functions of maps and boxes or masks.

Everything is batched over leading dimensions, computed in float64 and a fraction, not a percentage.
"""

from __future__ import annotations

import numpy as np

from vit_reciprocam.core.maps import Size, upsample
from vit_reciprocam.errors import InputError
from vit_reciprocam.evaluate.metrics.arrays import DECIMALS, check_maps, divide
from vit_reciprocam.evaluate.metrics.regions import box_masks, region_masks

__all__ = ["energy_in_box", "mass_accuracy", "pointing_game"]


def pointing_game(
    maps: np.ndarray,
    regions: np.ndarray,
    *,
    size: Size | None = None,
    tolerance: float = 0,
    mode: str = "bilinear",
) -> np.ndarray:
    """Whether the map's maximum lies in the object, (...) of 0.0 or 1.0. Higher is better.

    Zhang et al. 2016, at the picture's size. Of equal maxima the first counts, row by row from the
    top left.

    Args:
        maps: (..., h, w) in [0, 1].
        regions: The objects: masks (..., H, W), or boxes (..., 4) as in `box_masks`.
        size: (H, W), needed with boxes.
        tolerance: How many pixels from the object still count; 15 in the original.
        mode: One of `MODES`.

    Raises:
        InputError: If shapes do not fit, a region is empty or outside the picture, or maps are
            empty, NaN or outside [0, 1].
    """
    if not tolerance >= 0:
        raise InputError(f"tolerance must be 0 pixels or more; got {tolerance}")
    maps = check_maps(maps)
    masks = region_masks(maps, regions, size=size)
    height, width = masks.shape[-2:]
    cells = upsample(maps, (height, width), mode).round(DECIMALS).reshape(*maps.shape[:-2], -1)
    row, column = np.divmod(cells.argmax(axis=-1)[..., None, None], width)
    distance = np.hypot(np.arange(height)[:, None] - row, np.arange(width) - column)
    return np.asarray((masks & (distance <= tolerance)).any(axis=(-2, -1)), np.float64)


def energy_in_box(
    maps: np.ndarray, boxes: np.ndarray, *, size: Size, mode: str = "bilinear"
) -> np.ndarray:
    """Share of the map's sum that lies in the box, (...) in [0, 1]. Higher is better.

    Wang et al. 2020 (Score-CAM's energy-based pointing game). `mass_accuracy` with a box's mask;
    arguments and errors are those of `box_masks` and `pointing_game`.
    """
    return mass_accuracy(maps, box_masks(boxes, size), mode=mode)


def mass_accuracy(maps: np.ndarray, masks: np.ndarray, *, mode: str = "bilinear") -> np.ndarray:
    """Share of the map's sum that lies in the object's mask, (...) in [0, 1]. Higher is better.

    Arras et al. 2022, at the picture's size; a bicubic map counts where it is above 0. A map of
    zeros puts nothing in the object: 0. Maps (..., h, w), masks (..., H, W) bool; errors are those
    of `pointing_game`.
    """
    maps = check_maps(maps)
    masks = region_masks(maps, masks)
    energy = upsample(maps, masks.shape[-2:], mode).clip(0)
    inside, total = ((energy * part).sum(axis=(-2, -1)) for part in (masks, 1.0))
    return divide(inside, total)
