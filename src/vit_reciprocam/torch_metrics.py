"""The metrics as torchmetrics classes: the mean over all pictures seen, by any number of processes.

Thin: the figures are those of `metrics` and `perturbation`, computed on the CPU. Values are
fractions, not percentages. `update` takes tensors or arrays, on any device. Parameters have the
same names everywhere, so that a `MetricCollection` can be updated by keyword.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vit_reciprocam import metrics, perturbation
from vit_reciprocam.errors import MissingDependencyError, check_choice
from vit_reciprocam.maps import Size
from vit_reciprocam.protocols import AGGREGATES

try:
    from torchmetrics import Metric
except ModuleNotFoundError as error:
    raise MissingDependencyError("vit_reciprocam.torch_metrics", "evaluate") from error

__all__ = [
    "ADCC",
    "AverageDrop",
    "AverageIncrease",
    "Coherency",
    "Complexity",
    "DeletionAUC",
    "EnergyInBox",
    "InsertionAUC",
    "MassAccuracy",
    "PointingGame",
]

Values = Tensor | np.ndarray
Model = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) -> logits (B, C)."""


class _MeanOverPictures(Metric):
    """Sum and count as states, which reduce over processes by their sum; NaN before any update."""

    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, *settings: object, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _tell_apart(self, *settings)
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def _add(self, values: np.ndarray) -> None:
        self.total += float(values.sum())
        self.count += values.size

    def compute(self) -> Tensor:
        """The mean over all pictures; torchmetrics warns if there were none, and it is NaN."""
        return self.total / self.count


class AverageDrop(_MeanOverPictures):
    """`metrics.average_drop`, lower is better."""

    higher_is_better = False

    def update(self, p: Values, o: Values) -> None:
        """Probabilities of the target on the pictures and on the masked ones, (B,)."""
        self._add(metrics.average_drop(_array(p), _array(o)))


class AverageIncrease(_MeanOverPictures):
    """`metrics.average_increase`, higher is better."""

    higher_is_better = True

    def update(self, p: Values, o: Values) -> None:
        """Probabilities of the target on the pictures and on the masked ones, (B,)."""
        self._add(metrics.average_increase(_array(p), _array(o)))


class _OfMaps(_MeanOverPictures):
    """What is measured on maps alone: at which size."""

    def __init__(self, *, size: Size | None = None, mode: str = "bilinear", **kwargs: Any) -> None:
        """Where to measure: at `size` (H, W), or with None on the maps' own cells.

        Args:
            size: (H, W) or None.
            mode: "bilinear" or "bicubic", how maps are brought to `size`.
            kwargs: Of `torchmetrics.Metric`.
        """
        super().__init__(size, mode, **kwargs)
        self.size, self.mode = size, mode


class Coherency(_OfMaps):
    """`metrics.coherency`, higher is better."""

    higher_is_better = True

    def update(self, maps: Values, masked_maps: Values) -> None:
        """Maps A and A', (B, h, w) in [0, 1]."""
        a, b = _array(maps), _array(masked_maps)
        self._add(metrics.coherency(a, b, size=self.size, mode=self.mode))


class Complexity(_OfMaps):
    """`metrics.complexity`, lower is better."""

    higher_is_better = False

    def update(self, maps: Values) -> None:
        """Maps (B, h, w) in [0, 1]."""
        self._add(metrics.complexity(_array(maps), size=self.size, mode=self.mode))


class ADCC(Metric):
    """`metrics.adcc` of a data set, higher is better."""

    is_differentiable = False
    full_state_update = False
    higher_is_better = True
    coherency: Tensor
    complexity: Tensor
    drop: Tensor
    adcc: Tensor
    count: Tensor

    def __init__(
        self,
        aggregate: str = "means",
        *,
        size: Size | None = None,
        mode: str = "bilinear",
        **kwargs: Any,
    ) -> None:
        """How ADCC is averaged, and where maps are compared.

        Args:
            aggregate: "means" is the harmonic mean of the data set's means (protocol `byun2023`),
                "mean" the mean over pictures (`poppi2021`).
            size: (H, W) to compare at; None compares the maps' own cells.
            mode: "bilinear" or "bicubic", how maps are brought to `size`.
            kwargs: Of `torchmetrics.Metric`.

        Raises:
            InputError: If the aggregate does not exist.
        """
        check_choice("aggregate", aggregate, AGGREGATES)
        super().__init__(**kwargs)
        self.aggregate, self.size, self.mode = aggregate, size, mode
        _tell_apart(self, size, mode)
        for name in ("coherency", "complexity", "drop", "adcc"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, p: Values, o: Values, maps: Values, masked_maps: Values) -> None:
        """Probabilities (B,) on the pictures and the masked ones, maps A and A' (B, h, w)."""
        a, b = _array(maps), _array(masked_maps)
        coherency = metrics.coherency(a, b, size=self.size, mode=self.mode)
        complexity = metrics.complexity(a, size=self.size, mode=self.mode)
        drop = metrics.average_drop(_array(p), _array(o))
        adcc = metrics.adcc(coherency, complexity, drop)
        self.coherency += float(coherency.sum())
        self.complexity += float(complexity.sum())
        self.drop += float(drop.sum())
        self.adcc += float(adcc.sum())
        self.count += adcc.size

    def compute(self) -> Tensor:
        """ADCC of all pictures; torchmetrics warns if there were none, and it is NaN."""
        if self.aggregate == "mean" or self.count == 0:
            return self.adcc / self.count
        sums = (self.coherency, self.complexity, self.drop)
        return torch.as_tensor(metrics.adcc(*(_array(x / self.count) for x in sums))).to(
            self.device
        )


