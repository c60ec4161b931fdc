"""The plots of a report, as SVG that takes its colours from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from vit_reciprocam.evaluate.metrics.registry import METRICS
from vit_reciprocam.evaluate.report.tables import ModelRows, Row
from vit_reciprocam.evaluate.store import columns_of

__all__ = ["difference_plot", "distribution_plot"]

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
    """Return an SVG of each method's difference to the reference on one metric, with its interval.

    If there is no difference, return "". The key keeps the names in this SVG different from those
    in others.
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
    """Return an SVG with the histogram and the median of one metric over pictures per method.

    Every picture must have the metric. The key is that of `difference_plot`.
    """
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
