"""Saliency maps as arrays: scaled to [0, 1], and brought to a picture's size."""

from __future__ import annotations

import functools

import numpy as np

from vit_reciprocam.errors import InputError, check_choice

__all__ = ["FLAT", "MODES", "Size", "cubic_weights", "min_max", "positive_part", "upsample"]

MODES = ("bilinear", "bicubic")
"""Names of the ways to bring maps to a picture's size."""

Size = tuple[int, int]

FLAT = float(4 * np.finfo(np.float32).eps)
"""Share of the largest score by which a constant map's scores may differ: float32's rounding."""


def min_max(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale each (h, w) of the scores to [0, 1], and return these maps and which are degenerate.

    Constant scores do not say where to look, so their map is zeros and is marked as degenerate.
    Scores count as constant if they differ by no more than the rounding of float32. Scores
    (..., h, w) give maps (..., h, w) float32, and bool (...), True for each degenerate map.
    """
    low = scores.min(axis=(-2, -1), keepdims=True)
    high = scores.max(axis=(-2, -1), keepdims=True)
    flat = high - low <= FLAT * np.maximum(abs(low), abs(high))
    maps = (scores - low).astype(np.float32, copy=False)
    maps /= np.where(flat, np.inf, high - low)
    return maps, flat[..., 0, 0]


def positive_part(evidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the positive part of each (h, w) over its largest value, and which have none.

    Evidence (..., h, w) gives maps (..., h, w) float32 in [0, 1], and bool (...), True for each map
    of zeros.
    """
    maps = evidence.clip(0).astype(np.float32, copy=False)
    most = maps.max(axis=(-2, -1), keepdims=True)
    return maps / np.where(most > 0, most, np.inf), most[..., 0, 0] == 0


def upsample(maps: np.ndarray, size: Size, mode: str = "bilinear") -> np.ndarray:
    """Return maps (..., h, w) at size (H, W), as torch.nn.functional.interpolate computes them.

    It is that function with align_corners=False and without antialiasing. Values are not clamped:
    bicubic (a = -0.75) overshoots. The interpolation is separable, so two small matrices do it, one
    for the rows and one for the columns. A floating dtype is kept. A mode that is not one of
    `MODES`, or an empty side, raises `InputError`.
    """
    check_choice("mode", mode, MODES)
    maps = np.asarray(maps)
    if maps.ndim < 2 or 0 in maps.shape or min(size) < 1:
        raise InputError(
            f"maps (..., h, w) and size (H, W) must not be empty; got {maps.shape} and {size}"
        )
    dtype = maps.dtype if maps.dtype.kind == "f" else np.dtype(np.float64)
    rows, columns = (
        _interpolation(pixels, cells, mode)
        for pixels, cells in zip(size, maps.shape[-2:], strict=True)
    )
    return np.asarray(rows @ maps @ columns.T, dtype)


def cubic_weights(distance: np.ndarray) -> np.ndarray:
    """Return the weights of bicubic interpolation for distances of 0 or more, counted in cells.

    Keys 1981, "Cubic convolution interpolation for digital image processing", with a = -0.75 as
    PyTorch has it.
    """
    a = -0.75
    near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))


def _linear_weights(distance: np.ndarray) -> np.ndarray:
    return np.asarray(np.maximum(0, 1 - distance))


_WEIGHTS = {"bilinear": _linear_weights, "bicubic": cubic_weights}


@functools.lru_cache(maxsize=32)
def _interpolation(pixels: int, cells: int, mode: str) -> np.ndarray:
    """Return the weights (pixels, cells) that turn a row of cells into a row of pixels."""
    place = (np.arange(pixels) + 0.5) * cells / pixels - 0.5  # each pixel's centre, in cells
    if mode == "bilinear":
        place = place.clip(0)
    first = np.floor(place).astype(int)
    matrix = np.zeros((pixels, cells))
    for tap in (-1, 0, 1, 2):
        cell = (first + tap).clip(0, cells - 1)  # beyond the border the border's cell counts again
        np.add.at(matrix, (np.arange(pixels), cell), _WEIGHTS[mode](np.abs(place - first - tap)))
    matrix.flags.writeable = False  # the cache hands out this very array
    return matrix
