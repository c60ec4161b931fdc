"""Sheets of a report: the paper's tables as cells, and the sentences that stand under them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from vit_reciprocam.core.settings import write_value
from vit_reciprocam.evaluate.metrics.registry import METRICS
from vit_reciprocam.evaluate.report.bootstrap import Estimate
from vit_reciprocam.evaluate.report.tables import DEFAULTS, ModelRows, Row, Table
from vit_reciprocam.methods.null import NULLS

__all__ = [
    "Cell",
    "Sheet",
    "ablation_sheets",
    "ablations",
    "figure_sheets",
    "findings",
    "full_provenance",
    "heading",
    "how_to_read",
    "number",
    "provenance",
]

_TITLES = {
    "class_token": "Class token (the paper's Table 3)",
    "layer": "Layer (the paper's Table 4)",
    "kernel": "Kernel",
    "score": "Score",
}
_SHOWN_DIGITS = 12  # a whole digest has 64
_NULL_HEADING = "null baselines, which explain nothing"


class Cell(NamedTuple):
    """A figure or a difference as it is shown, with its interval."""

    value: str
    interval: str
    best: bool  # whether it is marked as best
    clear: bool  # whether it is a difference that is clear


class Line(NamedTuple):
    """A method's cells, one per metric; None if it was not measured."""

    name: str
    cells: list[Cell | None]


class Block(NamedTuple):
    """Lines under a heading, set apart from the block before by a rule."""

    heading: str
    lines: list[Line]


class Sheet(NamedTuple):
    """A table as it is shown, whatever the format."""

    title: str
    caption: str
    columns: list[str]  # headings: the method's, then one per metric
    blocks: list[Block]


def number(value: float, signed: bool = False) -> str:
    """Return a number with two decimals, and a sign if `signed`; never −0.00."""
    shown = f"{value:+.2f}" if signed else f"{value:.2f}"
    if float(shown) == 0:
        shown = "0.00"
    return shown.replace("-", "−")


def figure_sheets(table: Table) -> list[Sheet]:
    """Return the paper's Table 1, and if there are differences to the reference, their sheet."""
    figures: list[Block] = []
    differences: list[Block] = []
    for model in table.models:
        same = len({row.images for row in model.rows}) == 1
        count = f" ({model.rows[0].images} pictures)" if same else ""
        lines = []
        for row in model.rows:
            name = row.method if same else f"{row.method} ({row.images} pictures)"
            lines.append(_line(name, row.figures, table.metrics, best=row.best))
        figures += _blocks(f"{model.model}{count}", model.rows, lines)
        others = [row for row in model.rows if row.differences]
        lines = [_line(row.method, row.differences, table.metrics, True) for row in others]
        differences += _blocks(f"{model.model}, minus {model.reference}", others, lines)
    columns = _columns(table)
    sheets = [Sheet("Table 1", "Figures of each method, in percent", columns, figures)]
    if differences:
        caption = "Differences to the reference method on the same pictures, in percentage points"
        sheets.append(Sheet("Table 1, differences", caption, columns, differences))
    return sheets


def _columns(table: Table) -> list[str]:
    return ["Method", *(METRICS[metric].heading_with_arrow for metric in table.metrics)]


def _line(
    name: str,
    found: Mapping[str, Estimate],
    metrics: Sequence[str],
    signed: bool = False,
    best: Collection[str] = (),
) -> Line:
    """Return a line of figures, or of differences if they are `signed`."""
    cells: list[Cell | None] = []
    for metric in metrics:
        one = found.get(metric)
        if one is None:
            cells.append(None)
            continue
        value, low, high = (number(each, signed) for each in (one.value, one.low, one.high))
        cells.append(Cell(value, f"[{low}, {high}]", metric in best, signed and one.is_clear))
    return Line(name, cells)


def _blocks(heading: str, rows: Sequence[Row], lines: Sequence[Line]) -> list[Block]:
    """Return the lines of rows as blocks: first methods that explain, then null baselines."""
    real = [line for row, line in zip(rows, lines, strict=True) if not row.is_null]
    null = [line for row, line in zip(rows, lines, strict=True) if row.is_null]
    null_heading = _NULL_HEADING if real else f"{heading}: {_NULL_HEADING}"
    return [block for block in (Block(heading, real), Block(null_heading, null)) if block.lines]


# --- ablations -------------------------------------------------------------------------------


class Ablation(NamedTuple):
    """Two rows of ReciproCAM that differ in one setting."""

    setting: str
    others: Mapping[str, Any]  # the kernel, and further settings of both that are not the paper's
    base: Row  # with the setting as the paper has it
    variant: Row
    differences: Mapping[str, Estimate]  # variant minus base, paired


def ablations(model: ModelRows) -> list[Ablation]:
    """Return the pairs of ReciproCAM's rows that differ in one setting."""
    rows = [row for row in model.rows if row.name == "reciprocam"]
    found = []
    for setting, default in DEFAULTS.items():
        for base in rows:
            if base.settings.get(setting, default) != default:
                continue
            others = _others(base, setting)
            for variant in rows:
                changed = variant.settings.get(setting, default) != default
                if changed and model.paired and _others(variant, setting) == others:
                    differences = model.paired.differences(variant.method, base.method)
                    found.append(Ablation(setting, others, base, variant, differences))
    return found


