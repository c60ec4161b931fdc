"""Measure methods on a data set: every picture once, every record kept, resumable at any moment."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vit_reciprocam.classifier.classifier import Classifier, Explainer
from vit_reciprocam.core.batch import Batch
from vit_reciprocam.errors import ImageError, InputError, ReciproCAMError
from vit_reciprocam.evaluate.data.datasets import DataSet, Item, picture_digest, read_dataset
from vit_reciprocam.evaluate.data.labels import Labels
from vit_reciprocam.evaluate.metrics import location
from vit_reciprocam.evaluate.metrics.protocols import Protocol, get_protocol
from vit_reciprocam.evaluate.store import RunFolder, columns_of, read_run
from vit_reciprocam.methods import MethodSpec
from vit_reciprocam.pictures.preprocess import Preprocess
from vit_reciprocam.results.explanation import softmax
from vit_reciprocam.results.files import library_versions

__all__ = ["Progress", "evaluate", "summaries"]

_AHEAD = 3  # batches that are read while one is computed


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        done: Pictures measured or failed, of all models, with those of earlier processes.
        total: All pictures of all models.
        records: Those just written.
    """

    done: int
    total: int
    records: list[dict[str, Any]]


def evaluate(
    data: str,
    classifiers: Sequence[Classifier],
    methods: Sequence[str],
    *,
    out: Path,
    protocol: str | Protocol = "byun2023",
    insertion: bool = False,
    resume: bool = False,
    limit: int | None = None,
    batch_size: int = 16,
    workers: int = 2,
    ground_truth: Path | None = None,
    boxes: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Measure methods on every picture of a data set, into a run's folder.

    For each picture, model and method: the map A of the protocol's class c, the probability o of c
    on the picture under A and the map A' made of that picture give drop, increase, coherency,
    complexity and ADCC (`metrics`). Where the data set has boxes or masks of the label's objects
    and c is the label, the pointing game and the energy inside are measured too.

    Args:
        data: As `read_dataset` takes it.
        classifiers: From `load`.
        methods: Names of `METHODS`, with settings such as "reciprocam:kernel=dirac".
        out: The run's folder: records in Parquet parts, and last manifest.json.
        protocol: A name of `PROTOCOLS`, a file with one's own, or a `Protocol`.
        insertion: Measure insertion and deletion too, some thirty forward passes a picture.
        resume: Go on with a run that was cut short; everything else must be as before.
        limit: Only the first pictures, so many.
        batch_size: Pictures in one call.
        workers: Threads that read and prepare pictures while the model computes.
        ground_truth: See `read_dataset`.
        boxes: See `read_dataset`.
        progress: Called after each batch.

    Returns:
        The manifest: settings, versions, how many pictures were measured, and those that failed.

    Raises:
        InputError: If the data set, a method or a setting cannot be used, the protocol needs labels
            where there are none, or the folder holds something else.
        OSError: If records cannot be written; those before are kept, and `resume` goes on.
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
    explainers = {
        name: {
            label: classifier.backend.make_explainer(method=spec.name, **spec.settings)
            for label, spec in specs.items()
        }
        for name, classifier in models.items()
    }
    datasets = {
        name: _read(data, classifier, limit, ground_truth, boxes)
        for name, classifier in models.items()
    }
    dataset = next(iter(datasets.values()))
    _check_labels(dataset, protocol)
    for name, classifier in models.items():
        _try(classifier, explainers[name])
    settings = {
        "protocol": protocol.to_dict(),
        "insertion": insertion,
        "data": {"name": data, "digest": dataset.digest(), "pictures": len(dataset.items)},
        "models": {
            name: {
                "weights": classifier.backend.digest(),
                "preprocess": classifier.preprocess.to_dict(),
                "device": classifier.device,
                "class_names": classifier.class_names and list(classifier.class_names),
            }
            for name, classifier in models.items()
        },
        "methods": {label: {"method": s.name, **s.settings} for label, s in specs.items()},
        "versions": library_versions(),
    }
    total = len(models) * len(dataset.items)
    with RunFolder.open(out, settings, resume=resume) as run:
        done = run.done()
        count = len(done)
        for name, classifier in models.items():
            preprocess = protocol.preprocess(classifier.preprocess)
            wanted = [item for item in datasets[name].items if (item.index, name) not in done]
            measure = _Measurement(classifier, explainers[name], protocol, preprocess, insertion)
            for batch in _loaded(wanted, preprocess, batch_size, workers):
                records = measure.records(batch)
                run.write(records)
                count += len(batch)
                if progress is not None:
                    progress(Progress(count, total, records))
        return run.finish({"duplicates": dataset.duplicates})


def summaries(folder: Path) -> list[dict[str, Any]]:
    """A row for each model and method of a run, in percent: `Protocol.summary`, and "images".

    Raises:
        InputError: If it is no run.
    """
    settings, table = read_run(folder)
    protocol = Protocol.from_dict(settings["protocol"])
    rows = []
    for model in settings["models"]:
        for method in settings["methods"]:
            columns = columns_of(table, model, method)
            if len(columns["p"]):
                row = {"model": model, "method": method, "images": len(columns["p"])}
                rows.append(row | protocol.summary(columns))
    return rows


def _read(
    data: str,
    classifier: Classifier,
    limit: int | None,
    ground_truth: Path | None,
    boxes: Path | None,
) -> DataSet:
    labels = Labels(classifier.num_classes, classifier.class_names)
    dataset = read_dataset(data, labels, ground_truth=ground_truth, boxes=boxes)
    return dataclasses.replace(dataset, items=dataset.items[:limit])


def _try(classifier: Classifier, explainers: Mapping[str, Explainer]) -> None:
    """Run each method once, so that one that cannot run says so before the data set does.

    Raises:
        InputError: If a method cannot explain this model with its settings.
    """
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


# --- measuring -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Measurement:
    """Of one model: from loaded pictures to records of the store's columns."""

    classifier: Classifier
    explainers: Mapping[str, Explainer]
    protocol: Protocol
    preprocess: Preprocess
    insertion: bool

    def records(self, batch: Sequence[_Loaded]) -> list[dict[str, Any]]:
        """For each picture and method one, also for pictures that fail."""
        good = [one for one in batch if not one.error]
        failed = [
            self._about(one, method) | {"error": one.error}
            for one in batch
            if one.error
            for method in self.explainers
        ]
        if not good:
            return failed
        images = np.stack([one.pixels for one in good if one.pixels is not None])
        shared = self.classifier.backend.batch(images)
        measured = [
            record
            for method in self.explainers
            for record in self._measured(method, good, images, shared)
        ]
        return failed + measured

    def _about(self, one: _Loaded, method: str) -> dict[str, Any]:
        return {
            "index": one.item.index,
            "source": one.item.source,
            "digest": one.digest,
            "model": self.classifier.name,
            "method": method,
            "label": one.item.label,
        }

    def _measured(
        self, method: str, batch: Sequence[_Loaded], images: np.ndarray, shared: Batch | None
    ) -> list[dict[str, Any]]:
        """Of one method; where it fails on a batch, picture by picture."""
        try:
            columns = self._columns(method, batch, images, shared)
        except ReciproCAMError as error:
            if len(batch) == 1:
                return [self._about(batch[0], method) | {"error": str(error)}]
            return [
                record
                for row, one in enumerate(batch)
                for record in self._measured(method, [one], images[row : row + 1], None)
            ]
        records = []
        for row, one in enumerate(batch):
            values = {name: column[row].tolist() for name, column in columns.items()}
            saliency = columns["map"][row]
            place = {"map": saliency.ravel().tolist(), "rows": len(saliency), "note": one.note}
            located = _located(one, saliency) if values["target"] == one.item.label else {}
            records.append(self._about(one, method) | values | place | located)
        return records

    def _columns(
        self, method: str, batch: Sequence[_Loaded], images: np.ndarray, shared: Batch | None
    ) -> dict[str, np.ndarray]:
        explain = self.explainers[method]
        labels = np.array([-1 if one.item.label is None else one.item.label for one in batch])
        first = explain(
            images if shared is None else shared,
            lambda found: self.protocol.targets(found, labels)[:, None],
        )
        maps, targets = first.maps[:, 0], first.targets[:, 0]
        masked = explain(self.protocol.masked_images(images, maps), targets[:, None])
        p, o = _chosen(first.probs, targets), _chosen(masked.probs, targets)
        columns = self.protocol.score_images(images, maps, masked.maps[:, 0], p, o)
        if self.insertion:
            columns |= self.protocol.score_order(
                lambda x: softmax(self.classifier.backend.predict(x)),
                images,
                maps,
                targets,
                self.preprocess,
            )
        return columns | {"map": maps, "target": targets, "predicted": first.logits.argmax(axis=1)}


def _chosen(probs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return np.take_along_axis(probs, targets[:, None], axis=1)[:, 0]


def _located(one: _Loaded, saliency: np.ndarray) -> dict[str, float]:
    """How well the map lies on the label's objects, where these are known and in sight."""
    if one.mask is None:
        return {}
    share = "energy_in_box" if one.item.boxes and not one.item.mask else "mass_accuracy"
    return {
        "pointing_game": float(location.pointing_game(saliency, one.mask)),
        share: float(location.mass_accuracy(saliency, one.mask)),
    }


# --- reading ahead ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Loaded:
    """A picture ready for the model, or why it is not.

    Attributes:
        item: Of the data set.
        digest: SHA-256 of its pixels.
        pixels: (3, H, W), preprocessed.
        mask: (H, W) bool, the label's objects, where they are known and in sight.
        note: Why there is no mask, where one was given.
        error: Empty where there are pixels.
    """

    item: Item
    digest: str = ""
    pixels: np.ndarray | None = None
    mask: np.ndarray | None = None
    note: str | None = None
    error: str = ""


def _loaded(
    items: Sequence[Item], preprocess: Preprocess, batch_size: int, workers: int
) -> Iterator[list[_Loaded]]:
    """Batches of pictures; threads read the next ones while the caller computes."""
    smooth = dataclasses.replace(preprocess, interpolation="bilinear")

    def load(item: Item) -> _Loaded:
        try:
            picture = item.read()
            digest, pixels = picture_digest(picture), preprocess(picture)
        except (ImageError, OSError) as error:
            return _Loaded(item, error=str(error))
        try:
            objects = item.read_objects(picture.size)
        except (ImageError, OSError) as error:
            return _Loaded(item, digest, pixels, note=str(error))
        mask = None if objects is None else _seen(np.asarray(smooth.view(objects)))
        lost = mask is not None and not mask.any()
        note = "the objects lie outside the part that the model sees" if lost else None
        return _Loaded(item, digest, pixels, None if lost else mask, note)

    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Any] = deque()
        for start in range(0, len(items), batch_size):
            ahead.append([pool.submit(load, item) for item in items[start : start + batch_size]])
            if len(ahead) > _AHEAD:
                yield [future.result() for future in ahead.popleft()]
        for futures in ahead:
            yield [future.result() for future in futures]


def _seen(resized: np.ndarray) -> np.ndarray:
    """Pixels that objects cover by half; of objects too small for that, all that they touch."""
    half: np.ndarray = resized > 127
    return half if half.any() else resized > 0
