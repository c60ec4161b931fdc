"""How well a saliency map finds the object: pure functions of maps and boxes or masks.

Everything is batched over leading dimensions and computed in float64 at the picture's size, to
which maps (..., h, w) are upsampled in a `mode` of `MODES`; results are fractions, not percentages.
Every function raises `InputError` if shapes do not fit, an object is empty or outside the picture,
or maps are empty, NaN or outside [0, 1].
"""

from __future__ import annotations

import numpy as np

from vit_reciprocam.core.maps import Size, upsample
from vit_reciprocam.errors import InputError
from vit_reciprocam.evaluate.metrics.arrays import DECIMALS, check_maps, divide

__all__ = ["box_masks", "energy_in_box", "mass_accuracy", "pointing_game"]


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
    left. Regions are objects as masks (..., H, W), or as boxes (..., 4) of `box_masks`, which need
    the picture's size (H, W). A maximum that is no more than `tolerance` pixels from the object
    counts too; the original has 15.
    """
    if not tolerance >= 0:
        raise InputError(f"tolerance must be 0 pixels or more; got {tolerance}")
    maps = check_maps(maps)
    masks = _region_masks(maps, regions, size=size)
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
    of a box, see `box_masks`.
    """
    return mass_accuracy(maps, box_masks(boxes, size), mode=mode)


def mass_accuracy(maps: np.ndarray, masks: np.ndarray, *, mode: str = "bilinear") -> np.ndarray:
    """Return the share (...) of the map's sum that lies in the object's mask. Higher is better.

    Arras et al. 2022. Masks are (..., H, W) bool. Values that bicubic upsampling makes negative
    count as 0. A map of zeros has nothing in the object, so its share is 0.
    """
    maps = check_maps(maps)
    masks = _region_masks(maps, masks)
    energy = upsample(maps, masks.shape[-2:], mode).clip(0)
    inside, total = ((energy * part).sum(axis=(-2, -1)) for part in (masks, 1.0))
    return divide(inside, total)


def box_masks(boxes: np.ndarray, size: Size) -> np.ndarray:
    """Return boxes (..., 4) as masks (..., H, W) bool of the pixels whose centre lies in them.

    A box has left, top, right and bottom in pixels of the picture that the model sees. Right and
    bottom are the first pixels outside, so that (0, 0, W, H) is the whole picture.
    """
    boxes = np.asarray(boxes, np.float64)
    if boxes.shape[-1:] != (4,) or boxes.size == 0:
        raise InputError(f"boxes must be (..., 4): left, top, right, bottom; got {boxes.shape}")
    left, top, right, bottom = (boxes[..., side, None] for side in range(4))
    inside = (left >= 0) & (top >= 0) & (right <= size[1]) & (bottom <= size[0])
    if not inside.all():
        outside = boxes[~inside[..., 0]][0].tolist()
        raise InputError(
            f"box {outside} reaches out of the picture of {size[1]}x{size[0]} pixels: clip it, or "
            "move it with the picture's crop"
        )
    x, y = np.arange(size[1]) + 0.5, np.arange(size[0]) + 0.5
    across, down = (left <= x) & (x < right), (top <= y) & (y < bottom)
    masks = down[..., :, None] & across[..., None, :]
    if not masks.any(axis=(-2, -1)).all():
        empty = boxes[~masks.any(axis=(-2, -1))][0].tolist()
        raise InputError(f"box {empty} holds no pixel: it must be (left, top, right, bottom)")
    return np.asarray(masks)


def _region_masks(maps: np.ndarray, regions: np.ndarray, *, size: Size | None = None) -> np.ndarray:
    """Return the objects' masks (..., H, W) bool, one per map, from masks or boxes."""
    regions = np.asarray(regions)
    if regions.ndim == maps.ndim - 1:
        if size is None:
            raise InputError("boxes need the picture's size: pass size=(H, W)")
        regions = box_masks(regions, size)
    if regions.shape[:-2] != maps.shape[:-2] or regions.ndim != maps.ndim:
        raise InputError(
            "each map (..., h, w) needs one mask (..., H, W) or box (..., 4); "
            f"got maps {maps.shape} and {regions.shape}"
        )
    if regions.dtype.kind not in "bui":
        raise InputError(f"masks must be bool, or integers and not 0 inside; got {regions.dtype}")
    masks = regions.astype(bool)
    if not masks.any(axis=(-2, -1)).all():
        raise InputError("a mask is empty: leave pictures without the object out")
    return masks
