"""Measure methods on a data set, in a run that can be stopped at any moment and resumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vit_reciprocam.classifier.classifier import Classifier, Explainer
from vit_reciprocam.errors import InputError, ReciproCAMError
from vit_reciprocam.evaluate.data.datasets import (
    DataSet,
    Labels,
    load_batches,
    read_dataset,
)
from vit_reciprocam.evaluate.measurer import Measurer
from vit_reciprocam.evaluate.metrics.protocols import Protocol, get_protocol
from vit_reciprocam.evaluate.metrics.registry import summarize
from vit_reciprocam.evaluate.mosaics import THRESHOLD, Mosaics, find_mosaics, load_mosaics
from vit_reciprocam.evaluate.store import (
    RunFolder,
    check_unused,
    columns_of,
    count_wanted,
    read_run,
)
from vit_reciprocam.methods import MethodSpec
from vit_reciprocam.results.files import library_versions

__all__ = ["Progress", "evaluate", "summaries"]


@dataclass(frozen=True)
class Progress:
    """How far a run has got. A picture counts once per model.

    A run of mosaics first counts the pictures that each model predicts, and then, from the
    beginning, the cells that are measured.
    """

    done: int  # number of pictures measured or failed, including those of earlier processes
    total: int  # number of pictures in the run
    records: list[dict[str, Any]]  # those that have just been written


def evaluate(
    data: str,
    classifiers: Sequence[Classifier],
    methods: Sequence[str],
    *,
    out: Path,
    protocol: str | Protocol = "byun2023",
    insertion: bool = False,
    mosaic: int | None = None,
    resume: bool = False,
    limit: int | None = None,
    batch_size: int = 16,
    workers: int = 2,
    ground_truth: Path | None = None,
    boxes: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Measure methods on every picture of a data set, and keep the records in a run's folder.

    For each picture, model and method, the map A of the protocol's class c masks the picture.
    Drop, increase, coherency, complexity and ADCC are computed from A, the probability of c before
    and after, and the map of c on the masked picture. If the data set has boxes or masks of the
    label's objects and c is the label, the pointing game and the share of A inside are measured
    too. `METRICS` has all of them.

    Args:
        data: Data set, see `read_dataset`.
        classifiers: Models, from `load`.
        methods: Names of `METHODS`, with settings such as "reciprocam:kernel=dirac".
        out: Folder of the run, see `RunFolder`.
        protocol: Name in `PROTOCOLS`, file with your own, or a `Protocol`.
        insertion: Whether to measure insertion and deletion too, which takes some thirty forward
            passes per picture.
        mosaic: Number n of pictures along each side of a mosaic; None for the pictures themselves.
            Each model predicts all pictures that have a label. Those that it classifies rightly,
            with probability 0.5 or more, stand in n x n mosaics of distinct classes; GridPG is the
            share of each cell's class's map in the cell, and nothing else is measured.
        resume: Whether to go on with a run that was cut short; everything else must be as before.
        limit: Number of pictures to measure, counted from the first; None for all.
        batch_size: Number of pictures in one call.
        workers: Number of threads that read and prepare pictures while the model computes.
        ground_truth: File of ILSVRC2012's labels, see `read_dataset`.
        boxes: Folder of ILSVRC2012's boxes, see `read_dataset`.
        progress: Function that is called after each batch.

    Returns:
        The manifest: settings, versions, the number of pictures measured, and those that failed.

    Raises:
        InputError: If the data set, a method or a setting cannot be used, the protocol needs labels
            that are missing, there are too few pictures for a mosaic, or the folder holds anything
            but a run to resume.
        OSError: If records cannot be written; earlier ones are kept, and `resume` goes on.
    """
    protocol = protocol if isinstance(protocol, Protocol) else get_protocol(protocol)
    specs = {str(spec): spec for spec in map(MethodSpec.parse, methods)}
    models = {classifier.name: classifier for classifier in classifiers}
    if not models or len(models) < len(classifiers):
        raise InputError(
            f"expected one or more models, each once; got {[one.name for one in classifiers]}"
        )
    if not specs or len(specs) < len(methods):
        raise InputError(f"expected one or more methods, each once; got {list(methods)}")
    if batch_size < 1 or workers < 1 or (limit is not None and limit < 1):
        raise InputError(
            f"batch_size, workers and limit must be 1 or more; got {batch_size}, {workers}, {limit}"
        )
    if mosaic is not None:
        _check_mosaic(mosaic, insertion, models)
    explainers = {
        name: {
            label: classifier.backend.make_explainer(method=spec.name, **spec.settings)
            for label, spec in specs.items()
        }
        for name, classifier in models.items()
    }
    datasets = {}
    for name, classifier in models.items():
        labels = Labels(classifier.num_classes, classifier.class_names)
        whole = read_dataset(data, labels, ground_truth=ground_truth, boxes=boxes)
        datasets[name] = dataclasses.replace(whole, items=whole.items[:limit])
    dataset = next(iter(datasets.values()))
    if mosaic is None:
        _check_labels(dataset, protocol)
    for name, classifier in models.items():
        _check_methods(classifier, explainers[name])
    settings = _describe(protocol, insertion, dataset, models, specs)
    preprocesses = {name: protocol.preprocess(one.preprocess) for name, one in models.items()}
    mosaics: dict[str, Mosaics] = {}
    if mosaic is not None:
        if not resume:
            check_unused(out)  # before all pictures are predicted
        for name, classifier in models.items():
            mosaics[name] = find_mosaics(
                classifier,
                datasets[name].items,
                preprocesses[name],
                mosaic,
                batch_size=batch_size,
                workers=workers,
                progress=progress and (lambda done, total: progress(Progress(done, total, []))),
            )
        described = {name: one.describe() for name, one in mosaics.items()}
        settings["mosaic"] = {"n": mosaic, "threshold": THRESHOLD, "models": described}
    total = count_wanted(settings)
    with RunFolder.open(out, settings, resume=resume) as run:
        done = run.done()
        count = len(done)
        for name, classifier in models.items():
            preprocess, found = preprocesses[name], explainers[name]
            if mosaic is not None:
                measurer = Measurer(classifier, found, protocol, preprocess, insertion, mosaic**2)
                left = [
                    one
                    for one in mosaics[name].mosaics
                    if any((cell.index, name) not in done for cell in one.cells)
                ]
                batches = load_mosaics(left, preprocess, mosaic, batch_size, workers)
            else:
                measurer = Measurer(classifier, found, protocol, preprocess, insertion)
                wanted = [item for item in datasets[name].items if (item.index, name) not in done]
                batches = load_batches(wanted, preprocess, batch_size, workers)
            for batch in batches:
                records = measurer.records(batch)
                run.write(records)
                count += len(batch)
                if progress is not None:
                    progress(Progress(count, total, records))
        failures = [failure for one in mosaics.values() for failure in one.failures]
        return run.finish({"duplicates": dataset.duplicates, "failures": failures})


