"""Pictures of a report: the best, the worst, and those on which methods disagree most."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute
from PIL import Image

from vit_reciprocam.errors import ImageError
from vit_reciprocam.evaluate.data.datasets import Item, picture_digest
from vit_reciprocam.evaluate.report.tables import ModelRows
from vit_reciprocam.evaluate.store import records_of
from vit_reciprocam.pictures.preprocess import Preprocess
from vit_reciprocam.pictures.render import overlay

__all__ = ["agreement", "choose", "sections"]

_LONGER_SIDE = 224  # most pixels along a side of a picture on the page
_JPEG_QUALITY = 82
_GREY = "#8c8f96"
_FLAT = 1e-6  # a centred map with a smaller norm is constant


class Overlay(NamedTuple):
    """A picture under one method's map, as a data URI, with the picture's own ADCC in percent."""

    method: str
    is_null: bool
    adcc: float
    uri: str


class Example(NamedTuple):
    """One picture: as the model saw it, and under the map of each method."""

    name: str  # its file or scene
    words: str  # the class that is explained, and the one that the model predicts
    problem: str  # why it cannot be shown, or ""
    uri: str
    overlays: list[Overlay]
    size: tuple[int, int]  # width and height of all of them in pixels


class Section(NamedTuple):
    """Pictures chosen for one reason."""

    title: str
    words: str
    pictures: list[Example]


def sections(model: ModelRows, *, count: int = 4) -> list[Section]:
    """Return the sections of a model, each with at most `count` pictures, drawn."""
    chosen = choose(model, count)
    wanted = sorted({index for indices in chosen.values() for index in indices})
    run = next(row.run for row in model.rows if row.method == model.reference)
    about = run.settings["models"][model.model]
    preprocess = run.protocol.preprocess(Preprocess.from_dict(about["preprocess"]))
    records = {
        method: _choose(each, wanted).to_pylist() for method, each in _records(model).items()
    }
    drawn = {  # every method has records of these pictures, in the order of their indices
        index: _draw(
            model,
            {method: each[row] for method, each in records.items()},
            preprocess,
            about.get("class_names"),
        )
        for row, index in enumerate(wanted)
    }
    words = {
        "Best": f"Highest ADCC of {model.reference}.",
        "Worst": f"Lowest ADCC of {model.reference}.",
        "Most disputed": "Lowest mean correlation between the maps of the methods that explain.",
    }
    return [
        Section(title, words[title], [drawn[index] for index in indices])
        for title, indices in chosen.items()
        if indices
    ]


def choose(model: ModelRows, count: int = 4) -> dict[str, list[int]]:
    """Return the indices of the best, the worst and the most disputed pictures of a model.

    They are chosen among the pictures that every method was measured on, the best and the worst by
    the reference method's ADCC, and no picture is both.
    """
    records = _records(model)
    common = set.intersection(*(set(each["index"].to_pylist()) for each in records.values()))
    if not common:
        return {}
    indices = np.array(sorted(common))
    records = {method: _choose(each, indices) for method, each in records.items()}
    adcc = records[model.reference]["adcc"].to_numpy()
    ranked = indices[np.argsort(-adcc, kind="stable")].tolist()
    found = {"Best": ranked[:count], "Worst": ranked[count:][::-1][:count]}
    maps = [_maps(records[row.method]) for row in model.rows if not row.is_null]
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


def _records(model: ModelRows) -> dict[str, pyarrow.Table]:
    """Return method -> records of the pictures that it was measured on, in their order."""
    return {row.method: records_of(row.run.records, model.model, row.method) for row in model.rows}


def _choose(records: pyarrow.Table, indices: Sequence[int] | np.ndarray) -> pyarrow.Table:
    """Return the records of some pictures."""
    wanted = pyarrow.array(indices, pyarrow.int64())
    return records.filter(pyarrow.compute.is_in(records["index"], wanted))


def _maps(records: pyarrow.Table) -> np.ndarray:
    """Return the maps of records, (pictures, cells)."""
    values = records["map"].combine_chunks().flatten().to_numpy()
    return np.asarray(values.reshape(records.num_rows, -1))


def _draw(
    model: ModelRows,
    records: Mapping[str, Mapping[str, Any]],
    preprocess: Preprocess,
    class_names: Sequence[str] | None,
) -> Example:
    """Draw a picture under each method's map, or grey areas if it cannot be read."""
    about = records[model.reference]
    problem, view = "", None
    try:
        view = preprocess.view(_read(about))
    except (ImageError, OSError) as error:
        problem = str(error)
    height, width = preprocess.size
    scale = min(1, _LONGER_SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    shown = Image.new("RGB", size, _GREY) if view is None else view.resize(size)
    overlays = []
    for row in model.rows:
        record, over = records[row.method], shown
        if view is not None:
            saliency = np.array(record["map"], np.float32).reshape(record["rows"], -1)
            over = overlay(view, saliency).resize(size)
        overlays.append(Overlay(row.method, row.is_null, 100 * record["adcc"], _uri(over)))
    name = "/".join(PurePath(about["source"]).parts[-2:])
    return Example(name, _describe(about, class_names), problem, _uri(shown), overlays, size)


def _describe(about: Mapping[str, Any], class_names: Sequence[str] | None) -> str:
    """Return the sentence on a picture's classes."""

    def name(index: int) -> str:
        return f"class {index}" if class_names is None else class_names[index].split(",")[0]

    target, label, predicted = about["target"], about["label"], about["predicted"]
    words = f"Explained: {name(target)}, probability {100 * about['p']:.1f} %"
    if label is not None and label != target:
        words += f"; true class: {name(label)}"
    if predicted != target:
        words += f"; predicted: {name(predicted)}"
    return f"{words}."


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
