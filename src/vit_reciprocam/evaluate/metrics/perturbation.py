"""Insertion and deletion: how soon the target's probability rises or falls in the map's order.

Maps may hold any finite values, so that signed ones put patches below zero in order too. Every
function raises `InputError` if shapes do not fit, maps are not finite, probabilities are NaN or
outside [0, 1], or a choice does not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from vit_reciprocam.core.maps import upsample
from vit_reciprocam.errors import InputError, check_choice
from vit_reciprocam.evaluate.metrics.arrays import (
    DECIMALS,
    blur,
    check_pairs,
    check_pictures,
    check_range,
    check_ranking,
)

__all__ = [
    "BASELINES",
    "UNITS",
    "area_under_curve",
    "baseline_images",
    "deletion",
    "insertion",
    "transition_images",
]

UNITS = ("patch", "pixel")
"""Names of the units that appear or vanish in turn: the map's cells, or the picture's pixels."""

BASELINES = ("blur", "mean", "black")
"""Names of the pictures that insertion starts from and deletion ends at."""


def baseline_images(
    images: np.ndarray,
    kind: str = "blur",
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> np.ndarray:
    """Return the pictures (..., 3, H, W) that insertion starts from and deletion ends at.

    The kinds are "blur", the normalised picture under the Gaussian of `arrays.blur`; "mean", the
    mean colour; and "black", which needs the preprocessing's mean and standard deviation.
    """
    check_choice("baseline", kind, BASELINES)
    images = check_pictures(images)
    if kind == "mean":
        return np.zeros_like(images)
    if kind == "black":
        if mean is None or std is None:
            raise InputError("a black baseline needs the preprocessing's mean and std: pass both")
        black = (-np.array(mean) / np.array(std))[:, None, None]
        return np.broadcast_to(black, images.shape).astype(images.dtype)
    return blur(images)


def transition_images(
    start: np.ndarray,
    end: np.ndarray,
    maps: np.ndarray,
    *,
    steps: int = 14,
    unit: str = "patch",
    mode: str = "bilinear",
) -> Iterator[tuple[float, np.ndarray]]:
    """Return the pictures on the way from start to end; the map's highest cells change first.

    Insertion goes from the baseline to the images, deletion back; both are (..., 3, H, W), with one
    map (..., h, w) of any finite values for each. After i steps ⌊i · cells / steps⌋ cells have
    changed; a step that would change none is left out. Equal cells change row by row from the top
    left. The unit "patch" changes the map's own cells, "pixel" those of the map upsampled in a
    `mode` of `MODES`.

    Returns:
        One pair per step: the share of cells that have changed, from 0 to 1, and the pictures.
    """
    check_choice("unit", unit, UNITS)
    start, maps = check_pairs(start, maps, check=check_ranking)
    if np.shape(end) != start.shape:
        raise InputError(
            f"images and baseline must have one shape; got {start.shape} and {np.shape(end)}"
        )
    if steps < 1:
        raise InputError(f"steps must be 1 or more; got {steps}")
    height, width = start.shape[-2:]
    cells = maps
    if unit == "pixel":  # rounded in units of the largest value, so that any scale has its ties
        largest = abs(maps).max(axis=(-2, -1), keepdims=True)
        cells = maps / np.where(largest > 0, largest, 1)
        cells = upsample(cells, (height, width), mode).round(DECIMALS)
    count = cells.shape[-2] * cells.shape[-1]
    order = np.argsort(-cells.reshape(*cells.shape[:-2], count), axis=-1, kind="stable")
    ranks = np.argsort(order, axis=-1).reshape(cells.shape)  # each cell's turn, from 0
    rows, columns = (  # the cell that a pixel lies in
        np.arange(pixels) * sides // pixels
        for pixels, sides in zip((height, width), cells.shape[-2:], strict=True)
    )
    turns = ranks[..., rows[:, None], columns][..., None, :, :]  # turn of each pixel
    counts = dict.fromkeys(step * count // steps for step in range(steps + 1))  # each once
    return ((done / count, np.where(turns < done, end, start)) for done in counts)


def insertion(
    predict: Callable[[np.ndarray], np.ndarray],
    images: np.ndarray,
    baseline: np.ndarray,
    maps: np.ndarray,
    targets: np.ndarray,
    **way: Any,
) -> np.ndarray:
    """Return the area (B,) under the target's probability while the picture appears.

    Petsiuk et al. 2018 (RISE), by the trapezoid rule over the share of cells shown. Higher is
    better.

    Args:
        predict: Function from images (B, 3, H, W) to probabilities (B, C), called once per step
            and once before the first.
        images: Normalised images (B, 3, H, W).
        baseline: Normalised images to start from, see `baseline_images`.
        maps: Maps (B, h, w); any finite values put patches in order, signed ones too.
        targets: Class indices (B,).
        way: Steps, unit and mode of `transition_images`.
    """
    targets, shares, curve = np.asarray(targets), [], []
    for share, batch in transition_images(baseline, images, maps, **way):
        probs = np.asarray(predict(batch))
        if targets.shape != batch.shape[:1] or probs.shape[:-1] != targets.shape:
            raise InputError(
                f"{len(batch)} images need one target and row of probabilities each; "
                f"got targets {targets.shape} and probabilities {probs.shape}"
            )
        if targets.min() < 0 or targets.max() >= probs.shape[1]:
            raise InputError(f"targets must be classes 0 to {probs.shape[1] - 1}; got {targets}")
        shares.append(share)
        curve.append(probs[np.arange(len(targets)), targets])
    values = np.stack(curve, axis=-1)
    check_range("probabilities", values)
    return area_under_curve(np.array(shares), values)


def deletion(
    predict: Callable[[np.ndarray], np.ndarray],
    images: np.ndarray,
    baseline: np.ndarray,
    maps: np.ndarray,
    targets: np.ndarray,
    **way: Any,
) -> np.ndarray:
    """Return the area (B,) under the target's probability while the picture vanishes.

    Petsiuk et al. 2018 (RISE). It is the insertion of the baseline into the picture, and has its
    arguments. Lower is better.
    """
    return insertion(predict, baseline, images, maps, targets, **way)


def area_under_curve(shares: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the area (...) under curves by the trapezoid rule: values (..., n) at shares (n,)."""
    shares, values = np.asarray(shares, np.float64), np.asarray(values, np.float64)
    if shares.ndim != 1 or len(shares) < 2 or values.shape[-1:] != shares.shape:
        raise InputError(
            "a curve needs two points or more, (n,) shares and (..., n) values; "
            f"got {shares.shape} and {values.shape}"
        )
    heights = (values[..., 1:] + values[..., :-1]) / 2
    return np.asarray((heights * np.diff(shares)).sum(axis=-1))
