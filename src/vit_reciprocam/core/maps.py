"""Maps and pictures as arrays: checked, scaled, resized, blurred; boxes as masks."""

from __future__ import annotations

import functools

import numpy as np

from vit_reciprocam.errors import InputError, check_choice

__all__ = [
    "DECIMALS",
    "FLAT",
    "MODES",
    "Size",
    "blur",
    "box_masks",
    "check_columns",
    "check_maps",
    "check_pairs",
    "check_pictures",
    "check_range",
    "min_max",
    "region_masks",
    "upsample",
]

MODES = ("bilinear", "bicubic")
"""How maps are brought to a picture's size."""

Size = tuple[int, int]

DECIMALS = 9
"""Upsampled cells are compared by these, so that rounding errors do not break ties."""

_BLUR_WIDTH, _BLUR_SIGMA = 51, 20.0
_ROUNDING = 1e-5  # how far outside [0, 1] a probability or map may lie


FLAT = float(4 * np.finfo(np.float32).eps)
"""A map is constant if its scores differ by no more than this share of the largest."""


def min_max(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maps from scores: each (h, w) scaled to [0, 1], and which of them are degenerate.

    A constant score says nothing about where, so its map is zeros and it is marked; "constant"
    allows for the rounding of float32.

    Args:
        scores: (..., h, w).

    Returns:
        Maps (..., h, w) float32, and bool (...).
    """
    low = scores.min(axis=(-2, -1), keepdims=True)
    high = scores.max(axis=(-2, -1), keepdims=True)
    flat = high - low <= FLAT * np.maximum(abs(low), abs(high))
    maps = (scores - low).astype(np.float32, copy=False)
    maps /= np.where(flat, np.inf, high - low)
    return maps, flat[..., 0, 0]


def upsample(maps: np.ndarray, size: Size, mode: str = "bilinear") -> np.ndarray:
    """Maps (..., h, w) at (..., H, W), as torch.nn.functional.interpolate computes it.

    With align_corners=False, without antialiasing, not clamped: bicubic (a = -0.75) overshoots.
    Two small matrices do it, one for rows and one for columns. A floating dtype is kept.

    Raises:
        InputError: If the mode does not exist, or a side is empty.
    """
    check_choice("mode", mode, MODES)
    maps = np.asarray(maps)
    if maps.ndim < 2 or 0 in maps.shape or min(size) < 1:
        raise InputError(
            f"maps (..., h, w) and size (H, W) must not be empty; got {maps.shape} and {size}"
        )
    dtype = maps.dtype if maps.dtype.kind == "f" else np.dtype(np.float64)
    rows, columns = (
        _interpolation(there, here, mode) for there, here in zip(size, maps.shape[-2:], strict=True)
    )
    return np.asarray(rows @ maps @ columns.T, dtype)


def blur(images: np.ndarray) -> np.ndarray:
    """Pictures (..., H, W) under a Gaussian of 51x51 pixels and σ 20, borders reflected.

    As torchvision's GaussianBlur; the width is the same whatever the picture's size.
    """
    rows, columns = (_blurring(side).astype(images.dtype) for side in images.shape[-2:])
    return np.asarray(rows @ images @ columns.T)


def box_masks(boxes: np.ndarray, size: Size) -> np.ndarray:
    """Boxes (..., 4) as masks (..., H, W) bool of the pixels whose centre they hold.

    Args:
        boxes: left, top, right, bottom in pixels of the picture that the model sees; right and
            bottom are the first pixel outside, so that (0, 0, W, H) is the whole picture.
        size: (H, W).

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
    """The objects' masks (..., H, W) bool, one a map.

    Args:
        maps: (..., h, w).
        regions: Masks (..., H, W), or boxes (..., 4) as in `box_masks`.
        size: (H, W), needed with boxes.

    Raises:
        InputError: If there is not one region a map, or it holds no pixel of the picture.
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


def check_maps(maps: np.ndarray, name: str = "maps") -> np.ndarray:
    """Maps (..., h, w) as float64.

    Raises:
        InputError: If they are empty, NaN or outside [0, 1].
    """
    maps = np.asarray(maps, np.float64)
    if maps.ndim < 2 or maps.size == 0:
        raise InputError(f"{name} must be (..., h, w) and not empty; got {maps.shape}")
    check_range(name, maps)
    return maps


def check_pictures(images: np.ndarray) -> np.ndarray:
    """Normalised images (..., 3, H, W) as an array.

    Raises:
        InputError: If they are empty or not floating.
    """
    images = np.asarray(images)
    if images.dtype.kind != "f" or images.ndim < 3 or images.size == 0:
        raise InputError(
            "images must be normalised, floating and (..., 3, H, W); "
            f"got {images.dtype} of {images.shape}"
        )
    return images


def check_pairs(images: np.ndarray, maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images (..., 3, H, W) and a map (..., h, w) for each.

    Raises:
        InputError: As `check_pictures` and `check_maps`, or if leading dimensions differ.
    """
    images, maps = check_pictures(images), check_maps(maps)
    if images.shape[:-3] != maps.shape[:-2]:
        raise InputError(
            "each picture (..., 3, H, W) needs one map (..., h, w); "
            f"got images {images.shape} and maps {maps.shape}"
        )
    return images, maps


def check_columns(**columns: np.ndarray) -> list[np.ndarray]:
    """Arrays of one shape, of fractions, as float64.

    Raises:
        InputError: If shapes differ, one is empty, or a value is NaN or outside [0, 1].
    """
    arrays = [np.asarray(column, np.float64) for column in columns.values()]
    shapes = [array.shape for array in arrays]
    if len(set(shapes)) > 1 or arrays[0].size == 0:
        raise InputError(
            f"{', '.join(columns)} must have one shape and not be empty; "
            f"got {', '.join(map(str, shapes))}"
        )
    for name, array in zip(columns, arrays, strict=True):
        check_range(name, array)
    return arrays


def check_range(name: str, values: np.ndarray) -> None:
    """Refuse what is NaN or outside [0, 1], but for rounding.

    Raises:
        InputError: If a value is.
    """
    if np.isnan(values).any():
        raise InputError(f"{name} must be numbers in [0, 1]; {np.isnan(values).sum()} are NaN")
    low, high = values.min(), values.max()
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        raise InputError(
            f"{name} must be in [0, 1], not logits, percentages or raw relevance; "
            f"got {low:.4g} to {high:.4g}"
        )


@functools.lru_cache(maxsize=32)
def _interpolation(there: int, here: int, mode: str) -> np.ndarray:
    """The weights (there, here) that bring `here` cells to `there` pixels."""
    place = (np.arange(there) + 0.5) * here / there - 0.5
    if mode == "bilinear":
        place = place.clip(0)
    first = np.floor(place).astype(int)
    matrix = np.zeros((there, here))
    for tap in (-1, 0, 1, 2):
        cells = (first + tap).clip(0, here - 1)
        np.add.at(matrix, (np.arange(there), cells), _KERNELS[mode](np.abs(place - first - tap)))
    matrix.flags.writeable = False
    return matrix


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Keys 1981: the weight of a cell at that distance."""
    near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))


def _linear(distance: np.ndarray) -> np.ndarray:
    return np.asarray(np.maximum(0, 1 - distance))


_KERNELS = {"bilinear": _linear, "bicubic": _cubic}


@functools.lru_cache(maxsize=8)
def _blurring(side: int) -> np.ndarray:
    """The Gaussian's weights (side, side), with reflected borders."""
    reach = _BLUR_WIDTH // 2
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / _BLUR_SIGMA) ** 2)
    sources = np.pad(np.arange(side), reach, mode="reflect")
    matrix = np.zeros((side, side))
    for shift, weight in enumerate(weights / weights.sum()):
        np.add.at(matrix, (np.arange(side), sources[shift : shift + side]), weight)
    matrix.flags.writeable = False
    return matrix