def summaries(folder: Path) -> list[dict[str, Any]]:
    """Return one row per model and method of a run.

    Its keys are "model", "method", "images" (their number) and the metrics (in percent).
    """
    settings, table = read_run(folder)
    protocol = Protocol.from_dict(settings["protocol"])
    rows = []
    for model in settings["models"]:
        for method in settings["methods"]:
            columns = columns_of(table, model, method)
            if len(columns["p"]):
                row = {"model": model, "method": method, "images": len(columns["p"])}
                rows.append(row | summarize(columns, protocol))
    return rows


def _describe(
    protocol: Protocol,
    insertion: bool,
    dataset: DataSet,
    models: Mapping[str, Classifier],
    methods: Mapping[str, MethodSpec],
) -> dict[str, Any]:
    """Return a run's settings as JSON values; a resumed run must agree in all of them."""
    return {
        "protocol": protocol.to_dict(),
        "insertion": insertion,
        "data": {"name": dataset.name, "digest": dataset.digest(), "pictures": len(dataset.items)},
        "models": {
            name: {
                "weights": classifier.backend.digest(),
                "preprocess": classifier.preprocess.to_dict(),
                "device": classifier.device,
                "class_names": classifier.class_names and list(classifier.class_names),
            }
            for name, classifier in models.items()
        },
        "methods": {label: {"method": s.name, **s.settings} for label, s in methods.items()},
        "versions": library_versions(),
    }


def _check_methods(classifier: Classifier, explainers: Mapping[str, Explainer]) -> None:
    """Run each method once, so that one that cannot explain this model fails at once."""
    image = np.zeros((1, 3, *classifier.preprocess.size), np.float32)
    for method, explain in explainers.items():
        try:
            explain(image, [[0]])
        except ReciproCAMError as error:
            raise InputError(
                f"method {method} cannot explain {classifier.name}: {error}"
            ) from error


def _check_labels(dataset: DataSet, protocol: Protocol) -> None:
    unlabelled = [item.source for item in dataset.items if item.label is None]
    if protocol.target == "label" and unlabelled:
        raise InputError(
            f"protocol {protocol.name} explains the true class, and {len(unlabelled)} of "
            f"{len(dataset.items)} pictures have no label, such as {unlabelled[0]}: add a column "
            "label, or take a protocol that explains the model's own class, such as poppi2021"
        )


def _check_mosaic(n: int, insertion: bool, models: Mapping[str, Classifier]) -> None:
    smallest = min(min(classifier.preprocess.size) for classifier in models.values())
    if not 2 <= n <= smallest:
        raise InputError(
            f"mosaic is the number of pictures along each side, from 2 to the {smallest} pixels "
            f"of the model's input; got {n}"
        )
    if insertion:
        raise InputError(
            "insertion is not measured on mosaics, only GridPG is: leave insertion out, or make "
            "another run for it, without mosaic"
        )
