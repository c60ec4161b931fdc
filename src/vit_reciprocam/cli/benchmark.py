"""`vit-reciprocam benchmark`: what explanations cost on this machine."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Column, Table

from vit_reciprocam.benchmark.measure import Row, Spread, benchmark, environment
from vit_reciprocam.classifier.load import is_onnx
from vit_reciprocam.cli import options
from vit_reciprocam.cli.console import errors_in_one_line, out, progress_bar, say
from vit_reciprocam.errors import InputError, check_choice
from vit_reciprocam.results.files import (
    GENERATOR,
    check_folder,
    csv_text,
    markdown_row,
    write_atomically,
)

__all__ = ["benchmark_command"]

HEADINGS = ("method", "path", "ms", "FPS", "÷ forward", "÷ reciprocam", "peak MiB (added)")
MIB = 2**20


def benchmark_command(
    model: options.Models = None,
    weights: options.WeightsOfEach = None,
    random: Annotated[
        bool,
        typer.Option(
            "--random", help="Use untrained weights: the cost is the same, and nothing is fetched."
        ),
    ] = False,
    option: options.LibraryOptions = None,
    prompt: options.Prompts = None,
    method: options.Methods = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="N", help="Number of images in one call; may be given again."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Number of CPU threads; default: the library's own choice."),
    ] = None,
    rounds: Annotated[
        int,
        typer.Option(min=1, help="Number of timing rounds, each of which makes every call once."),
    ] = 30,
    no_naive: Annotated[
        bool,
        typer.Option("--no-naive", help="Leave out naive H, which takes long with many patches."),
    ] = False,
    memory: Annotated[
        bool, typer.Option(help="Measure peak memory, in a fresh process for each row.")
    ] = True,
    destination: Annotated[
        Path | None, typer.Option("--out", help="File for the figures: .md, .csv or .json.")
    ] = None,
    device: options.Device = "cpu",
    backend: options.Backends = None,
    untouched: Annotated[
        list[Path] | None,
        typer.Option(
            "--plain",
            metavar="FILE",
            help="File of the model without maps; given once for each --model that is an ONNX "
            "file, in the same order; default: the model that can be cut out of that file.",
        ),
    ] = None,
    preprocess: options.Preprocess = None,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Measure time and memory of prediction, maps and other methods.

    The rows are: forward, the prediction alone; reciprocam, the prediction and the map of each
    image's top class; all scores, the prediction and the scores of all classes; all maps, these
    scores scaled to [0, 1] too; naive H, the top class's map, for which the rest of the network
    runs once per mask; and the methods of --method, by default relevance if the model has it. With
    --method reciprocam no other method is measured. Calls take turns, so that ratios hold on a busy
    machine too. By default the model is timm:deit_tiny_patch16_224.

    Exit code 0: all was done. 1: something could not be measured; it is listed, and the rest was
    done. 2: nothing could be done.
    """
    with errors_in_one_line(debug, lambda: "nothing is written"):
        if destination is not None:
            check_choice("the ending of --out", destination.suffix, (".md", ".csv", ".json"))
            check_folder(destination.parent)
        library_options = options.parse_options(option)
        classifiers = options.load_models(
            model,
            weights,
            random=random,
            device=device,
            prompts=prompt,
            backends=backend,
            onnx={"preprocess": preprocess},
            **library_options,
        )
        with progress_bar("Measuring") as shown:
            task = shown.add_task("", total=None)
            rows = benchmark(
                classifiers,
                method,
                batch_sizes=batch or (1,),
                rounds=rounds,
                threads=threads,
                naive=not no_naive,
                memory=memory,
                untouched=_match_untouched(
                    untouched, model or [options.DEFAULT_MODEL], len(backend or [""])
                ),
                progress=lambda done, total: shown.update(task, completed=done, total=total),
            )
        report = {
            "generator": GENERATOR,
            "environment": environment(),
            "random_weights": random,
            "options": library_options,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        if destination is not None:
            destination.parent.mkdir(parents=True, exist_ok=True)
            content = {
                ".md": _markdown(rows, report),
                ".csv": _csv(rows),
                ".json": json.dumps(report, indent=2) + "\n",
            }
            write_atomically(destination, content[destination.suffix].encode())
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(rows, report)
    failed = [row for row in rows if row.note]
    for row in failed:
        say("failed", f"{row.model}, batch {row.batch}, {row.method}: {row.note}")
    if failed:
        raise typer.Exit(1 if any(row.ms for row in rows) else 2)


def _match_untouched(
    files: list[Path] | None, models: list[str], backends: int
) -> list[Path | None] | None:
    """Return the untouched model's file, or None, for each classifier of `load_models`."""
    if not files:
        return None
    count = sum(map(is_onnx, models))
    if len(files) != count:
        raise InputError(
            f"{len(files)} --plain for {count} ONNX files: give one for each, in the same order"
        )
    remaining = iter(files)
    matched: list[Path | None] = []
    for name in models:
        matched += [next(remaining)] * backends if is_onnx(name) else [None]
    return matched


def _print(rows: list[Row], report: dict[str, Any]) -> None:
    """Print a table per model and batch size, in 80 columns; --out and --json have all figures."""
    for title, group in _groups(rows):
        path = next((row.path for row in group if row.path), "")
        out.print(f"[bold]{escape(title)}[/bold] {path}", soft_wrap=True)
        table = Table(Column("method", overflow="fold"), box=box.SIMPLE_HEAD)
        for heading in HEADINGS[2:]:
            table.add_column(heading.replace(" (", "\n("), justify="right", no_wrap=True)
        for row in group:
            name = row.method.replace("reciprocam, ", "… ")
            _, _, ms, fps, to_forward, to_reciprocam, memory = _cells(row)
            ms = "–" if row.ms is None else ms.partition(" (")[0]
            to_reciprocam = to_reciprocam.partition(" (")[0]
            table.add_row(*map(escape, (name, ms, fps, to_forward, to_reciprocam, memory)))
        out.print(table)
    out.print(escape(_conditions(rows, report)), soft_wrap=True)


def _groups(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """Return the rows of each model and batch size, with a title."""
    groups: list[tuple[str, list[Row]]] = []
    for row in rows:
        if row.method == "forward":
            height, width = row.size
            backend = "" if row.backend == "torch" else f", {row.backend}"
            title = f"{row.model}{backend}, {height}×{width} px, batch {row.batch}"
            groups.append((title, []))
        groups[-1][1].append(row)
    return groups


def _cells(row: Row) -> list[str]:
    """Return the cells of a row, in the order of `HEADINGS`."""
    if row.ms is None:
        return [row.method, row.path, "not measured", "", "", "", ""]
    memory = ""
    if row.peak_bytes is not None and row.added_bytes is not None:
        memory = f"{row.peak_bytes / MIB:.0f} ({row.added_bytes / MIB:.0f})"
    return [
        row.method,
        row.path,
        _show_spread(row.ms),
        "" if row.fps is None else _digits(row.fps),
        _show_spread(row.to_forward),
        _show_spread(row.to_reciprocam),
        memory,
    ]


def _show_spread(value: Spread | None) -> str:
    """Return the median, and in brackets the quartiles."""
    if value is None:
        return ""
    if value.low == value.high:
        return _digits(value.median)
    return f"{_digits(value.median)} ({_digits(value.low)}–{_digits(value.high)})"


def _digits(value: float) -> str:
    """Return a number with two decimals if it is below ten, with one below a thousand."""
    return f"{value:.{2 if value < 10 else 1 if value < 1000 else 0}f}"


def _conditions(rows: list[Row], report: dict[str, Any]) -> str:
    """Return the line under the tables: the machine, the versions and the number of rounds."""
    machine = report["environment"]
    backends = dict.fromkeys(row.backend for row in rows)
    runtimes = ", ".join(f"{name} {version(name)}" for name in backends)
    counts = sorted({row.rounds for row in rows if row.rounds})
    times = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0] if counts else 0}"
    processor = machine["processor"]
    devices = ", ".join(dict.fromkeys([*(row.device for row in rows), processor]))
    return (
        f"{devices} ({machine['cores']} cores), {rows[0].threads} threads, {machine['system']}, "
        f"Python {machine['python']}, {runtimes}; medians of {times} rounds, with the range of the "
        "middle half in brackets"
    )


def _csv(rows: list[Row]) -> str:
    """Return CSV with a line per row and three columns per spread."""
    lines = []
    for row in rows:
        line: dict[str, Any] = {}
        for key, value in vars(row).items():
            if key in ("ms", "to_forward", "to_reciprocam"):
                spread = dataclasses.astuple(value) if value else (None, None, None)
                line |= zip((key, f"{key}_low", f"{key}_high"), spread, strict=True)
            else:
                line[key] = "x".join(map(str, value)) if key == "size" else value
        lines.append(line)
    return csv_text(lines, list(lines[0]))


def _markdown(rows: list[Row], report: dict[str, Any]) -> str:
    """Return one Markdown table, the conditions, and what could not be measured."""
    columns = ["model, batch", *HEADINGS]
    lines = [markdown_row(columns), markdown_row(["---"] * len(columns))]
    for title, group in _groups(rows):
        lines += [markdown_row([title, *_cells(row)]) for row in group]
    lines += ["", f"{_conditions(rows, report)}."]
    lines += [f"\n{row.method} on {row.model}: {row.note}" for row in rows if row.note]
    return "\n".join(lines) + "\n"
