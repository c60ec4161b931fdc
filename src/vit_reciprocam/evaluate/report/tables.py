"""Tables of runs: every method's figures, their bootstrap intervals and paired differences.

Runs share a table if they were measured under one protocol on the same pictures. A table keeps its
runs, so that each figure can be shown with its origin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute

from vit_reciprocam.errors import InputError
from vit_reciprocam.evaluate.metrics.protocols import Protocol
from vit_reciprocam.evaluate.metrics.registry import METRICS
from vit_reciprocam.evaluate.report.bootstrap import Estimate, Resampled, resample
from vit_reciprocam.evaluate.store import columns_of, count_wanted, read_run
from vit_reciprocam.methods.null import NULLS

__all__ = ["DEFAULTS", "ModelRows", "Row", "Run", "Table", "read_tables"]

DEFAULTS = {"kernel": "gaussian", "class_token": True, "layer": "norm1", "score": "probability"}
"""ReciproCAM's settings that change its maps, as the paper has them."""

_WITHOUT_EFFECT = ("path", "memory_limit")  # settings that do not change ReciproCAM's maps
_FEW = 30  # number of pictures below which bootstrap intervals are too narrow

Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Run:
    """What a run's folder holds, as `read_run` returns it."""

    path: Path
    settings: Mapping[str, Any]
    records: pyarrow.Table

    @property
    def protocol(self) -> Protocol:
        """Protocol of the run."""
        return Protocol.from_dict(self.settings["protocol"])

    @property
    def digests(self) -> dict[int, str]:
        """Index -> digest of the picture, for those that could be read."""
        columns = self.records.select(["index", "digest"]).to_pydict()
        pairs = zip(columns["index"], columns["digest"], strict=True)
        return {index: digest for index, digest in pairs if digest}


@dataclass(frozen=True)
class Row:
    """A method's line of a table; its figures and differences are by metric."""

    method: str  # with its settings, as `MethodSpec` writes it
    name: str  # without them
    settings: Mapping[str, Any]
    run: Run  # that measured it
    images: int  # number of pictures that it was measured on
    figures: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]  # to the model's reference, paired; it has none itself
    best: frozenset[str]  # metrics on which it is marked as best

    @property
    def is_null(self) -> bool:
        """Whether it is a null baseline."""
        return self.name in NULLS


@dataclass(frozen=True)
class ModelRows:
    """One model's lines of a table."""

    model: str
    weights: str  # their SHA-256
    reference: str  # method that others are compared with, see `_reference`
    rows: tuple[Row, ...]  # in the order of the runs, null baselines last
    paired: Resampled | None  # on the pictures that all methods were measured on, if there are any
    notes: tuple[str, ...]  # sentences on what is missing


@dataclass(frozen=True)
class Table:
    """Runs of one protocol on the same pictures."""

    runs: tuple[Run, ...]
    models: tuple[ModelRows, ...]  # those with at least one picture measured
    resamples: int
    seed: int
    apart: str  # why the runs are not in the first table; "" for the first
    notes: tuple[str, ...]  # sentences on what is missing

    @property
    def metrics(self) -> list[str]:
        """Metrics that were measured with any method, in the order of `METRICS`."""
        rows = [row for model in self.models for row in model.rows]
        return [name for name in METRICS if any(name in row.figures for row in rows)]


def read_tables(
    paths: Sequence[str | Path], *, resamples: int = 1000, seed: int = 0
) -> list[Table]:
    """Read runs into tables, one per protocol and set of pictures. See `write_report`."""
    if resamples < 1:
        raise InputError(f"resamples must be 1 or more; got {resamples}")
    groups: list[tuple[str, list[Run]]] = []  # why they stand apart, and the runs
    for folder in {Path(path).resolve(): Path(path) for path in paths}.values():
        run = Run(folder, *read_run(folder))
        reasons = [_find_difference(runs, run) for _, runs in groups]
        if "" in reasons:
            groups[reasons.index("")][1].append(run)
        else:
            apart = f"{folder} stands in a table of its own: {reasons[0]}" if reasons else ""
            groups.append((apart, [run]))
    tables = [_table(runs, resamples, seed, apart) for apart, runs in groups]
    if not any(table.models for table in tables):
        raise InputError(
            f"no picture was measured in {', '.join(map(str, paths))}: go on with the run by "
            "vit-reciprocam evaluate --resume"
        )
    return tables


def _find_difference(group: Sequence[Run], run: Run) -> str:
    """Return why a run cannot share a table with others; "" if it can."""
    first = group[0]
    if first.settings["protocol"] != run.settings["protocol"]:
        return f"its protocol is {run.protocol.name}, or differs from that of {first.path}"
    if first.settings.get("mosaic") != run.settings.get("mosaic"):
        return f"one of it and {first.path} has mosaics, or they have others"
    if first.settings["data"]["digest"] != run.settings["data"]["digest"]:
        return f"its data set differs from that of {first.path}"
    for other in group:
        theirs = other.digests
        if any(theirs.get(index, digest) != digest for index, digest in run.digests.items()):
            return f"its pictures have other pixels than those of {other.path}"
        for model in other.settings["models"].keys() & run.settings["models"].keys():
            if other.settings["models"][model] != run.settings["models"][model]:
                return f"its {model} has other weights or preprocessing than that of {other.path}"
            both = other.settings["methods"].keys() & run.settings["methods"].keys()
            if both:
                return f"{other.path} has {min(both)} of {model} already"
    return ""


