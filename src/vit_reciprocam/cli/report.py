"""`vit-reciprocam report`: tables and a page from runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from vit_reciprocam.cli import options
from vit_reciprocam.cli.console import err, errors_in_one_line, out
from vit_reciprocam.errors import MissingDependencyError

__all__ = ["report_command"]


def report_command(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Folders that vit-reciprocam evaluate wrote."),
    ],
    destination: options.Out = Path("vit-reciprocam-report"),
    resamples: Annotated[
        int, typer.Option(min=1, help="Number of bootstrap resamples behind each interval.")
    ] = 1000,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Make tables and a page from runs.

    The tables are written as Markdown, LaTeX and CSV, and the page is one self-contained HTML file.
    Runs of one protocol on the same pictures share a table; others get a table of their own. A run
    that is not finished is reported as far as it got. Run this in the folder where evaluate ran, so
    that the page can show the pictures.

    Exit code 0: the report is written. 2: nothing could be done.
    """
    with errors_in_one_line(debug):
        try:
            from vit_reciprocam.evaluate.report import write as report
        except ModuleNotFoundError as error:
            raise MissingDependencyError("report", "evaluate") from error
        with err.status("Making the report"):
            about = report.write_report(runs, destination, resamples=resamples)
        if as_json:
            typer.echo(json.dumps({"out": str(destination), **about}))
            return
        typer.echo((destination / "table1.md").read_text(encoding="utf-8"))
        page = escape(str(destination / report.PAGE))
        out.print(f"page: [bold]{page}[/bold]", soft_wrap=True)
