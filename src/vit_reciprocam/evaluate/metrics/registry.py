"""METRICS: every metric as one record, which whatever measures, keeps or shows metrics reads.

The store's columns, a run's measuring, summaries, bootstrap intervals, tables, plots and the table
in docs/evaluation.md all come from these records, so a new metric is one more of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vit_reciprocam.core.maps import Size
from vit_reciprocam.errors import check_choice
from vit_reciprocam.evaluate.metrics.adcc import (
    adcc,
    average_drop,
    average_increase,
    coherency,
    complexity,
)
from vit_reciprocam.evaluate.metrics.location import mass_accuracy, pointing_game
from vit_reciprocam.evaluate.metrics.perturbation import baseline_images, deletion, insertion
from vit_reciprocam.evaluate.metrics.protocols import Protocol
from vit_reciprocam.pictures.preprocess import Preprocess

__all__ = ["KINDS", "METRICS", "Metric", "Objects", "Observation"]

KINDS = {
    "adcc": "always",
    "map": "always",
    "order": "with `--insertion`",
    "location": "where the label's objects are known and c is the label",
}
"""Kind -> when its metrics are measured.

adcc: ADCC, its terms and what else compares the picture with the picture under its map; map: what
looks at the map alone; order: what perturbs the picture in the map's order; location: what compares
the map with the object's place, and may therefore be missing for some pictures.
"""

_AGGREGATES = ("mean", "means", "protocol")


@dataclass(frozen=True)
class Objects:
    """Place of the label's objects in one picture.

    Attributes:
        mask: Pixels (H, W) bool that belong to them; at least one does.
        from_boxes: Whether only boxes around them are known.
    """

    mask: np.ndarray
    from_boxes: bool


@dataclass(frozen=True)
class Observation:
    """What a metric is computed from: pictures, one method's maps of them, and the model's answers.

    METHOD's letters: c is the explained class, A the map of c, E the picture times the upsampled A,
    A' the method's map of c on E.

    Attributes:
        protocol: Settings that the metrics' papers leave open.
        preprocess: How the pictures were prepared.
        images: Normalised pictures (B, 3, H, W).
        targets: Class c of each picture, (B,).
        maps: A, (B, h, w) in [0, 1].
        masked_maps: A', (B, h, w) in [0, 1].
        p: Probability of c on the pictures, (B,).
        o: Probability of c on E, (B,).
        predict: Function from images (B, 3, H, W) to probabilities (B, C).
        objects: Place of the label's objects, one entry per picture: None where it is not known or
            c is not the label.
    """

    protocol: Protocol
    preprocess: Preprocess
    images: np.ndarray
    targets: np.ndarray
    maps: np.ndarray
    masked_maps: np.ndarray
    p: np.ndarray
    o: np.ndarray
    predict: Callable[[np.ndarray], np.ndarray]
    objects: Sequence[Objects | None]

    @property
    def size(self) -> Size | None:
        """Size at which the protocol compares maps: the picture's, or None for the map's cells."""
        height, width = self.images.shape[-2:]
        return (height, width) if self.protocol.compared_at == "image" else None

    @cached_property
    def baseline(self) -> np.ndarray:
        """Pictures (B, 3, H, W) that insertion starts from and deletion ends at."""
        mean, std = self.preprocess.mean, self.preprocess.std
        return baseline_images(self.images, self.protocol.baseline, mean=mean, std=std)


@dataclass(frozen=True)
class Metric:
    """One metric: all that the store, a run, the tables and the docs know of it.

    Attributes:
        column: Its name in records, summaries and CSV files.
        heading: Its name over the column of a table.
        higher: Whether a higher value is better.
        kind: Name in `KINDS`, which says when it is measured.
        compute: Function that returns the values (B,) of pictures as fractions. Its argument is an
            `Observation`; where there are `terms`, its arguments are their arrays. A metric of kind
            "location" may return NaN for a picture that it does not apply to.
        description: Value of one picture, as the docs have it.
        source: Paper that defines it.
        terms: Columns that it is computed from, each "p", "o" or of a metric further up; empty
            where it is computed from an `Observation`.
        aggregate: How pictures become a figure of the data set. "mean": the mean over the pictures.
            "means": `compute` of the figures of its terms; such a metric has no value per picture
            and no column in the store. "protocol": whichever of these `Protocol.adcc` names.
    """

    column: str
    heading: str
    higher: bool
    kind: str
    compute: Callable[..., np.ndarray]
    description: str
    source: str
    terms: tuple[str, ...] = ()
    aggregate: str = "mean"

    def __post_init__(self) -> None:
        """Check the choices.

        Raises:
            InputError: If one does not exist.
        """
        check_choice("kind of metric", self.kind, KINDS)
        check_choice("aggregate of metric", self.aggregate, _AGGREGATES)

    @property
    def is_stored(self) -> bool:
        """Whether it has a value per picture, which the store keeps."""
        return self.aggregate != "means"

    def is_of_means(self, protocol: Protocol) -> bool:
        """Return whether its data set's figure is computed from its terms' figures."""
        chosen = protocol.adcc if self.aggregate == "protocol" else self.aggregate
        return chosen == "means"


def _coherency(seen: Observation) -> np.ndarray:
    return coherency(seen.maps, seen.masked_maps, size=seen.size, mode=seen.protocol.upsampling)


def _complexity(seen: Observation) -> np.ndarray:
    return complexity(seen.maps, size=seen.size, mode=seen.protocol.upsampling)


def _perturb(area: Callable[..., np.ndarray]) -> Callable[[Observation], np.ndarray]:
    """Return insertion or deletion with the protocol's settings."""

    def compute(seen: Observation) -> np.ndarray:
        protocol = seen.protocol
        given = (seen.predict, seen.images, seen.baseline, seen.maps, seen.targets)
        return area(*given, steps=protocol.steps, unit=protocol.unit, mode=protocol.upsampling)

    return compute


