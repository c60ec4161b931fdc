"""ADCC and its terms: drop, increase, coherency and complexity, as pure functions of arrays.

p is the probability of the target class on the picture, o the one on the masked picture
E = x ⊙ up(A), A the map and A' the method's map of the same class on E. Everything is batched over
leading dimensions, computed in float64 and a fraction, not a percentage. Two definitions differ
between papers: where maps are compared (`size`) and how ADCC is averaged over a data set; a
`Protocol` names the choice.
"""

from __future__ import annotations

import numpy as np

from vit_reciprocam.core.maps import Size, upsample
from vit_reciprocam.errors import InputError
from vit_reciprocam.evaluate.metrics.arrays import check_columns, check_maps, check_pairs, divide

__all__ = [
    "adcc",
    "average_drop",
    "average_increase",
    "coherency",
    "complexity",
    "masked_images",
    "pearson",
]

_FLAT = 1e-12  # a map in [0, 1] with a smaller range is constant


def average_drop(p: np.ndarray, o: np.ndarray) -> np.ndarray:
    """max(0, p - o) / p of each image, the same shape; 0 where p is 0, as nothing can drop.

    Chattopadhyay et al. 2018 (Grad-CAM++). A data set's average drop is the mean. Lower is better.

    Raises:
        InputError: If shapes differ, an array is empty, or a value is not in [0, 1].
    """
    p, o = check_columns(p=p, o=o)
    return divide(np.maximum(0, p - o), p)


def average_increase(p: np.ndarray, o: np.ndarray) -> np.ndarray:
    """[o > p] of each image as 0.0 or 1.0, the same shape.

    Chattopadhyay et al. 2018 (Grad-CAM++). Higher is better.

    Raises:
        InputError: If shapes differ, an array is empty, or a value is not in [0, 1].
    """
    p, o = check_columns(p=p, o=o)
    return (o > p).astype(np.float64)


def pearson(
    maps: np.ndarray,
    masked_maps: np.ndarray,
    *,
    size: Size | None = None,
    mode: str = "bilinear",
) -> np.ndarray:
    """Correlation of A and A' over their cells, two of (..., h, w) -> (...), in [-1, 1].

    Where one of the two is constant the correlation is 0/0 and counts as 0.

    Args:
        maps: A, in [0, 1].
        masked_maps: A', in [0, 1], the same shape.
        size: (H, W) to compare at, both upsampled; None compares the cells as they are.
        mode: One of `MODES`, for `size`.

    Raises:
        InputError: If shapes differ, or maps are empty, NaN or outside [0, 1].
    """
    a, b = check_maps(maps), check_maps(masked_maps, "masked_maps")
    if a.shape != b.shape:
        raise InputError(
            f"maps and masked_maps must have one shape (..., h, w); got {a.shape} and {b.shape}"
        )
    if size is not None:
        a, b = upsample(a, size, mode), upsample(b, size, mode)
    flat = (np.ptp(a, axis=(-2, -1)) <= _FLAT) | (np.ptp(b, axis=(-2, -1)) <= _FLAT)
    a, b = (x - x.mean(axis=(-2, -1), keepdims=True) for x in (a, b))
    norms = np.sqrt((a * a).sum(axis=(-2, -1)) * (b * b).sum(axis=(-2, -1)))
    products = (a * b).sum(axis=(-2, -1))
    return divide(products, np.where(flat, 0, norms)).clip(-1, 1)


def coherency(
    maps: np.ndarray,
    masked_maps: np.ndarray,
    *,
    size: Size | None = None,
    mode: str = "bilinear",
) -> np.ndarray:
    """(1 + Pearson(A, A')) / 2, two of (..., h, w) -> (...); 0.5 where one of the two is constant.

    Poppi et al. 2021. Higher is better. Arguments and errors are those of `pearson`.
    """
    return (1 + pearson(maps, masked_maps, size=size, mode=mode)) / 2


def complexity(maps: np.ndarray, *, size: Size | None = None, mode: str = "bilinear") -> np.ndarray:
    """Mean |A| over cells, (..., h, w) -> (...).

    Poppi et al. 2021. Lower is better. Of maps upsampled to `size` if one is given.

    Raises:
        InputError: If maps are empty, NaN or outside [0, 1].
    """
    maps = check_maps(maps)
    cells = maps if size is None else upsample(maps, size, mode)
    return np.asarray(np.abs(cells).mean(axis=(-2, -1)))


def adcc(coherency: np.ndarray, complexity: np.ndarray, drop: np.ndarray) -> np.ndarray:
    """3 / (1/coherency + 1/(1 - complexity) + 1/(1 - drop)), the harmonic mean of the three terms.

    Poppi et al. 2021. Higher is better. 0 where a term is 0 (coherency 0, complexity 1 or drop 1),
    which is the limit. Arrays of one shape: of images, or of the data set's means.

    Raises:
        InputError: If shapes differ, an array is empty, or a value is not in [0, 1].
    """
    coherency, complexity, drop = check_columns(
        coherency=coherency, complexity=complexity, drop=drop
    )
    terms = np.stack([coherency, 1 - complexity, 1 - drop]).clip(0, 1)
    with np.errstate(divide="ignore", over="ignore"):  # 1/0 is infinity, and 3/infinity is 0
        return np.asarray(3 / (1 / terms).sum(axis=0))


def masked_images(images: np.ndarray, maps: np.ndarray, mode: str = "bilinear") -> np.ndarray:
    """E = x ⊙ up(A): normalised images (..., 3, H, W) and maps (..., h, w) -> (..., 3, H, W).

    As 0 is the mean colour, masked areas become it.

    Raises:
        InputError: If the images are not floating, leading dimensions differ, or maps are empty,
            NaN or outside [0, 1].
    """
    images, maps = check_pairs(images, maps)
    masks = upsample(maps, images.shape[-2:], mode)[..., None, :, :]
    return np.asarray(images * masks, images.dtype)
