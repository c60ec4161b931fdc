"""`vit-reciprocam models`: what is supported, by which path, and the check of it."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.padding import Padding
from rich.table import Column, Table

from vit_reciprocam.cli.console import AsJson, Debug, err, errors_in_one_line, out, progress
from vit_reciprocam.errors import MissingDependencyError
from vit_reciprocam.results.files import write_atomically

__all__ = [
    "models_command",
]

NAMES_SHOWN = 3


def models_command(
    pattern: Annotated[
        str, typer.Argument(help="Names to look at, such as 'deit*' or 'torchvision:*'.")
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

    By which path, and why others cannot: transformers of timm, torchvision, open_clip (its image
    towers, for prompts) and transformers (its classes). They are built without weights or memory to
    find out; all of them take about a minute. The table has those that can be explained; --json has
    every name with its reason. Patterns find timm's other models too.
    """
    if check:
        _check_models(pattern, destination, as_json, debug)
        return
    with errors_in_one_line(debug):
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
        out.print(f"[bold]{verdict}[/bold], {len(fitting)}: {escape(why)}", highlight=False)
        out.print(Padding(escape(shown), (0, 0, 0, 4)), highlight=False)


def _rows(pattern: str) -> list[dict[str, str]]:
    rows = [{"model": "demo", "path": "closed-form", "why": ""}]
    if not fnmatch.fnmatch("demo", pattern):
        rows = []
    elif pattern == "demo":
        return rows
    try:
        others = _others(pattern)
        looks: list[tuple[str, Callable[[], tuple[str, str]]]] = [
            (f"timm:{name}", functools.partial(_describe_timm, name)) for name in _of_timm(pattern)
        ]
    except MissingDependencyError as error:
        if not rows:
            raise
        err.print(str(error), highlight=False, soft_wrap=True, markup=False)
        return rows
    for spec, describe in progress(looks + others, "Looking"):
        path, why = describe()
        rows.append({"model": spec, "path": path, "why": why})
    if not rows:
        from vit_reciprocam.libraries import listing as catalogue

        raise catalogue.nothing_fits(pattern)
    return rows


def _of_timm(pattern: str) -> list[str]:
    library, colon, name = pattern.partition(":")
    if colon and not fnmatch.fnmatch("timm", library):
        return []
    return _timm_names(name if colon else pattern)


def _others(pattern: str) -> list[tuple[str, Callable[[], tuple[str, str]]]]:
    """Those of the other libraries; for "*" only what goes by the name of a transformer."""
    try:
        from vit_reciprocam.libraries import listing as catalogue
    except ModuleNotFoundError as error:
        raise MissingDependencyError("listing models", "torch") from error
    return [
        (one.spec, functools.partial(catalogue.describe, one))
        for one in catalogue.architectures(pattern)
        if not one.spec.startswith("timm:") and (one.listed or pattern != "*")
    ]


def _check_models(pattern: str, file: Path | None, as_json: bool, debug: bool) -> None:
    with errors_in_one_line(debug, lambda: "nothing is written"):
        try:
            from vit_reciprocam.libraries import checks
            from vit_reciprocam.libraries import listing as catalogue
        except ModuleNotFoundError as error:
            raise MissingDependencyError("models --check", "torch") from error
        found = list(catalogue.architectures(pattern))
        if not found:
            raise catalogue.nothing_fits(pattern)
        results = [checks.check(one) for one in progress(found, "Checking")]
        if file is not None:
            write_atomically(file, (checks.head() + checks.report(results)).encode())
        everything = [dataclasses.asdict(one) for one in results]
        typer.echo(json.dumps(everything, indent=2) if as_json else checks.report(results))
    if any(one.status not in ("equal", "refused") for one in results):
        raise typer.Exit(1)


def _timm_names(pattern: str) -> list[str]:
    """Names of timm models that fit a pattern; for "*" those of its transformers.

    Raises:
        MissingDependencyError: If timm is not installed.
    """
    names: list[str] = _timm("listing timm's models").names(pattern)
    return names


def _describe_timm(name: str) -> tuple[str, str]:
    """By which path a timm model is explained, "-" if by none, and why not by the closed form."""
    path, why = _timm(name).describe(name)
    return path, why


def _timm(what: str) -> Any:
    try:
        from vit_reciprocam.libraries.timm import listing as timm
    except ModuleNotFoundError as error:
        raise MissingDependencyError(what, "torch") from error
    return timm
