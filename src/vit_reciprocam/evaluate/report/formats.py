"""Sheets as Markdown and LaTeX, and tables as CSV."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from vit_reciprocam.evaluate.metrics.registry import METRICS
from vit_reciprocam.evaluate.report.bootstrap import Estimate
from vit_reciprocam.evaluate.report.sheets import (
    Cell,
    Sheet,
    ablations,
    full_provenance,
    heading,
    provenance,
)
from vit_reciprocam.evaluate.report.tables import ModelRows, Table
from vit_reciprocam.results.files import csv_text, markdown_row

__all__ = ["ablation_csv", "figures_csv", "latex", "markdown"]

_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "−": "$-$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    **{sign: f"\\{sign}" for sign in "&%$#_"},
}

_WITH_INTERVAL = (
    r"\providecommand{\withinterval}[2]"
    r"{\begin{tabular}[t]{@{}r@{}}#1\\[-2pt]{\tiny #2}\end{tabular}}"
)


# --- Markdown --------------------------------------------------------------------------------


def markdown(table: Table, sheets: Sequence[Sheet], notes: Iterable[str]) -> str:
    """Return sheets as Markdown, each followed by the origin of its figures, and then the notes."""
    text = [f"## {_escape(heading(table))}", ""]
    for sheet in sheets:
        empty = [""] * (len(sheet.columns) - 1)
        text += [f"### {sheet.title}", "", f"{sheet.caption}.", "", markdown_row(sheet.columns)]
        text.append(markdown_row([":--", *("--:" for _ in empty)]))
        for block in sheet.blocks:
            text.append(markdown_row([f"*{_escape(block.heading)}*", *empty]))
            text += [
                markdown_row([_escape(line.name), *map(_markdown_cell, line.cells)])
                for line in block.lines
            ]
        text += ["", _escape(provenance(table)), ""]
    text += [f"- {_escape(note)}" for note in notes]
    return "\n".join(text) + "\n"


def _markdown_cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    return f"**{cell.value}** {cell.interval}" if cell.best else f"{cell.value} {cell.interval}"


def _escape(text: str) -> str:
    """Return text with Markdown's marks escaped."""
    text = re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # inside a word _ is not a mark


# --- LaTeX -----------------------------------------------------------------------------------


def latex(table: Table, sheets: Sequence[Sheet], notes: Iterable[str]) -> str:
    """Return sheets as floats for a document with booktabs and graphicx, provenance in comments."""
    text = ["% needs \\usepackage{booktabs,graphicx}", _WITH_INTERVAL]
    text += [f"% {name}: {' '.join(value.split())}" for name, value in full_provenance(table)]
    text += [f"% {' '.join(note.split())}" for note in notes]
    for sheet in sheets:
        width = len(sheet.columns)
        text += [
            "\\begin{table*}[t]",
            "\\centering\\small",
            f"\\caption{{{_tex(sheet.caption)}.}}",
            "\\resizebox{\\ifdim\\width>\\textwidth\\textwidth\\else\\width\\fi}{!}{%",
            f"\\begin{{tabular}}{{l{'r' * (width - 1)}}}",
            "\\toprule",
            " & ".join(map(_tex, sheet.columns)) + r" \\",
        ]
        for block in sheet.blocks:
            text += [
                "\\midrule",
                f"\\multicolumn{{{width}}}{{l}}{{\\textit{{{_tex(block.heading)}}}}} \\\\",
            ]
            text += [
                " & ".join([_tex(line.name), *map(_tex_cell, line.cells)]) + r" \\"
                for line in block.lines
            ]
        text += ["\\bottomrule", "\\end{tabular}}"]
        text += [f"\\par\\smallskip\\footnotesize {_tex(provenance(table))}.", "\\end{table*}", ""]
    return "\n".join(text) + "\n"


def _tex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(text.split()))


def _tex_cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    value = f"\\textbf{{{_tex(cell.value)}}}" if cell.best else _tex(cell.value)
    return f"\\withinterval{{{value}}}{{{_tex(cell.interval)}}}"


# --- CSV -------------------------------------------------------------------------------------


def figures_csv(tables: Sequence[Table]) -> str:
    """Return a CSV file with one line per method and model, its provenance and its figures."""
    rows = [
        {
            **origin,
            "method": row.method,
            "null_baseline": str(row.is_null).lower(),
            "images": row.images,
            "reference": model.reference,
            "paired_images": model.paired.pictures if model.paired else 0,
            **_columns(row.figures),
            **_columns(row.differences, "_difference"),
        }
        for model, origin in _models(tables)
        for row in model.rows
    ]
    return _csv(rows, ("", "_difference"))


def ablation_csv(tables: Sequence[Table]) -> str:
    """Return a CSV file with one line per ablation: variant, default and their difference."""
    rows = [
        {
            **origin,
            "setting": pair.setting,
            "method": pair.variant.method,
            "reference": pair.base.method,
            "paired_images": model.paired.pictures if model.paired else 0,
            **_columns(pair.variant.figures),
            **_columns(pair.base.figures, "_reference"),
            **_columns(pair.differences, "_difference"),
        }
        for model, origin in _models(tables)
        for pair in ablations(model)
    ]
    return _csv(rows, ("", "_reference", "_difference"))


def _models(tables: Sequence[Table]) -> Iterator[tuple[ModelRows, dict[str, Any]]]:
    """Yield each model with the columns that say where its figures come from."""
    for place, table in enumerate(tables, 1):
        data = table.runs[0].settings["data"]
        versions = [
            " ".join(f"{name}={version}" for name, version in run.settings["versions"].items())
            for run in table.runs
        ]
        for model in table.models:
            origin = {
                "table": place,
                "unit": "percent",
                "protocol": table.runs[0].protocol.name,
                "data": data["name"],
                "data_digest": data["digest"],
                "data_pictures": data["pictures"],
                "resamples": table.resamples,
                "seed": table.seed,
                "versions": "; ".join(dict.fromkeys(versions)),
                "model": model.model,
                "weights": model.weights,
            }
            yield model, origin


def _columns(figures: Mapping[str, Estimate], kind: str = "") -> dict[str, float]:
    """Return three columns per metric, its value and the ends of its interval."""
    columns: dict[str, float] = {}
    for metric, one in figures.items():
        name = f"{metric}{kind}"
        columns |= {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
    return columns


def _csv(rows: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> str:
    figures = [
        f"{name}{kind}{end}" for name in METRICS for kind in kinds for end in ("", "_low", "_high")
    ]
    used = dict.fromkeys(key for row in rows for key in row)
    names = [key for key in used if key not in figures] + [key for key in figures if key in used]
    return csv_text(rows, names)
