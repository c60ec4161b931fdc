"""Printing for the commands: two consoles, errors in one line, progress."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from vit_reciprocam.errors import ReciproCAMError

__all__ = [
    "command_line",
    "err",
    "errors_in_one_line",
    "out",
    "progress",
    "progress_bar",
    "say",
]

_PIPED = 160  # columns for a file or a pipe, which has no width; Rich would take 80
_width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPED
out = Console(width=_width, highlight=False)
err = Console(stderr=True, highlight=False)

T = TypeVar("T")


@contextlib.contextmanager
def errors_in_one_line(debug: bool, stopped: Callable[[], str] | None = None) -> Iterator[None]:
    """Turn errors into one line, with `debug` also a traceback, and an exit code.

    It is 2 for bad input, 130 for Ctrl-C, and 3 for anything else, such as a full disk. After
    Ctrl-C `stopped` returns what to print about the work so far.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        say("stopped", "" if stopped is None else stopped())
        raise typer.Exit(130) from interrupt
    except Exception as error:
        if debug:
            err.print_exception()
        expected = isinstance(error, ReciproCAMError)
        text = str(error) or type(error).__name__
        if not expected and not isinstance(error, OSError):
            text += " (unexpected: --debug shows where)"
        say("error", text)
        raise typer.Exit(2 if expected else 3) from error


def say(what: str, text: str) -> None:
    """Print a line on stderr about something that did not go well."""
    mark = f"[red]{what}{':' if text else ''}[/red]"
    err.print(f"{mark} {escape(text)}".rstrip(), soft_wrap=True)


def command_line(*options: str) -> str:
    """Return the command line to type again: this process's own, and the options that it lacks."""
    name = Path(sys.argv[0]).name
    program = ["python", "-m", "vit_reciprocam"] if name == "__main__.py" else ["vit-reciprocam"]
    given = sys.argv[1:]
    missing = [option for option in options if option not in given]
    return shlex.join([*program, *given[:1], *missing, *given[1:]])


def progress(items: Sequence[T], what: str) -> Iterator[T]:
    """Yield the items, with a bar on stderr if there are two or more."""
    with progress_bar(what, hidden=len(items) < 2) as shown:
        yield from shown.track(items)


def progress_bar(what: str, *more: ProgressColumn, hidden: bool = False) -> Progress:
    """Return a bar with the steps done, `more` columns and the time left, for terminals only."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), *more, TimeRemainingColumn())
    return Progress(*columns, console=err, transient=True, disable=hidden or not err.is_terminal)
