"""Pictures of a report: the best, the worst, and those on which methods disagree most."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import pyarrow.compute
from PIL import Image

from vit_reciprocam.errors import ImageError
from vit_reciprocam.evaluate.data.datasets import Item, picture_digest
from vit_reciprocam.evaluate.report.tables import ModelRows, Table
from vit_reciprocam.evaluate.store import columns_of, records_of
from vit_reciprocam.pictures.preprocess import Preprocess
from vit_reciprocam.pictures.render import overlay

__all__ = ["Example", "Overlay", "Section", "agreement", "choose", "sections"]

_LONGER_SIDE = 224  # most pixels along a side of a picture on the page
_JPEG_QUALITY = 82
_GREY = "#8c8f96"
_FLAT = 1e-6  # a centred map with a smaller norm is constant


@dataclass(frozen=True)
class Overlay:
    """A picture under one method's map, as a data URI, with the picture's own ADCC in percent."""

    method: str
    is_null: bool
    adcc: float
    uri: str


@dataclass(frozen=True)
class Example:
    """One picture: as the model saw it, and under the map of each method.

    Attributes:
        name: Name of its file or scene.
        words: Class that is explained, and the class that the model predicts.
        problem: Reason why it cannot be shown, or "".
        uri: Data URI of the picture.
        overlays: Overlays, one per method.
        size: Width and height of all of them in pixels.
    """

    name: str
    words: str
    problem: str
    uri: str
    overlays: tuple[Overlay, ...]
    size: tuple[int, int]


@dataclass(frozen=True)
class Section:
    """Pictures chosen for one reason."""

    title: str
    words: str
    pictures: tuple[Example, ...]


def sections(table: Table, model: ModelRows, *, count: int = 4) -> list[Section]:
    """Return the sections of a model in a table, each with at most `count` pictures, drawn."""
    chosen = choose(table, model, count)
    painter = _Painter(table, model, {index for indices in chosen.values() for index in indices})
    words = {
        "Best": f"Highest ADCC of {model.reference}.",
        "Worst": f"Lowest ADCC of {model.reference}.",
        "Most disputed": "Lowest mean correlation between the maps of the methods that explain.",
    }
    return [
        Section(title, words[title], tuple(map(painter.draw, indices)))
        for title, indices in chosen.items()
        if indices
    ]


def choose(table: Table, model: ModelRows, count: int = 4) -> dict[str, list[int]]:
    """Return the indices of the best, the worst and the most disputed pictures of a model.

    They are chosen among the pictures that every method was measured on, the best and the worst by
    the reference method's ADCC, and no picture is both.
    """
    indices = _find_common(table, model)
    if not len(indices):
        return {}
    run = table.run_of(model.model, model.reference)
    columns = columns_of(run.records, model.model, model.reference)
    adcc = columns["adcc"][np.isin(columns["index"], indices)]
    ranked = indices[np.argsort(-adcc, kind="stable")].tolist()
    found = {"Best": ranked[:count], "Worst": ranked[count:][::-1][:count]}
    maps = [_read_maps(table, model, row.method, indices) for row in model.rows if not row.is_null]
    same_grid = [each for each in maps if each.shape == maps[0].shape]
    if len(same_grid) > 1:
        disputed = np.argsort(agreement(same_grid), kind="stable")[:count]
        found["Most disputed"] = indices[disputed].tolist()
    return found


def agreement(maps: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean Pearson correlation (pictures,) over all pairs of methods.

    There is one array of maps (pictures, cells) per method, and two methods or more. A constant map
    correlates 0. With u_m the centred map of method m as a unit vector, the sum over pairs is
    (|Σ u_m|² - Σ |u_m|²) / 2.
    """
    units = []
    for each in maps:
        centred = each - each.mean(axis=1, keepdims=True, dtype=np.float64)
        norm = np.linalg.norm(centred, axis=1, keepdims=True)
        units.append(np.divide(centred, norm, out=np.zeros_like(centred), where=norm > _FLAT))
    total = sum(units)
    own = sum((unit**2).sum(axis=1) for unit in units)
    return np.asarray(((total**2).sum(axis=1) - own) / (len(maps) * (len(maps) - 1)))


