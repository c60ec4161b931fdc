"""Write a report of runs: tables as Markdown, LaTeX and CSV, and one page that stands alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from vit_reciprocam.errors import InputError
from vit_reciprocam.evaluate.report import formats, gallery, sheets
from vit_reciprocam.evaluate.report.tables import ModelRows, Table, read_tables
from vit_reciprocam.evaluate.store import RUN
from vit_reciprocam.pictures.render import COLORMAPS
from vit_reciprocam.results.files import check_folder, write_folder

__all__ = ["PAGE", "make_report", "render_page", "write_report"]

PAGE = "report.html"
_DIFFERENCES = ("adcc", "insertion_minus_deletion", "gridpg")
_DISTRIBUTIONS = ("adcc", "drop", "coherency", "gridpg")


def write_report(
    runs: Sequence[str | Path], out: Path, *, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Read runs and write their report into a folder.

    Its files are table1 (all methods and models) and, if ReciproCAM was run with several settings,
    ablation, each as .md, .tex and .csv; report.html; and last manifest.json.

    Args:
        runs: Folders of `evaluate`, finished or not.
        out: Folder of the report; an earlier report in it is replaced.
        resamples: Number of resamples of the bootstrap.
        seed: Seed of the bootstrap.

    Returns:
        The manifest's description of the tables, and under "files" the names of the files.

    Raises:
        InputError: If a folder is not a run, nothing was measured, or `out` is a run or holds other
            files.
    """
    if (out / RUN).exists():
        raise InputError(f"{out} is a run: write the report to another folder")
    check_folder(out)
    tables = read_tables(runs, resamples=resamples, seed=seed)
    content = make_report(tables)
    about = {"tables": [_describe(table) for table in tables]}
    write_folder(out, content, about)
    return {**about, "files": sorted(content)}


def make_report(tables: Sequence[Table]) -> dict[str, bytes]:
    """Return the report's files as name -> content."""
    content = {PAGE: render_page(tables)}
    for name, make_sheets, make_csv in (
        ("table1", sheets.figure_sheets, formats.figures_csv),
        ("ablation", sheets.ablation_sheets, formats.ablation_csv),
    ):
        shown = [(table, made, notes(table)) for table in tables if (made := make_sheets(table))]
        if shown:
            content[f"{name}.md"] = "\n".join(formats.markdown(*one) for one in shown)
            content[f"{name}.tex"] = "\n".join(formats.latex(*one) for one in shown)
            content[f"{name}.csv"] = make_csv(tables)
    return {name: text.encode() for name, text in content.items()}


def notes(table: Table) -> list[str]:
    """Return all sentences about a table: what is missing, what stands out, how to read it."""
    return [*_missing(table), *sheets.findings(table), sheets.how_to_read(table)]


def _missing(table: Table) -> list[str]:
    """Return the sentences on what is missing in a table, and on why it stands apart."""
    of_models = [note for model in table.models for note in model.notes]
    return [*filter(None, [table.apart]), *table.notes, *of_models]


def render_page(tables: Sequence[Table]) -> str:
    """Return the HTML page: tables, plots and pictures, with no reference to anything outside."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["breakable"] = _breakable
    source = files("vit_reciprocam.evaluate.report") / "report.html.jinja"
    return environment.from_string(source.read_text("utf-8")).render(
        tables=[
            {
                "key": f"t{number}",
                "table": table,
                "heading": sheets.heading(table),
                "missing": _missing(table),
                "findings": sheets.findings(table),
                "sheets": sheets.figure_sheets(table),
                "ablations": sheets.ablation_sheets(table),
                "reading": sheets.how_to_read(table),
                "provenance": sheets.provenance(table),
                "details": sheets.full_provenance(table),
                "models": [
                    _illustrate(model, f"t{number}-{place}")
                    for place, model in enumerate(table.models)
                ],
            }
            for number, table in enumerate(tables, 1)
        ],
        legend=["#" + bytes(map(int, colour)).hex() for colour in COLORMAPS["viridis"]],
    )


def _illustrate(model: ModelRows, key: str) -> dict[str, Any]:
    drawn = [
        (metric, gallery.difference_plot(model, metric, key=f"{key}-{metric}-d"))
        for metric in _DIFFERENCES
    ]
    return {
        "model": model,
        "key": key,
        "differences": [(metric, Markup(svg)) for metric, svg in drawn if svg],
        "distributions": [
            (metric, Markup(gallery.distribution_plot(model, metric, key=f"{key}-{metric}")))
            for metric in _DISTRIBUTIONS
            if any(metric in row.figures for row in model.rows)
        ],
        "sections": gallery.sections(model),
    }


def _describe(table: Table) -> dict[str, Any]:
    """Return a table as plain JSON values."""
    return {
        "heading": sheets.heading(table),
        "provenance": sheets.full_provenance(table),
        "resamples": table.resamples,
        "seed": table.seed,
        "notes": notes(table),
        "models": [
            {
                "model": model.model,
                "weights": model.weights,
                "reference": model.reference,
                "paired_images": model.paired.pictures if model.paired else 0,
                "rows": [
                    {
                        "method": row.method,
                        "null_baseline": row.is_null,
                        "images": row.images,
                        "figures": {k: vars(v) for k, v in row.figures.items()},
                        "differences": {k: vars(v) for k, v in row.differences.items()},
                        "best": sorted(row.best),
                    }
                    for row in model.rows
                ],
            }
            for model in table.models
        ],
    }


def _breakable(text: str) -> Markup:
    """Return HTML of a long name with marks where a line may break."""
    return Markup("<wbr>").join(map(escape, re.split(r"(?<=[:,/_=])", text)))