class _Perturbation(_MeanOverPictures):
    """What insertion and deletion share: all but which of the two `_area` is."""

    _area: Callable[..., np.ndarray]

    def __init__(
        self,
        *,
        steps: int = 14,
        unit: str = "patch",
        baseline: str = "blur",
        mode: str = "bilinear",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """How pictures appear or vanish.

        Args:
            steps: How many.
            unit: "patch" or "pixel".
            baseline: "blur", "mean" or "black".
            mode: "bilinear" or "bicubic", how maps are upsampled for pixels.
            mean: The preprocessing's, for black.
            std: Likewise.
            kwargs: Of `torchmetrics.Metric`.
        """
        super().__init__(steps, unit, baseline, mode, mean, std, **kwargs)
        self.steps, self.unit, self.mode = steps, unit, mode
        self.baseline, self.mean, self.std = baseline, mean, std

    def update(self, model: Model, images: Tensor, maps: Values, targets: Values) -> None:
        """A model that gives logits, normalised images (B, 3, H, W), maps and targets (B,).

        The model is called without gradient, in the mode that it is in: put it in eval mode.
        """

        def predict(batch: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                logits = model(torch.from_numpy(batch).to(images))
            return logits.cpu().double().softmax(dim=-1).numpy()

        x = _array(images)
        baseline = perturbation.baseline_images(x, self.baseline, mean=self.mean, std=self.std)
        given = (predict, x, baseline, _array(maps), _array(targets))
        self._add(self._area(*given, steps=self.steps, unit=self.unit, mode=self.mode))


class InsertionAUC(_Perturbation):
    """`perturbation.insertion`, higher is better."""

    higher_is_better = True
    _area = staticmethod(perturbation.insertion)


class DeletionAUC(_Perturbation):
    """`perturbation.deletion`, lower is better."""

    higher_is_better = False
    _area = staticmethod(perturbation.deletion)


class PointingGame(_MeanOverPictures):
    """`metrics.pointing_game`, higher is better."""

    higher_is_better = True

    def __init__(
        self,
        *,
        size: Size | None = None,
        tolerance: float = 0,
        mode: str = "bilinear",
        **kwargs: Any,
    ) -> None:
        """Where the maximum counts.

        Args:
            size: (H, W) of the pictures, needed with boxes.
            tolerance: How many pixels from the object still count.
            mode: "bilinear" or "bicubic", how maps are brought to the pictures' size.
            kwargs: Of `torchmetrics.Metric`.
        """
        super().__init__(size, tolerance, mode, **kwargs)
        self.size, self.tolerance, self.mode = size, tolerance, mode

    def update(self, maps: Values, regions: Values) -> None:
        """Maps (B, h, w), and the objects' masks (B, H, W) or boxes (B, 4)."""
        a, b = _array(maps), _array(regions)
        hits = metrics.pointing_game(a, b, size=self.size, tolerance=self.tolerance, mode=self.mode)
        self._add(hits)


class EnergyInBox(_MeanOverPictures):
    """`metrics.energy_in_box`, higher is better."""

    higher_is_better = True

    def __init__(self, *, size: Size, mode: str = "bilinear", **kwargs: Any) -> None:
        """Of which pictures.

        Args:
            size: (H, W) of the pictures.
            mode: "bilinear" or "bicubic", how maps are brought to the pictures' size.
            kwargs: Of `torchmetrics.Metric`.
        """
        super().__init__(size, mode, **kwargs)
        self.size, self.mode = size, mode

    def update(self, maps: Values, boxes: Values) -> None:
        """Maps (B, h, w) and the objects' boxes (B, 4), as in `maps.box_masks`."""
        a, b = _array(maps), _array(boxes)
        self._add(metrics.energy_in_box(a, b, size=self.size, mode=self.mode))


class MassAccuracy(_MeanOverPictures):
    """`metrics.mass_accuracy`, higher is better."""

    higher_is_better = True

    def __init__(self, *, mode: str = "bilinear", **kwargs: Any) -> None:
        """How maps are brought to the masks' size.

        Args:
            mode: "bilinear" or "bicubic".
            kwargs: Of `torchmetrics.Metric`.
        """
        super().__init__(mode, **kwargs)
        self.mode = mode

    def update(self, maps: Values, masks: Values) -> None:
        """Maps (B, h, w) and the objects' masks (B, H, W) bool."""
        self._add(metrics.mass_accuracy(_array(maps), _array(masks), mode=self.mode))


def _tell_apart(metric: Metric, *settings: object) -> None:
    """A state that only metrics of one class and settings share.

    A `MetricCollection` updates only one of the metrics whose states are equal after the first
    batch, as those of two different ones may be: say, no increase and no hit among four pictures.
    """
    mark = zlib.crc32(repr((type(metric).__name__, settings)).encode())
    metric.add_state("mark", torch.tensor(mark), dist_reduce_fx="max")


def _array(values: Values) -> np.ndarray:
    """On the CPU, in a dtype that NumPy has."""
    if isinstance(values, np.ndarray):
        return values
    values = values.detach().cpu()
    return np.asarray((values.float() if values.dtype == torch.bfloat16 else values).numpy())
