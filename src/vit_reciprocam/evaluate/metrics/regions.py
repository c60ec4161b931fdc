"""Boxes and masks of objects as masks of the picture's pixels."""

from __future__ import annotations

import numpy as np

from vit_reciprocam.core.maps import Size
from vit_reciprocam.errors import InputError

__all__ = ["box_masks", "region_masks"]


def box_masks(boxes: np.ndarray, size: Size) -> np.ndarray:
    """Return boxes (..., 4) as masks (..., H, W) bool of the pixels whose centre lies in them.

    Args:
        boxes: Left, top, right and bottom in pixels of the picture that the model sees; right and
            bottom are the first pixels outside, so that (0, 0, W, H) is the whole picture.
        size: Height and width (H, W) of the picture.

    Raises:
        InputError: If a box reaches out of the picture or holds no pixel.
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


def region_masks(maps: np.ndarray, regions: np.ndarray, *, size: Size | None = None) -> np.ndarray:
    """Return the objects' masks (..., H, W) bool, one per map (..., h, w).

    Regions are masks (..., H, W), or boxes as `box_masks` takes them, with the picture's size.

    Raises:
        InputError: If there is not one region per map, or one holds no pixel of the picture.
    """
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
