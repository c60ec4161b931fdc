"""Insertion and deletion: how soon the target's probability comes, and goes, by the map's order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from vit_reciprocam.core.maps import upsample
from vit_reciprocam.errors import InputError, check_choice
from vit_reciprocam.evaluate.metrics.arrays import (
    DECIMALS,
    blur,
    check_pairs,
    check_pictures,
    check_range,
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
"""What is taken at a time: the map's own cells, or pixels of the upsampled map."""

BASELINES = ("blur", "mean", "black")
"""What stands where insertion has not come yet and deletion has been."""


def baseline_images(
    images: np.ndarray,
    kind: str = "blur",
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> np.ndarray:
    """What insertion starts from and deletion ends at, of normalised images (..., 3, H, W).

    Args:
        images: Normalised.
        kind: "blur", the picture under a Gaussian of 51x51 pixels and σ 20 with reflected borders,
            whatever the picture's size; "mean", the mean colour; "black".
        mean: The preprocessing's, for black.
        std: Likewise.

    Raises:
        InputError: If the kind does not exist, or it is black and mean or std are missing.
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
    """Pictures on the way from start to end, the highest cells of the map first.

    Insertion goes from the baseline to the images, deletion back. Yields the share of cells gone
    over, from 0 to 1, and a batch (..., 3, H, W). After i steps ⌊i · cells / steps⌋ cells are
    `end`; a step that would change nothing is left out. Equal cells go row by row from the top
    left.

    Args:
        start: Normalised images or their baseline (..., 3, H, W).
        end: The other of the two.
        maps: (..., h, w) in [0, 1].
        steps: How many.
        unit: "patch" goes by the map's own cells, "pixel" by those of the upsampled map.
        mode: One of `MODES`, for pixels.

    Raises:
        InputError: If shapes do not fit, maps are empty, NaN or outside [0, 1], or a choice does
            not exist.
    """
    check_choice("unit", unit, UNITS)
    start, maps = check_pairs(start, maps)
    if np.shape(end) != start.shape:
        raise InputError(
            f"images and baseline must have one shape; got {start.shape} and {np.shape(end)}"
        )
    if steps < 1:
        raise InputError(f"steps must be 1 or more; got {steps}")
    height, width = start.shape[-2:]
    cells = maps if unit == "patch" else upsample(maps, (height, width), mode).round(DECIMALS)
    count = cells.shape[-2] * cells.shape[-1]
    order = np.argsort(-cells.reshape(*cells.shape[:-2], count), axis=-1, kind="stable")
    ranks = np.argsort(order, axis=-1).reshape(cells.shape)
    rows, columns = (
        np.arange(pixels) * sides // pixels
        for pixels, sides in zip((height, width), cells.shape[-2:], strict=True)
    )
    turns = ranks[..., rows[:, None], columns][..., None, :, :]  # of each pixel
    gone = dict.fromkeys(step * count // steps for step in range(steps + 1))
    return ((done / count, np.where(turns < done, end, start)) for done in gone)


def insertion(
    predict: Callable[[np.ndarray], np.ndarray],
    images: np.ndarray,
    baseline: np.ndarray,
    maps: np.ndarray,
    targets: np.ndarray,
    *,
    steps: int = 14,
    unit: str = "patch",
    mode: str = "bilinear",
) -> np.ndarray:
    """Area under the target's probability while the picture appears, (B,). Higher is better.

    Petsiuk et al. 2018 (RISE), by the trapezoid rule over the share of cells shown.

    Args:
        predict: Images (B, 3, H, W) -> probabilities (B, C); called once a step.
        images: Normalised (B, 3, H, W).
        baseline: Likewise; see `baseline_images`.
        maps: (B, h, w) in [0, 1].
        targets: Class indices (B,).
        steps: As in `transition_images`.
        unit: Likewise.
        mode: Likewise.

    Raises:
        InputError: As `transition_images`; or if predict gives no probabilities of the targets.
    """
    targets, shares, curve = np.asarray(targets), [], []
    way = transition_images(baseline, images, maps, steps=steps, unit=unit, mode=mode)
    for share, batch in way:
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
    *,
    steps: int = 14,
    unit: str = "patch",
    mode: str = "bilinear",
) -> np.ndarray:
    """Area under it while the picture vanishes; lower is better. All else as in `insertion`.

    It is the insertion of the baseline into the picture.
    """
    return insertion(predict, baseline, images, maps, targets, steps=steps, unit=unit, mode=mode)


def area_under_curve(shares: np.ndarray, values: np.ndarray) -> np.ndarray:
    """By the trapezoid rule: abscissas (n,) and ordinates (..., n) -> (...).

    Raises:
        InputError: If there are fewer than two points, or lengths differ.
    """
    shares, values = np.asarray(shares, np.float64), np.asarray(values, np.float64)
    if shares.ndim != 1 or len(shares) < 2 or values.shape[-1:] != shares.shape:
        raise InputError(
            "a curve needs two points or more, (n,) shares and (..., n) values; "
            f"got {shares.shape} and {values.shape}"
        )
    heights = (values[..., 1:] + values[..., :-1]) / 2
    return np.asarray((heights * np.diff(shares)).sum(axis=-1))
