"""METRICS: one record per metric, and the measuring of batches and data sets by them.

The measuring of a run, the store's columns, summaries, bootstrap intervals, tables, plots and the
table in docs/evaluation.md all read these records, so that a new metric is one more record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vit_reciprocam.core.maps import min_max
from vit_reciprocam.errors import InputError, check_choice
from vit_reciprocam.evaluate.metrics.adcc import (
    adcc,
    average_drop,
    average_increase,
    coherency,
    complexity,
)
from vit_reciprocam.evaluate.metrics.arrays import check_columns, check_pairs
from vit_reciprocam.evaluate.metrics.location import mass_accuracy, pointing_game
from vit_reciprocam.evaluate.metrics.perturbation import baseline_images, deletion, insertion
from vit_reciprocam.evaluate.metrics.protocols import Protocol
from vit_reciprocam.pictures.preprocess import Preprocess

__all__ = ["KINDS", "METRICS", "Metric", "Objects", "Observation", "measure", "summarize"]

KINDS = {
    "adcc": "always",
    "map": "always",
    "order": "with `--insertion`",
    "location": "where the label's objects are known and c is the label",
    "mosaic": "with `--mosaic`, and then alone",
}
"""Kind -> when its metrics are measured.

adcc: ADCC, its terms and other metrics that compare the picture with the picture under its map;
map: metrics of the map alone; order: those that perturb the picture in the order of its ranking;
location: those that compare the map with the object's place, and may therefore be NaN for some
pictures; mosaic: those that compare it with the place of c's cell, and have no other kinds beside
them.
"""

_NEEDED = ("p", "o", "coherency", "complexity")  # columns that ADCC is computed from


@dataclass(frozen=True)
class Objects:
    """Place of the label's objects in one picture."""

    mask: np.ndarray  # pixels (H, W) bool that belong to them; at least one does
    from_boxes: bool  # whether only boxes around them are known


@dataclass(frozen=True)
class Observation:
    """All that a metric is computed from: pictures, one method's maps and the model's answers.

    The letters are those of docs/evaluation.md: c is the explained class, A the map of c, E the
    picture times the upsampled A, A' the method's map of c on E.
    """

    protocol: Protocol  # what the metrics' papers leave open
    preprocess: Preprocess  # how the pictures were prepared
    images: np.ndarray  # normalised pictures (B, 3, H, W)
    targets: np.ndarray  # class c of each picture, (B,)
    maps: np.ndarray  # A, (B, h, w) in [0, 1]
    ranking: np.ndarray  # (B, h, w), puts patches in order: signed evidence, or else the maps
    masked_maps: np.ndarray  # A', (B, h, w) in [0, 1]
    p: np.ndarray  # probability of c on the pictures, (B,)
    o: np.ndarray  # probability of c on E, (B,); like A' it is NaN if it was not computed
    predict: Callable[[np.ndarray], np.ndarray]  # from images (B, 3, H, W) to probabilities (B, C)
    objects: Sequence[Objects | None]  # per picture: None if not known or c is not the label

    @property
    def comparison(self) -> dict[str, Any]:
        """How the protocol compares maps: cell by cell, or upsampled to the picture's size."""
        size = self.images.shape[-2:] if self.protocol.compared_at == "image" else None
        return {"size": size, "mode": self.protocol.upsampling}

    @cached_property
    def baseline(self) -> np.ndarray:
        """Pictures (B, 3, H, W) that insertion starts from and deletion ends at."""
        mean, std = self.preprocess.mean, self.preprocess.std
        return baseline_images(self.images, self.protocol.baseline, mean=mean, std=std)


@dataclass(frozen=True)
class Metric:
    """One metric: all that a run, the store, the tables and the docs know about it.

    Attributes:
        column: Its name in records, summaries and CSV files.
        heading: Its name over the column of a table.
        higher: Whether a higher value is better.
        kind: Name in `KINDS`, which says when it is measured.
        compute: Function that returns the values (B,) of pictures as fractions. Its argument is an
            `Observation`; if there are `terms`, its arguments are their arrays. A metric of kind
            "location" may return NaN for a picture that it does not apply to.
        description: Value of one picture, as the docs have it.
        source: Paper that defines it.
        terms: Columns that it is computed from: "p", "o", or those of metrics that stand before it
            in `METRICS`. Empty if it is computed from an `Observation`.
        aggregate: Way to compute the data set's figure. "mean": the mean over the pictures.
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
        """Refuse a choice that does not exist."""
        check_choice("kind of metric", self.kind, KINDS)
        check_choice("aggregate of metric", self.aggregate, ("mean", "means", "protocol"))

    @property
    def is_stored(self) -> bool:
        """Whether it has a value per picture, which the store keeps."""
        return self.aggregate != "means"

    @property
    def heading_with_arrow(self) -> str:
        """Its heading, with an arrow to the better side."""
        return f"{self.heading} {'↑' if self.higher else '↓'}"

    def combines_means(self, protocol: Protocol) -> bool:
        """Return whether a data set's figure is computed from the figures of its terms."""
        return (protocol.adcc if self.aggregate == "protocol" else self.aggregate) == "means"