def _find_common(table: Table, model: ModelRows) -> np.ndarray:
    """Return the indices of the pictures that every method was measured on, sorted."""
    each = [
        records_of(table.run_of(model.model, row.method).records, model.model, row.method)
        for row in model.rows
    ]
    common = set.intersection(*(set(one["index"].to_pylist()) for one in each))
    return np.array(sorted(common), np.int64)


def _read_maps(table: Table, model: ModelRows, method: str, indices: np.ndarray) -> np.ndarray:
    """Return one method's maps of some pictures, (pictures, cells)."""
    records = records_of(table.run_of(model.model, method).records, model.model, method)
    records = _choose_pictures(records, indices)
    values = records["map"].combine_chunks().flatten().to_numpy()
    return np.asarray(values.reshape(len(indices), -1))


def _choose_pictures(records: pyarrow.Table, indices: Collection[int]) -> pyarrow.Table:
    wanted = pyarrow.array(indices, pyarrow.int64())
    return records.filter(pyarrow.compute.is_in(records["index"], wanted))


def _records(
    table: Table, model: ModelRows, indices: Collection[int]
) -> dict[tuple[str, int], dict[str, Any]]:
    """Return (method, index) -> record of some pictures."""
    found = {}
    for run in table.runs:
        for record in _choose_pictures(records_of(run.records, model.model), indices).to_pylist():
            found[record["method"], record["index"]] = record
    return found


class _Painter:
    """Draws a model's pictures, each of them once."""

    def __init__(self, table: Table, model: ModelRows, indices: set[int]) -> None:
        run = table.run_of(model.model, model.reference)
        about = run.settings["models"][model.model]
        self.model = model
        self.records = _records(table, model, indices)
        self.preprocess = run.protocol.preprocess(Preprocess.from_dict(about["preprocess"]))
        self.class_names: Sequence[str] | None = about.get("class_names")
        self.done: dict[int, Example] = {}

    def draw(self, index: int) -> Example:
        """Return a picture, drawn now or earlier."""
        if index not in self.done:
            self.done[index] = self._draw(index)
        return self.done[index]

    def _draw(self, index: int) -> Example:
        records = {row.method: self.records[row.method, index] for row in self.model.rows}
        about = records[self.model.reference]
        problem, picture = "", None
        try:
            picture = _read(about)
        except (ImageError, OSError) as error:
            problem = str(error)
        view = None if picture is None else self.preprocess.view(picture)
        height, width = self.preprocess.size
        scale = min(1, _LONGER_SIDE / max(height, width))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        grey = _uri(Image.new("RGB", size, _GREY))

        def draw(record: Mapping[str, Any] | None) -> str:
            if view is None:
                return grey
            if record is None:
                return _uri(view.resize(size))
            saliency = np.array(record["map"], np.float32).reshape(record["rows"], -1)
            return _uri(overlay(view, saliency).resize(size))

        overlays = [
            Overlay(row.method, row.is_null, 100 * record["adcc"], draw(record))
            for row, record in zip(self.model.rows, records.values(), strict=True)
        ]
        name = "/".join(PurePath(about["source"]).parts[-2:])
        return Example(name, self._words(about), problem, draw(None), tuple(overlays), size)

    def _words(self, about: Mapping[str, Any]) -> str:
        target, label, predicted = about["target"], about["label"], about["predicted"]
        words = f"Explained: {self._class_name(target)}, probability {100 * about['p']:.1f} %"
        if label is not None and label != target:
            words += f"; true class: {self._class_name(label)}"
        if predicted != target:
            words += f"; predicted: {self._class_name(predicted)}"
        return f"{words}."

    def _class_name(self, index: int) -> str:
        if self.class_names is None:
            return f"class {index}"
        return self.class_names[index].split(",")[0]


def _read(about: Mapping[str, Any]) -> Image.Image:
    """Read the picture of a record, and refuse it if it has changed."""
    picture = Item(about["index"], about["source"]).read()
    if picture_digest(picture) != about["digest"]:
        raise ImageError(f"{about['source']} is not the picture that was measured: it has changed")
    return picture


def _uri(picture: Image.Image) -> str:
    sink = io.BytesIO()
    picture.save(sink, format="JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(sink.getvalue()).decode()}"
