"""`vit-reciprocam models`: list what is supported, and by which path."""

from __future__ import annotations

import fnmatch
import json
from collections import defaultdict
from typing import Annotated

import typer
from rich.markup import escape
from rich.padding import Padding
from rich.table import Column, Table

from vit_reciprocam.cli import options
from vit_reciprocam.cli.console import err, errors_in_one_line, out, progress
from vit_reciprocam.errors import InputError, MissingDependencyError

__all__ = ["models_command"]

NAMES_SHOWN = 3


def models_command(
    pattern: Annotated[
        str, typer.Argument(help="Names to look at, such as 'deit*' or 'torchvision:*'.")
    ] = "*",
    check: Annotated[
        bool, typer.Option("--check", hidden=True, help="Say where the check is.")
    ] = False,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """List the models that can be explained.

    The list says by which path each is explained, and why others cannot be. It has the Vision
    Transformers of timm, torchvision, open_clip (its image towers, for prompts) and transformers
    (its model classes), and with a pattern timm's other models too. Each is built, without weights
    or memory, to find out; all of them take about a minute. The table has the models that can be
    explained; --json has all, with reasons.
    """
    with errors_in_one_line(debug):
        if check:
            raise InputError(
                "--check has moved: run python tools/check_models.py 'PATTERN' in a clone of the "
                "repository"
            )
        rows = _rows(pattern)
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
        out.print(f"[bold]{verdict}[/bold], {len(fitting)}: {escape(why)}")
        out.print(Padding(escape(shown), (0, 0, 0, 4)))


def _rows(pattern: str) -> list[dict[str, str]]:
    """Return a row per model that fits the pattern; for "*" only of those listed by default."""
    rows = []
    if fnmatch.fnmatch("demo", pattern):
        rows = [{"model": "demo", "path": "closed-form", "why": ""}]
    if pattern == "demo":
        return rows
    try:
        from vit_reciprocam.libraries.listing import architectures, describe, nothing_fits
    except ModuleNotFoundError as error:
        missing = MissingDependencyError("listing models", "torch")
        if not rows:
            raise missing from error
        err.print(str(missing), soft_wrap=True, markup=False)
        return rows
    found = [one for one in architectures(pattern) if one.listed or pattern != "*"]
    for one in progress(found, "Looking"):
        path, why = describe(one)
        rows.append({"model": one.spec, "path": path, "why": why})
    if not rows:
        raise nothing_fits(pattern)
    return rows