def _perturb(area: Callable[..., np.ndarray]) -> Callable[[Observation], np.ndarray]:
    """Return insertion or deletion with the protocol's settings."""

    def compute(seen: Observation) -> np.ndarray:
        protocol = seen.protocol
        given = (seen.predict, seen.images, seen.baseline, seen.ranking, seen.targets)
        return area(*given, steps=protocol.steps, unit=protocol.unit, mode=protocol.upsampling)

    return compute


def _locate(
    value_of: Callable[[np.ndarray, np.ndarray], np.ndarray], *, from_boxes: bool | None = None
) -> Callable[[Observation], np.ndarray]:
    """Return `compute` of a metric that measures a map (h, w) by its object's mask (H, W), or NaN.

    If `from_boxes` is true, only masks made from boxes count; if it is false, only other masks.
    """

    def compute(seen: Observation) -> np.ndarray:
        values = np.full(len(seen.maps), np.nan)
        for row, objects in enumerate(seen.objects):
            if objects is not None and from_boxes in (None, objects.from_boxes):
                values[row] = value_of(seen.maps[row], objects.mask)
        return values

    return compute


def _point(seen: Observation) -> np.ndarray:
    """Return the pointing game; a map of zeros points where the ranking is highest."""
    nothing = seen.maps.max(axis=(1, 2), keepdims=True) == 0
    maps = np.where(nothing, min_max(seen.ranking)[0], seen.maps)
    return _locate(pointing_game)(dataclasses.replace(seen, maps=maps))


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
            compute=lambda seen: coherency(seen.maps, seen.masked_maps, **seen.comparison),
            description="(1 + Pearson(A, A')) / 2; a constant map correlates 0",
            source="Poppi et al. 2021",
        ),
        Metric(
            "complexity",
            "Compl",
            higher=False,
            kind="adcc",
            compute=lambda seen: complexity(seen.maps, **seen.comparison),
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
            compute=_point,
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
        Metric(
            "gridpg",
            "GridPG",
            higher=True,
            kind="mosaic",
            compute=_locate(mass_accuracy),
            description="share of the sum of A that lies in c's cell of a mosaic; chance is 1/n²",
            source="Böhle et al. 2021, Rao et al. 2022",
        ),
    )
}
"""Column -> metric, in the order of tables."""


def measure(seen: Observation, kinds: Collection[str] = tuple(KINDS)) -> dict[str, np.ndarray]:
    """Return the columns (B,) of a batch's pictures: p, o and the metrics of `kinds`, in fractions.

    The kind "order" calls `predict` 2 · (steps + 1) times. `InputError` is raised if shapes do not
    fit, or something is NaN or outside [0, 1].
    """
    check_pairs(seen.images, seen.maps)
    columns = {"p": np.asarray(seen.p, np.float64), "o": np.asarray(seen.o, np.float64)}
    for metric in METRICS.values():
        if metric.is_stored and metric.kind in kinds:
            given: Any = [columns[term] for term in metric.terms] if metric.terms else [seen]
            columns[metric.column] = metric.compute(*given)
    return columns


def summarize(columns: Mapping[str, np.ndarray], protocol: Protocol) -> dict[str, float]:
    """Return a data set's figures from its pictures' columns (pictures,), in percent.

    Metrics with `terms` are computed from these anew; others are left out if their column is absent
    or NaN throughout. A metric of kind "location" may be NaN for pictures whose objects are not
    known: its figure is the mean over the others.

    If a metric of kind "mosaic" was measured, the figures are those of this kind alone.

    The columns are fractions; those that `METRICS` does not know are ignored. `InputError` is
    raised if p, o, coherency or complexity is missing, or a column is empty, of another length, NaN
    or outside [0, 1].
    """
    mosaic = {
        name: columns[name]
        for name, metric in METRICS.items()
        if metric.kind == "mosaic" and not np.isnan(columns.get(name, np.nan)).all()
    }
    if mosaic:
        check_columns(**mosaic)
        return {name: 100 * float(np.mean(values)) for name, values in mosaic.items()}
    missing = [name for name in _NEEDED if name not in columns]
    if missing:
        raise InputError(f"a summary needs column {', '.join(missing)}; got {list(columns)}")
    pictures = {name: np.asarray(columns[name], np.float64) for name in ("p", "o")}
    figures: dict[str, Any] = {}
    for name, metric in METRICS.items():
        if not metric.terms:
            values = np.asarray(columns.get(name, np.nan), np.float64)
            if np.isnan(values).all() and name not in _NEEDED:
                continue  # not measured
            if metric.kind == "location":
                check_columns(**{name: values[~np.isnan(values)]})
            else:
                check_columns(p=pictures["p"], **{name: values})
            pictures[name] = values
        elif metric.is_stored and pictures.keys() >= set(metric.terms):
            pictures[name] = metric.compute(*(pictures[term] for term in metric.terms))
        if not metric.combines_means(protocol):
            if name in pictures:
                figures[name] = pictures[name][~np.isnan(pictures[name])].mean()
        elif figures.keys() >= set(metric.terms):
            figures[name] = metric.compute(*(figures[term] for term in metric.terms))
    return {name: 100 * float(value) for name, value in figures.items()}