def ablation_sheets(table: Table) -> list[Sheet]:
    """Return sheets like the paper's Tables 3 and 4, one for each setting that was varied."""
    pairs = [(model.model, pair) for model in table.models for pair in ablations(model)]
    sheets = []
    for setting in _TITLES:
        blocks = []
        for model, pair in pairs:
            if pair.setting != setting:
                continue
            lines = []
            for row, note in ((pair.base, " (default)"), (pair.variant, "")):
                name = _spell({setting: row.settings.get(setting, DEFAULTS[setting])}) + note
                lines.append(_line(name, row.figures, table.metrics))
            lines.append(_line("difference", pair.differences, table.metrics, True))
            title = ", ".join(filter(None, [model, _spell(pair.others)]))
            blocks.append(Block(title, lines))
        if blocks:
            caption = f"ReciproCAM with another {setting.replace('_', ' ')}, in percent"
            sheets.append(Sheet(_TITLES[setting], caption, _columns(table), blocks))
    return sheets


def _others(row: Row, setting: str) -> dict[str, Any]:
    """Return the kernel of a row, and those further settings that are not the paper's."""
    return {
        key: value
        for key, value in {**DEFAULTS, **row.settings}.items()
        if key != setting and (key == "kernel" or DEFAULTS.get(key) != value)
    }


def _spell(settings: Mapping[str, Any]) -> str:
    """Return settings as they are given on the command line, such as "class_token=false"."""
    return ", ".join(f"{key}={write_value(value)}" for key, value in sorted(settings.items()))


# --- words -----------------------------------------------------------------------------------


def heading(table: Table) -> str:
    """Return the heading of a table: its protocol and data set."""
    data = table.runs[0].settings["data"]
    return f"Protocol {table.runs[0].protocol.name} on {PurePath(data['name']).name}"


def how_to_read(table: Table) -> str:
    """Return what intervals and bold figures mean."""
    return (
        "In brackets: 95 % bootstrap percentile intervals over pictures "
        f"({table.resamples} resamples, seed {table.seed}), each figure on its own. Differences "
        "are paired: every resample has the same pictures for all methods. Bold: the best method "
        "and those it is not clearly better than (0 is in the interval of their difference); "
        "nothing is bold if that is all of them. Null baselines are never marked."
    )


def findings(table: Table) -> list[str]:
    """Return sentences on the metrics on which a null baseline beats methods that explain."""
    found = []
    for model in table.models:
        where = f"{model.model}: " if len(table.models) > 1 else ""
        found += [where + sentence for sentence in _beaten(model)]
    if found:
        found.append(
            "A good figure on such a metric does not prove that a method explains: read it "
            "together with the others."
        )
    return found


def _beaten(model: ModelRows) -> list[str]:
    sentences = []
    for metric in dict.fromkeys(["adcc", *METRICS]):  # ADCC combines others, so it is first
        about = METRICS[metric]
        sign = 1 if about.higher else -1
        having = [row for row in model.rows if metric in row.figures]
        ranked = sorted(having, key=lambda row: -sign * row.figures[metric].value)
        nulls = [row for row in ranked if row.is_null]
        real = [row for row in ranked if not row.is_null]
        if not nulls or not real:
            continue
        value = nulls[0].figures[metric].value
        null = f"{nulls[0].method}, {NULLS[nulls[0].name].clause},"
        below = [row for row in real if sign * (value - row.figures[metric].value) > 0]
        if len(below) == len(real):
            top = real[0]
            sentences.append(
                f"{null} has the {'highest' if about.higher else 'lowest'} {about.heading}: "
                f"{value:.2f}. The best method that explains, {top.method}, has "
                f"{top.figures[metric].value:.2f}."
            )
        elif below:
            sentences.append(
                f"On {about.heading} {null} is better ({value:.2f}) "
                f"than {len(below)} of {len(real)} methods: "
                f"{', '.join(row.method for row in below)}."
            )
    return sentences


def provenance(table: Table) -> str:
    """Return the origin of the figures in one line."""
    settings = table.runs[0].settings
    data = settings["data"]
    weights = ", ".join(
        f"{one.model} (weights {one.weights[:_SHOWN_DIGITS]})" for one in table.models
    )
    versions = "; ".join(dict.fromkeys(_versions(run.settings) for run in table.runs))
    measured = max((row.images for one in table.models for row in one.rows), default=0)
    share = f"{measured} of " if measured < data["pictures"] else ""
    if "mosaic" in settings:
        share = "{0} cells of {n}x{n} mosaics of ".format(measured, n=settings["mosaic"]["n"])
    return (
        f"Protocol {settings['protocol']['name']}; {share}{data['pictures']} pictures of "
        f"{PurePath(data['name']).name} (digest {data['digest'][:_SHOWN_DIGITS]}); "
        f"{weights}; {versions}"
    )


def full_provenance(table: Table) -> list[tuple[str, str]]:
    """Return the origin of the figures in full, as names and values for each run."""
    protocol = table.runs[0].settings["protocol"]
    found = [("protocol", ", ".join(f"{key}={value}" for key, value in protocol.items()))]
    for run in table.runs:
        settings = run.settings
        data = settings["data"]
        found += [
            ("run", str(run.path)),
            ("data", f"{data['name']}, {data['pictures']} pictures, digest {data['digest']}"),
            ("pixels", settings.get("pixels", "the run is not finished")),
            ("methods", " ".join(settings["methods"])),
            *(
                (
                    "model",
                    f"{name}, weights {about['weights']}, preprocessing before the protocol's "
                    f"changes: {', '.join(f'{k}={v}' for k, v in about['preprocess'].items())}",
                )
                for name, about in settings["models"].items()
            ),
            ("versions", _versions(settings)),
        ]
    return found


def _versions(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
