"""Compute metrics: the values of each picture, and the figures of a data set."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from vit_reciprocam.errors import InputError
from vit_reciprocam.evaluate.metrics.arrays import check_columns, check_pairs
from vit_reciprocam.evaluate.metrics.protocols import Protocol
from vit_reciprocam.evaluate.metrics.registry import KINDS, METRICS, Observation

__all__ = ["measure", "summarize"]

_NEEDED = ("p", "o", "coherency", "complexity")  # columns that ADCC is computed from


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

    The columns are fractions; those that `METRICS` does not know are ignored. `InputError` is
    raised if p, o, coherency or complexity is missing, or a column is empty, of another length, NaN
    or outside [0, 1].
    """
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
