"""The row of figures that says what one call costs, and the statistics behind it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

__all__ = ["Row", "Spread", "ratio", "spread"]


class Spread(NamedTuple):
    """A median, and the quartiles, between which the middle half of the values lies."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """The cost of one call. Figures that were not measured are None, and `note` says why.

    Attributes:
        model: Spec of the model, as `load` takes it.
        method: "forward", the prediction alone; "reciprocam", the map of each image's top class;
            "reciprocam, all scores", the scores of all classes; "reciprocam, all maps", these
            scaled to [0, 1] too; "naive H", the map of each image's top class with H, the rest of
            the network, run once per mask; or a method of `METHODS`.
        path: "closed-form" or "direct" if the call ran ReciproCAM, else "".
        batch: Number of images in one call.
        size: (height, width) of the images in pixels.
        device: Name of the processor.
        threads: Number of CPU threads.
        rounds: Number of rounds in which the call was timed.
        ms: Milliseconds per call.
        fps: Images per second, from the median.
        to_forward: Time ÷ that of "forward" in the same round.
        to_reciprocam: Time ÷ that of "reciprocam" in the same round.
        peak_bytes: Peak memory of a fresh process that made this one call; on a GPU, the most that
            PyTorch held there.
        added_bytes: Part of the peak that the call added to the loaded model.
        note: Reason why something was not measured, or "".
        backend: "torch", or the runtime of an ONNX file, "onnxruntime" or "openvino".
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


def spread(values: Iterable[float]) -> Spread:
    """Return the median of values and their quartiles."""
    low, median, high = np.percentile(list(values), [25, 50, 75])
    return Spread(float(median), float(low), float(high))


def ratio(seconds: Mapping[int, float], reference: Mapping[int, float]) -> Spread | None:
    """Return the spread of seconds ÷ reference over rounds; None if they share no round.

    Both have the number of a round -> the seconds that a call took in it.
    """
    shared = seconds.keys() & reference.keys()
    return spread(seconds[number] / reference[number] for number in shared) if shared else None
