"""ADCC, its terms and increase, as pure functions of arrays.

The letters are these: A is the map of class c on the picture x, E = x ⊙ up(A) the masked picture,
A' the method's map of c on E, p the probability of c on x and o that on E. Everything is batched
over leading dimensions and computed in float64; results are fractions, not percentages. Papers
differ in two points: at which size maps are compared, and how ADCC is averaged over a data set. A
`Protocol` names the choice. Maps are compared cell by cell, or if `size` (H, W) is given, after
they are upsampled to it in a `mode` of `MODES`.

Every function raises `InputError` if shapes do not fit, or if an array is empty, NaN or outside
[0, 1].
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
    """Return max(0, p - o) / p of each picture, in the shape of p. Lower is better.

    Chattopadhyay et al. 2018 (Grad-CAM++). It is 0 if p is 0, since nothing can drop then. A data
    set's average drop is the mean.
    """
    p, o = check_columns(p=p, o=o)
    return divide(np.maximum(0, p - o), p)


def average_increase(p: np.ndarray, o: np.ndarray) -> np.ndarray:
    """Return 1.0 for each picture with o > p and 0.0 for others. Higher is better.

    Chattopadhyay et al. 2018 (Grad-CAM++).
    """
    p, o = check_columns(p=p, o=o)
    return (o > p).astype(np.float64)


def pearson(
    maps: np.ndarray, masked_maps: np.ndarray, *, size: Size | None = None, mode: str = "bilinear"
) -> np.ndarray:
    """Return the correlation (...) of A and A', both (..., h, w), over their cells, in [-1, 1].

    If one of the two is constant, the correlation is 0/0 and counts as 0.
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
    maps: np.ndarray, masked_maps: np.ndarray, *, size: Size | None = None, mode: str = "bilinear"
) -> np.ndarray:
    """Return (1 + Pearson(A, A')) / 2, shape (...), in [0, 1]. Higher is better.

    Poppi et al. 2021. It is 0.5 if one of the two maps is constant.
    """
    return (1 + pearson(maps, masked_maps, size=size, mode=mode)) / 2


def complexity(maps: np.ndarray, *, size: Size | None = None, mode: str = "bilinear") -> np.ndarray:
    """Return the mean of |A|, (..., h, w), over cells (Poppi et al. 2021). Lower is better."""
    maps = check_maps(maps)
    cells = maps if size is None else upsample(maps, size, mode)
    return np.asarray(np.abs(cells).mean(axis=(-2, -1)))


def adcc(coherency: np.ndarray, complexity: np.ndarray, drop: np.ndarray) -> np.ndarray:
    """Return 3 / (1/coherency + 1/(1 - complexity) + 1/(1 - drop)). Higher is better.

    Poppi et al. 2021: the harmonic mean of three terms. It is 0 if a term is 0 (coherency 0,
    complexity 1 or drop 1), which is the limit. The arguments are values of pictures, or means of
    data sets.
    """
    coherency, complexity, drop = check_columns(
        coherency=coherency, complexity=complexity, drop=drop
    )
    terms = np.stack([coherency, 1 - complexity, 1 - drop]).clip(0, 1)
    with np.errstate(divide="ignore", over="ignore"):  # 1/0 is infinity, and 3/infinity is 0
        return np.asarray(3 / (1 / terms).sum(axis=0))


def masked_images(images: np.ndarray, maps: np.ndarray, mode: str = "bilinear") -> np.ndarray:
    """Return E = x ⊙ up(A), shape (..., 3, H, W).

    Images x, (..., 3, H, W), are normalised, so that 0 is the mean colour, which masked areas take
    on.
    """
    images, maps = check_pairs(images, maps)
    masks = upsample(maps, images.shape[-2:], mode)[..., None, :, :]
    return np.asarray(images * masks, images.dtype)
