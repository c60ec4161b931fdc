"""`vit-reciprocam models`: what is supported, by which path, and the check of it."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.padding import Padding
from rich.table import Column, Table

from vit_reciprocam.classifier import describe_timm, timm_names
from vit_reciprocam.cli.parts import AsJson, Debug, err, errors_in_one_line, out, progress
from vit_reciprocam.errors import InputError, MissingDependencyError
from vit_reciprocam.files import write_atomically

NAMES_SHOWN = 3


def models_command(
    pattern: Annotated[
        str, typer.Argument(help="Names to look at, such as 'deit*' or 'vit_base*'.")
    ] = "*",
    check: Annotated[
        bool, typer.Option("--check", help="Compare each with the naive loop, random weights.")
    ] = False,
    destination: Annotated[
        Path | None, typer.Option("--out", help="With --check, a file for its table.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the models that can be explained.

    By which path, and why others cannot. timm models are built without weights or memory to find
    out; all of them take about half a minute. The table has those that can be explained; --json has
    every name with its reason.
    """
    if check:
        _check_models(pattern, destination, as_json, debug)
        return
    with errors_in_one_line(debug):
        rows = []
        if fnmatch.fnmatch("demo", pattern):
            rows.append({"model": "demo", "path": "closed-form", "why": ""})
        try:
            names = [] if pattern == "demo" else timm_names(pattern)
        except MissingDependencyError as error:
            if not rows:
                raise
            names = []
            err.print(str(error), highlight=False, soft_wrap=True, markup=False)
        for name in progress(names, "Looking"):
            path, why = describe_timm(name)
            rows.append({"model": f"timm:{name}", "path": path, "why": why})
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(Column("model", overflow="fold"), "path")
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        if row["path"] != "-":
            table.add_row(escape(row["model"]), row["path"])
        if row["why"]:
            reasons[row["path"], row["why"]].append(row["model"])
    if table.rows:
        out.print(table)
    for (path, why), fitting in sorted(reasons.items(), key=lambda item: item[0][0] == "-"):
        verdict = "not supported" if path == "-" else path
        more = ", … (--json lists all)" if len(fitting) > NAMES_SHOWN else ""
        shown = ", ".join(fitting[:NAMES_SHOWN]) + more
        out.print(f"[bold]{verdict}[/bold], {len(fitting)}: {escape(why)}", highlight=False)
        out.print(Padding(escape(shown), (0, 0, 0, 4)), highlight=False)


def _check_models(pattern: str, file: Path | None, as_json: bool, debug: bool) -> None:
    with errors_in_one_line(debug):
        try:
            from vit_reciprocam import checks
        except ModuleNotFoundError as error:
            raise MissingDependencyError("models --check", "torch") from error
        found = list(checks.architectures(pattern))
        if not found:
            raise InputError(f"no architecture of the installed libraries fits {pattern!r}")
        results = [checks.check(one) for one in progress(found, "Checking")]
        if file is not None:
            write_atomically(file, (checks.HEAD + checks.report(results)).encode())
        everything = [dataclasses.asdict(one) for one in results]
        typer.echo(json.dumps(everything, indent=2) if as_json else checks.report(results))
    if any(one.status in ("DIFFERENT", "failed") for one in results):
        raise typer.Exit(1)
