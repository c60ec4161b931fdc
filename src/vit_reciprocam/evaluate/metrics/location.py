"""How well a saliency map finds the object: pure functions of maps and boxes or masks.

Everything is batched over leading dimensions and computed in float64 at the picture's size; results
are fractions, not percentages.
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
    """Return 1.0 for each map whose maximum lies in its object, else 0.0. Higher is better.

    Zhang et al. 2016. If several pixels have the maximum, the first counts, row by row from the top
    left.

    Args:
        maps: Maps (..., h, w) in [0, 1].
        regions: Objects as masks (..., H, W), or as boxes (..., 4) as `box_masks` takes them.
        size: Height and width (H, W) of the picture, needed with boxes.
        tolerance: Distance from the object in pixels that still counts; 15 in the original.
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
    """Return the share (...) of the map's sum that lies in the box. Higher is better.

    Wang et al. 2020 (Score-CAM's energy-based pointing game). It is `mass_accuracy` with the mask
    of a box; arguments and errors are those of `box_masks` and `pointing_game`.
    """
    return mass_accuracy(maps, box_masks(boxes, size), mode=mode)


def mass_accuracy(maps: np.ndarray, masks: np.ndarray, *, mode: str = "bilinear") -> np.ndarray:
    """Return the share (...) of the map's sum that lies in the object's mask. Higher is better.

    Arras et al. 2022. Values that bicubic upsampling makes negative count as 0. A map of zeros has
    nothing in the object, so its share is 0. Errors are those of `pointing_game`.

    Args:
        maps: Maps (..., h, w) in [0, 1].
        masks: Objects (..., H, W) bool.
        mode: One of `MODES`.
    """
    maps = check_maps(maps)
    masks = region_masks(maps, masks)
    energy = upsample(maps, masks.shape[-2:], mode).clip(0)
    inside, total = ((energy * part).sum(axis=(-2, -1)) for part in (masks, 1.0))
    return divide(inside, total)
