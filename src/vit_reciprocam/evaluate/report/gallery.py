"""What a report's page shows beside its tables: plots, and pictures under the methods' maps."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pyarrow.compute
from matplotlib.figure import Figure
from PIL import Image

from vit_reciprocam.errors import ImageError
from vit_reciprocam.evaluate.data.datasets import Item, picture_digest
from vit_reciprocam.evaluate.metrics.registry import METRICS
from vit_reciprocam.evaluate.report.tables import ModelRows, Row
from vit_reciprocam.evaluate.store import columns_of, records_of
from vit_reciprocam.pictures.preprocess import Preprocess
from vit_reciprocam.pictures.render import overlay

__all__ = ["agreement", "choose", "difference_plot", "distribution_plot", "sections"]

_LONGER_SIDE = 224  # most pixels along a side of a picture on the page
_JPEG_QUALITY = 82
_GREY = "#8c8f96"
_FLAT = 1e-6  # a centred map with a smaller norm is constant

# --- plots, as SVG that takes its colours from the page --------------------------------------

_WIDTH = 4.6  # inches of 72 points: as wide as a phone's screen
_ROW = 0.46
_MARGIN = 0.55
_BINS = 40
# These stand-in colours become the page's own, which differ in light and dark.
_PAGE = {"#010101": "currentColor", "#010102": "var(--real)", "#010103": "var(--null)"}
_INK, _REAL, _NULL = _PAGE
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vit-reciprocam",
    "font.size": 10,
    "text.parse_math": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
}


def difference_plot(model: ModelRows, metric: str, *, key: str) -> str:
    """Return an SVG of the differences to the reference on one metric; "" if there are none.

    The key keeps the names in this SVG different from those in others.
    """
    rows = [row for row in model.rows if metric in row.differences]
    if not rows:
        return ""
    figure, axes = _axes(rows)
    for place, row in enumerate(rows):
        one = row.differences[metric]
        colour = _NULL if row.is_null else _REAL
        axes.plot([one.low, one.high], [-place, -place], color=colour, lw=2.5)
        axes.plot(one.value, -place, "o", color=colour, ms=6)
    axes.axvline(0, color=_INK, lw=0.8)
    axes.set_xlabel(f"{METRICS[metric].heading} minus the reference's, percentage points")
    return _svg(figure, key)


def distribution_plot(model: ModelRows, metric: str, *, key: str) -> str:
    """Return an SVG with each method's histogram and median of a metric that all pictures have."""
    figure, axes = _axes(model.rows)
    edges = np.linspace(0, 100, _BINS + 1)
    for place, row in enumerate(model.rows):
        values = 100 * columns_of(row.run.records, model.model, row.method)[metric]
        counts, _ = np.histogram(values.clip(0, 100), edges)
        heights = 0.55 * counts / counts.max()
        colour = _NULL if row.is_null else _REAL
        base = -place - 0.28
        axes.stairs(base + heights, edges, baseline=base, fill=True, color=colour, alpha=0.75)
        axes.plot([0, 100], [base, base], color=colour, lw=0.8)
        axes.plot([np.median(values)] * 2, [base, base + 0.55], color=_INK, lw=1.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"{METRICS[metric].heading} of a picture, percent")
    return _svg(figure, key)


def _axes(rows: Sequence[Row]) -> tuple[Figure, Any]:
    """Return a figure and its axes, which have a row per method under the method's name."""
    with matplotlib.rc_context(_STYLE):
        height = _ROW * len(rows) + _MARGIN
        figure = Figure(figsize=(_WIDTH, height))
        bottom = _MARGIN / height
        axes = figure.add_axes((0.03, bottom, 0.94, 1 - bottom))
        axes.spines[["left", "top", "right"]].set_visible(False)
        axes.yaxis.set_visible(False)
        axes.set_ylim(-len(rows) + 0.45, 0.75)
        for place, row in enumerate(rows):
            at = axes.get_yaxis_transform()
            axes.text(0, -place + 0.42, row.method, transform=at, va="center", fontsize=9)
        return figure, axes


def _svg(figure: Figure, key: str) -> str:
    sink = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        unset = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(sink, format="svg", transparent=True, metadata=unset)
    text = sink.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = text[text.index("<svg") :]
    text = re.sub(r' (width|height)="[\d.]+pt"| xmlns(:xlink)?="[^"]*"', "", text, count=4)
    text = text.replace("xlink:href", "href")  # as in HTML
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{key}-", text)
    for colour, page in _PAGE.items():
        text = text.replace(colour, page)
    return text.strip()


# --- pictures: the best, the worst, and those on which methods disagree most ------------------


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
    records = {name: _choose(each, wanted).to_pylist() for name, each in _records(model).items()}
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
    if np.isnan(adcc).all():
        return {}  # a run of mosaics
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