def _table(runs: Sequence[Run], resamples: int, seed: int, apart: str) -> Table:
    notes = []
    for run in runs:
        total = count_wanted(run.settings)
        if "images" not in run.settings:
            columns = run.records.select(["model", "index"]).to_pydict()
            done = len(set(zip(columns["model"], columns["index"], strict=True)))
            notes.append(
                f"{run.path} is not finished: {done} of {total} pictures. Its figures will change."
            )
    names = dict.fromkeys(name for run in runs for name in run.settings["models"])
    models = {name: _model_rows(runs, name, resamples, seed) for name in names}
    notes += [f"No picture was measured with {name}." for name in names if models[name] is None]
    found = tuple(model for model in models.values() if model is not None)
    return Table(tuple(runs), found, resamples, seed, apart, tuple(notes))


def _model_rows(runs: Sequence[Run], model: str, resamples: int, seed: int) -> ModelRows | None:
    """Return one model's lines of a table; None if no picture was measured with it."""
    having = [run for run in runs if model in run.settings["models"]]
    specs: dict[str, Mapping[str, Any]] = {}
    columns: dict[str, Columns] = {}
    origins: dict[str, Run] = {}
    for run in having:
        for method, spec in run.settings["methods"].items():
            found = columns_of(run.records, model, method)
            if len(found["index"]):
                specs[method], columns[method], origins[method] = spec, found, run
    if not columns:
        return None
    how = {"protocol": runs[0].protocol, "resamples": resamples, "seed": seed}
    own, paired = _resample(columns, **how)
    reference = _reference(specs)
    figures = {method: each.figures(method) for method, each in own.items()}
    real = {method: figures[method] for method in specs if specs[method]["method"] not in NULLS}
    best = _find_best(real, paired) if paired else {}
    rows = [
        Row(
            method,
            spec["method"],
            {key: value for key, value in spec.items() if key != "method"},
            origins[method],
            own[method].pictures,
            figures[method],
            paired.differences(method, reference) if paired and method != reference else {},
            frozenset(best.get(method, ())),
        )
        for method, spec in specs.items()
    ]
    rows.sort(key=lambda row: row.is_null)
    weights = having[0].settings["models"][model]["weights"]
    notes = _notes(having, model, rows, paired)
    return ModelRows(model, weights, reference, tuple(rows), paired, notes)


def _resample(
    columns: Mapping[str, Columns], **how: Any
) -> tuple[dict[str, Resampled], Resampled | None]:
    """Return method -> figures on all its pictures, and the figures on those that all share."""
    common = list(set.intersection(*(set(each["index"]) for each in columns.values())))
    shared = {
        method: {name: values[np.isin(each["index"], common)] for name, values in each.items()}
        for method, each in columns.items()
    }
    paired = resample(shared, **how) if common else None
    own = {}
    for method, each in columns.items():
        if paired and len(each["index"]) == len(common):
            own[method] = paired
        else:
            own[method] = resample({method: each}, **how)
    return own, paired


def _reference(specs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return ReciproCAM with the paper's settings, else the first method, null baselines last."""
    for method, spec in specs.items():
        changes = {k: v for k, v in spec.items() if k not in ("method", *_WITHOUT_EFFECT)}
        if spec["method"] == "reciprocam" and {**DEFAULTS, **changes} == DEFAULTS:
            return method
    real = [method for method, spec in specs.items() if spec["method"] not in NULLS]
    return (real or list(specs))[0]


def _find_best(
    figures: Mapping[str, Mapping[str, Estimate]], paired: Resampled
) -> dict[str, list[str]]:
    """Return method -> metrics on which it is the best or not clearly worse than the best.

    The figures are those of methods that are not null baselines. Nothing is marked if that would be
    every method.
    """
    best: dict[str, list[str]] = {method: [] for method in figures}
    shared = {method: paired.figures(method) for method in figures}
    for metric, about in METRICS.items():
        having = [method for method in figures if metric in figures[method]]
        sign = 1 if about.higher else -1
        known = {m: sign * shared[m][metric].value for m in having if metric in shared[m]}
        top = max(known, key=known.__getitem__, default="")
        near = [m for m in known if not paired.differences(m, top)[metric].is_clear]
        if len(near) < len(having):
            for method in near:
                best[method].append(metric)
    return best


def _notes(
    runs: Sequence[Run], model: str, rows: Sequence[Row], paired: Resampled | None
) -> tuple[str, ...]:
    notes = []
    for run in runs:
        records = run.records.filter(pyarrow.compute.equal(run.records["model"], model))
        failed = records.filter(pyarrow.compute.is_valid(records["error"]))["index"].unique()
        if len(failed):
            notes.append(
                f"{len(failed)} picture(s) failed with {model} in {run.path} and are left out."
            )
    most, least = max(row.images for row in rows), min(row.images for row in rows)
    if paired is None:
        notes.append(f"No picture was measured with every method of {model}: no differences.")
    elif paired.pictures < most:
        notes.append(
            f"Differences of {model} are over the {paired.pictures} pictures that every method "
            f"was measured on; {most - paired.pictures} others are left out of them."
        )
    if least < _FEW:
        notes.append(f"With only {least} picture(s) intervals are too narrow to be relied on.")
    return tuple(notes)
