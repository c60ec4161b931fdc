"""Checks of arrays, and division and blur, that several metrics use."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from vit_reciprocam.errors import InputError

__all__ = [
    "DECIMALS",
    "blur",
    "check_columns",
    "check_maps",
    "check_pairs",
    "check_pictures",
    "check_range",
    "check_ranking",
    "divide",
]

DECIMALS = 9
"""Decimals to which upsampled cells are rounded before they are compared.

Cells that are equal by definition differ by rounding errors after upsampling; this restores ties.
"""

_BLUR_WIDTH, _BLUR_SIGMA = 51, 20.0
_ROUNDING = 1e-5  # how far outside [0, 1] a probability or map may lie


def check_maps(maps: np.ndarray, name: str = "maps") -> np.ndarray:
    """Return maps (..., h, w) as float64; refuse empty ones, NaN and what is outside [0, 1]."""
    maps = _check_grids(maps, name)
    check_range(name, maps)
    return maps


def check_ranking(ranking: np.ndarray, name: str = "maps") -> np.ndarray:
    """Return values (..., h, w) that put patches in order as float64; refuse NaN and infinity."""
    ranking = _check_grids(ranking, name)
    if bad := int((~np.isfinite(ranking)).sum()):
        raise InputError(f"{name} must be finite numbers; {bad} are NaN or infinite")
    return ranking


def _check_grids(maps: np.ndarray, name: str) -> np.ndarray:
    maps = np.asarray(maps, np.float64)
    if maps.ndim < 2 or maps.size == 0:
        raise InputError(f"{name} must be (..., h, w) and not empty; got {maps.shape}")
    return maps


def check_pictures(images: np.ndarray) -> np.ndarray:
    """Return normalised images (..., 3, H, W) as an array; refuse empty or integer ones."""
    images = np.asarray(images)
    if images.dtype.kind != "f" or images.ndim < 3 or images.size == 0:
        raise InputError(
            "images must be normalised, floating and (..., 3, H, W); "
            f"got {images.dtype} of {images.shape}"
        )
    return images


def check_pairs(
    images: np.ndarray, maps: np.ndarray, *, check: Callable[[np.ndarray], np.ndarray] = check_maps
) -> tuple[np.ndarray, np.ndarray]:
    """Check images (..., 3, H, W) and one map (..., h, w) for each, and return both."""
    images, maps = check_pictures(images), check(maps)
    if images.shape[:-3] != maps.shape[:-2]:
        raise InputError(
            "each picture (..., 3, H, W) needs one map (..., h, w); "
            f"got images {images.shape} and maps {maps.shape}"
        )
    return images, maps


def check_columns(**columns: np.ndarray) -> list[np.ndarray]:
    """Return arrays of fractions as float64; refuse NaN, empty ones, and different shapes."""
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
    """Refuse values that are NaN, or outside [0, 1] by more than rounding."""
    if np.isnan(values).any():
        raise InputError(f"{name} must be numbers in [0, 1]; {np.isnan(values).sum()} are NaN")
    low, high = values.min(), values.max()
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        raise InputError(
            f"{name} must be in [0, 1], not logits, percentages or raw relevance; "
            f"got {low:.4g} to {high:.4g}"
        )


def divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return above / below, and 0 where below is not positive."""
    quotient: np.ndarray = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    return quotient


def blur(images: np.ndarray) -> np.ndarray:
    """Return pictures (..., H, W) blurred by a Gaussian of 51x51 pixels and σ 20.

    Borders are reflected, as torchvision's GaussianBlur does it, and the Gaussian's width is the
    same whatever the picture's size.
    """
    rows, columns = (_gaussian(side).astype(images.dtype) for side in images.shape[-2:])
    return np.asarray(rows @ images @ columns.T)


@functools.lru_cache(maxsize=8)
def _gaussian(side: int) -> np.ndarray:
    """Return the Gaussian's weights (side, side), with reflected borders."""
    reach = _BLUR_WIDTH // 2
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / _BLUR_SIGMA) ** 2)
    sources = np.pad(np.arange(side), reach, mode="reflect")
    matrix = np.zeros((side, side))
    for shift, weight in enumerate(weights / weights.sum()):
        np.add.at(matrix, (np.arange(side), sources[shift : shift + side]), weight)
    matrix.flags.writeable = False  # since the cache returns this array to every caller
    return matrix