def _locate(
    measure: Callable[[np.ndarray, np.ndarray], np.ndarray], *, from_boxes: bool | None = None
) -> Callable[[Observation], np.ndarray]:
    """Return a measure of a map and its object's mask, NaN where the object is not known.

    Args:
        measure: Function of a map (h, w) and a mask (H, W).
        from_boxes: Whether it holds for masks made of boxes only, or for other masks only; None
            where it holds for both.
    """

    def compute(seen: Observation) -> np.ndarray:
        values = np.full(len(seen.maps), np.nan)
        for row, objects in enumerate(seen.objects):
            if objects is not None and from_boxes in (None, objects.from_boxes):
                values[row] = measure(seen.maps[row], objects.mask)
        return values

    return compute


METRICS: dict[str, Metric] = {
    metric.column: metric
    for metric in (
        Metric(
            "drop",
            "Drop",
            higher=False,
            kind="adcc",
            compute=average_drop,
            terms=("p", "o"),
            description="max(0, p − o) / p",
            source="Chattopadhyay et al. 2018",
        ),
        Metric(
            "increase",
            "Inc",
            higher=True,
            kind="adcc",
            compute=average_increase,
            terms=("p", "o"),
            description="1 where o > p, else 0",
            source="Chattopadhyay et al. 2018",
        ),
        Metric(
            "coherency",
            "Coher",
            higher=True,
            kind="adcc",
            compute=_coherency,
            description="(1 + Pearson(A, A')) / 2; a constant map correlates 0",
            source="Poppi et al. 2021",
        ),
        Metric(
            "complexity",
            "Compl",
            higher=False,
            kind="adcc",
            compute=_complexity,
            description="mean of A",
            source="Poppi et al. 2021",
        ),
        Metric(
            "adcc",
            "ADCC",
            higher=True,
            kind="adcc",
            compute=adcc,
            terms=("coherency", "complexity", "drop"),
            aggregate="protocol",
            description="harmonic mean of coherency, 1 − complexity and 1 − drop; 0 where one is 0",
            source="Poppi et al. 2021",
        ),
        Metric(
            "insertion",
            "Insertion",
            higher=True,
            kind="order",
            compute=_perturb(insertion),
            description="area under the probability of c while patches appear, highest of A first",
            source="Petsiuk et al. 2018",
        ),
        Metric(
            "deletion",
            "Deletion",
            higher=False,
            kind="order",
            compute=_perturb(deletion),
            description="area under the probability of c while patches vanish, highest of A first",
            source="Petsiuk et al. 2018",
        ),
        Metric(
            "insertion_minus_deletion",
            "Ins−Del",
            higher=True,
            kind="order",
            compute=np.subtract,
            terms=("insertion", "deletion"),
            aggregate="means",
            description="the data set's insertion minus its deletion",
            source="both terms in one figure",
        ),
        Metric(
            "pointing_game",
            "Pointing",
            higher=True,
            kind="location",
            compute=_locate(pointing_game),
            description="1 where the maximum of A lies in the object, else 0",
            source="Zhang et al. 2016",
        ),
        Metric(
            "energy_in_box",
            "Energy",
            higher=True,
            kind="location",
            compute=_locate(mass_accuracy, from_boxes=True),
            description="share of the sum of A that lies in the object's boxes",
            source="Wang et al. 2020",
        ),
        Metric(
            "mass_accuracy",
            "Mass",
            higher=True,
            kind="location",
            compute=_locate(mass_accuracy, from_boxes=False),
            description="share of the sum of A that lies in the object's mask",
            source="Arras et al. 2022",
        ),
    )
}
"""Column -> metric, in the order of tables."""
