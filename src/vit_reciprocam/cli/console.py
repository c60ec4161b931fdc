"""What the commands share: the two consoles, errors in one line, progress, common options."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

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
from rich.table import Table

from vit_reciprocam.core.masks import KERNELS
from vit_reciprocam.errors import InputError, ReciproCAMError
from vit_reciprocam.pictures.preprocess import PRESETS
from vit_reciprocam.pictures.render import COLORMAPS

__all__ = [
    "DEFAULT_MODEL",
    "DEFAULT_OUT",
    "AsJson",
    "Backend",
    "ClassNames",
    "ClassToken",
    "Debug",
    "Device",
    "FileName",
    "FileTargets",
    "Out",
    "Raw",
    "Threads",
    "UseColormap",
    "UseKernel",
    "UsePreprocess",
    "bar",
    "err",
    "errors_in_one_line",
    "given_command",
    "out",
    "parse_size",
    "path_and_reason",
    "print_facts",
    "progress",
    "read_lines",
    "say",
]

_PIPED = 160  # columns: a file or a pipe has no width, and Rich would take 80
out = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPED)
err = Console(stderr=True)

T = TypeVar("T")
DEFAULT_MODEL = "timm:deit_tiny_patch16_224"
DEFAULT_OUT = Path("vit-reciprocam-out")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results.")]
Device = Annotated[
    str,
    typer.Option(
        help="cpu, cuda, mps … of a PyTorch model; of an ONNX file an execution provider such as "
        "cuda, or with OpenVINO its device, such as GPU."
    ),
]
Backend = Annotated[
    str | None,
    typer.Option("--backend", help="Of ONNX files: onnxruntime (default) or openvino."),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Of the CPU, for ONNX files; default: the runtime's.")
]
UsePreprocess = Annotated[
    str | None,
    typer.Option(
        "--preprocess",
        metavar="NAME[:KEY=VALUE,…]",
        help=f"For ONNX files that do not say theirs: one of {', '.join(PRESETS)}, and what "
        "differs, such as imagenet:size=224,crop_pct=0.9.",
    ),
]
UseKernel = Annotated[str, typer.Option("--kernel", help=f"One of {', '.join(KERNELS)}.")]
ClassToken = Annotated[
    bool,
    typer.Option("--class-token/--no-class-token", help="Keep the class token under the masks."),
]
FileTargets = Annotated[
    str,
    typer.Option(
        "--target",
        help="Whose maps: all, top1, top3 … or input, which adds the input targets.",
    ),
]
Raw = Annotated[bool, typer.Option("--raw", help="Only probabilities, no maps scaled to [0, 1].")]
ClassNames = Annotated[
    Path | None,
    typer.Option(help="Text file with a class's name a line, instead of the model's own."),
]
FileName = Annotated[
    str | None, typer.Option("--name", help="What the file calls the model; default: its name.")
]
UseColormap = Annotated[str, typer.Option("--colormap", help=f"One of {', '.join(COLORMAPS)}.")]


@contextlib.contextmanager
def errors_in_one_line(debug: bool, stopped: Callable[[], str] | None = None) -> Iterator[None]:
    """Bad input ends with one line and exit code 2, anything else, as a full disk, with 3.

    Ctrl-C ends with 130 and, where `stopped` is given, what it tells of the work so far.
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
        where = (
            "" if expected or isinstance(error, OSError) else " (unexpected: --debug shows where)"
        )
        text = str(error) or type(error).__name__
        say("error", text + where)
        raise typer.Exit(2 if expected else 3) from error


def say(what: str, text: str) -> None:
    """A line on stderr for what did not go well."""
    mark = f"[red]{what}{':' if text else ''}[/red]"
    err.print(f"{mark} {escape(text)}".rstrip(), highlight=False, soft_wrap=True)


def print_facts(facts: Mapping[str, str]) -> None:
    """What came of a command, name by name."""
    table = Table(show_header=False)
    for name, fact in facts.items():
        table.add_row(name, escape(fact))
    out.print(table)


def path_and_reason(path: str, because: str) -> str:
    """Of an explained file."""
    return f"{path}, since {because}" if because else path


def given_command(*more: str) -> str:
    """The command line of this process, to be typed again, with options that it lacks."""
    name = Path(sys.argv[0]).name
    program = ["python", "-m", "vit_reciprocam"] if name == "__main__.py" else ["vit-reciprocam"]
    given = sys.argv[1:]
    missing = [option for option in more if option not in given]
    return shlex.join([*program, *given[:1], *missing, *given[1:]])


def progress(items: Sequence[T], what: str) -> Iterator[T]:
    """The items, with a bar on stderr where there are several."""
    with bar(what, hidden=len(items) < 2) as shown:
        yield from shown.track(items)


def bar(what: str, *more: ProgressColumn, hidden: bool = False) -> Progress:
    """Steps done, more of them, and the time left; only in a terminal."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), *more, TimeRemainingColumn())
    return Progress(*columns, console=err, transient=True, disable=hidden or not err.is_terminal)


def parse_size(text: str | None, option: str = "--size") -> tuple[int, int] | None:
    """Of an option's "HEIGHTxWIDTH", or one number for both.

    Raises:
        InputError: If it is neither.
    """
    if text is None:
        return None
    sides = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if sides is None:
        raise InputError(f"{option} must be HEIGHTxWIDTH, such as 384x512; got {text!r}")
    return int(sides[1]), int(sides[2] or sides[1])


def read_lines(file: Path) -> list[str]:
    """Class names of a text file, a line each; a synset and a tab may stand before them.

    Raises:
        InputError: If it cannot be read.
    """
    try:
        return [line.rpartition("\t")[2] for line in file.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--class-names {file} cannot be read: {error}") from error
