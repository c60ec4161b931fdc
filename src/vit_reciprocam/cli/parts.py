"""What the commands share: the two consoles, errors in one line, progress, common options."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vit_reciprocam.errors import ReciproCAMError
from vit_reciprocam.render import COLORMAPS

out = Console()
err = Console(stderr=True)

T = TypeVar("T")
DEFAULT_MODEL = "timm:deit_tiny_patch16_224"
DEFAULT_OUT = Path("vit-reciprocam-out")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results.")]
UseColormap = Annotated[str, typer.Option("--colormap", help=f"One of {', '.join(COLORMAPS)}.")]


@contextlib.contextmanager
def errors_in_one_line(debug: bool) -> Iterator[None]:
    """Bad input ends with one line and exit code 2, anything else, as a full disk, with 3."""
    try:
        yield
    except Exception as error:
        if debug:
            err.print_exception()
        expected = isinstance(error, ReciproCAMError)
        where = (
            "" if expected or isinstance(error, OSError) else " (unexpected: --debug shows where)"
        )
        text = str(error) or type(error).__name__
        err.print(f"[red]error:[/red] {escape(text + where)}", highlight=False, soft_wrap=True)
        raise typer.Exit(2 if expected else 3) from error


def progress(items: Sequence[T], what: str) -> Iterator[T]:
    """The items, with a bar on stderr where there are several."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = len(items) < 2 or not err.is_terminal
    with Progress(*columns, console=err, disable=hidden, transient=True) as bar:
        yield from bar.track(items)
