"""Sheets of a report: the paper's tables as cells, and the sentences that stand under them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from vit_reciprocam.evaluate.metrics.registry import METRICS
from vit_reciprocam.evaluate.report.bootstrap import Estimate
from vit_reciprocam.evaluate.report.tables import DEFAULTS, ModelRows, Row, Table
from vit_reciprocam.methods.null import NULLS

__all__ = [
    "Ablation",
    "Block",
    "Cell",
    "Line",
    "Sheet",
    "ablation_sheets",
    "ablations",
    "difference_sheet",
    "figure_sheet",
    "findings",
    "full_provenance",
    "heading",
    "how_to_read",
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


@dataclass(frozen=True)
class Cell:
    """A figure or a difference of a table.

    Attributes:
        estimate: Value and interval.
        signed: Whether it is a difference, which is shown with its sign.
        best: Whether it is marked as best.
    """

    estimate: Estimate
    signed: bool = False
    best: bool = False


@dataclass(frozen=True)
class Line:
    """A method's cells, one per metric; None if it was not measured."""

    name: str
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class Block:
    """Lines under a heading, set apart from the block before by a rule."""

    heading: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Sheet:
    """A table as it is shown, whatever the format.

    Attributes:
        title: Its name.
        caption: What it shows.
        metrics: Names of `METRICS`, one per column.
        blocks: Its lines.
    """

    title: str
    caption: str
    metrics: tuple[str, ...]
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Ablation:
    """Two rows of ReciproCAM that differ in one setting.

    Attributes:
        setting: Name of the setting.
        others: The kernel, and those further settings of both rows that are not the paper's.
        base: Row with the setting as the paper has it.
        variant: Row with another value.
        differences: Metric -> variant minus base, paired.
    """

    setting: str
    others: Mapping[str, Any]
    base: Row
    variant: Row
    differences: Mapping[str, Estimate]


def figure_sheet(table: Table) -> Sheet:
    """Return the paper's Table 1: the methods of each model, null baselines below a rule."""
    names = tuple(table.metrics)
    blocks = []
    for model in table.models:
        same = len({row.images for row in model.rows}) == 1
        count = f" ({model.rows[0].images} pictures)" if same else ""
        lines: dict[bool, list[Line]] = {False: [], True: []}  # by whether it is a null baseline
        for row in model.rows:
            cells = tuple(
                Cell(row.figures[name], best=name in row.best) if name in row.figures else None
                for name in names
            )
            title = row.method if same else f"{row.method} ({row.images} pictures)"
            lines[row.is_null].append(Line(title, cells))
        blocks += _blocks(f"{model.model}{count}", lines)
    return Sheet("Table 1", "Figures of each method, in percent", names, tuple(blocks))


def difference_sheet(table: Table) -> Sheet | None:
    """Return each method's figures minus the reference's; None if there is only the reference."""
    names = tuple(table.metrics)
    blocks = []
    for model in table.models:
        lines: dict[bool, list[Line]] = {False: [], True: []}  # by whether it is a null baseline
        for row in model.rows:
            if row.differences:
                lines[row.is_null].append(Line(row.method, _differences(row.differences, names)))
        blocks += _blocks(f"{model.model}, minus {model.reference}", lines)
    if not blocks:
        return None
    caption = "Differences to the reference method on the same pictures, in percentage points"
    return Sheet("Table 1, differences", caption, names, tuple(blocks))


def _blocks(heading: str, lines: Mapping[bool, Sequence[Line]]) -> list[Block]:
    real, null = tuple(lines[False]), tuple(lines[True])
    if not real:
        return [Block(f"{heading}: {_NULL_HEADING}", null)] if null else []
    return [Block(heading, real), *([Block(_NULL_HEADING, null)] if null else [])]


def _differences(found: Mapping[str, Estimate], names: Sequence[str]) -> tuple[Cell | None, ...]:
    return tuple(Cell(found[name], signed=True) if name in found else None for name in names)


# --- ablations -------------------------------------------------------------------------------


def ablations(model: ModelRows) -> list[Ablation]:
    """Return the pairs of ReciproCAM's rows that differ in one setting.

    One row of each pair has that setting as the paper has it.
    """
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
    names = tuple(table.metrics)
    pairs = [(model.model, pair) for model in table.models for pair in ablations(model)]
    sheets = []
    for setting in _TITLES:
        blocks = []
        for model, pair in pairs:
            if pair.setting != setting:
                continue
            base, variant = (
                Line(
                    _spell({setting: row.settings.get(setting, DEFAULTS[setting])}) + note,
                    tuple(Cell(row.figures[n]) if n in row.figures else None for n in names),
                )
                for row, note in ((pair.base, " (default)"), (pair.variant, ""))
            )
            change = Line("difference", _differences(pair.differences, names))
            title = ", ".join(filter(None, [model, _spell(pair.others)]))
            blocks.append(Block(title, (base, variant, change)))
        if blocks:
            caption = f"ReciproCAM with another {setting.replace('_', ' ')}, in percent"
            sheets.append(Sheet(_TITLES[setting], caption, names, tuple(blocks)))
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
    return ", ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in sorted(settings.items())
    )


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
    for metric in sorted(
        METRICS, key=lambda name: name != "adcc"
    ):  # ADCC combines others, so it is first
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
