"""What one call costs, and the statistics behind it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

__all__ = ["Row", "Spread", "ratio", "spread"]


class Spread(NamedTuple):
    """A median, and what the middle half of the values lies between."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """What one call costs. Figures are None where there are none; `note` says why.

    Attributes:
        model: As `load` takes it.
        method: "forward", the prediction alone; "reciprocam", each image's top class; "reciprocam,
            all scores", of all classes; "reciprocam, all maps", these also scaled to [0, 1];
            "naive H", each image's top class with H run once a mask; or a method of `METHODS`.
        path: Of ReciproCAM, "closed-form" or "direct".
        batch: Images in one call.
        size: Their (height, width) in pixels.
        device: The processor's name.
        threads: Of the CPU.
        rounds: In how many the call was timed.
        ms: Milliseconds of one call.
        fps: Images a second, by the median.
        to_forward: Time ÷ that of "forward" in the same round.
        to_reciprocam: Time ÷ that of "reciprocam" in the same round.
        peak_bytes: The most memory of a fresh process that makes this one call; on a GPU, what
            PyTorch held there.
        added_bytes: How much more that is than with the model loaded, before the call.
        note: Why something was not measured.
        backend: "torch", or of an ONNX file "onnxruntime" or "openvino".
    """

    model: str
    method: str
    path: str
    batch: int
    size: tuple[int, int]
    device: str
    threads: int
    rounds: int = 0
    ms: Spread | None = None
    fps: float | None = None
    to_forward: Spread | None = None
    to_reciprocam: Spread | None = None
    peak_bytes: int | None = None
    added_bytes: int | None = None
    note: str = ""
    backend: str = "torch"


def ratio(seconds: dict[int, float], of: dict[int, float]) -> Spread | None:
    """Round by round, in the rounds that have both."""
    values = [seconds[number] / of[number] for number in seconds if number in of]
    return spread(values) if values else None


def spread(values: Iterable[float]) -> Spread:
    """Return the median of values and their quartiles."""
    low, median, high = np.percentile(list(values), [25, 50, 75])
    return Spread(float(median), float(low), float(high))
