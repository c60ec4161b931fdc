"""`vit-reciprocam benchmark`: what explanations cost on this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Column, Table

from vit_reciprocam.benchmark.measure import benchmark, environment
from vit_reciprocam.benchmark.rows import Row, Spread
from vit_reciprocam.classifier.load import is_onnx
from vit_reciprocam.cli.console import (
    DEFAULT_MODEL,
    AsJson,
    Debug,
    Device,
    UsePreprocess,
    bar,
    errors_in_one_line,
    out,
    say,
)
from vit_reciprocam.cli.options import (
    Methods,
    Models,
    Options,
    Prompts,
    Weights,
    load_all,
    parse_options,
)
from vit_reciprocam.errors import InputError, check_choice
from vit_reciprocam.results.files import GENERATOR, check_folder, write_atomically
from vit_reciprocam.results.tables import csv_text, markdown_row

__all__ = [
    "benchmark_command",
]

HEADINGS = ("method", "path", "ms", "FPS", "÷ forward", "÷ reciprocam", "peak MiB (added)")
MIB = 2**20


def benchmark_command(
    model: Models = None,
    weights: Weights = None,
    random: Annotated[
        bool,
        typer.Option("--random", help="Untrained weights: cost is the same, none are fetched."),
    ] = False,
    option: Options = None,
    prompt: Prompts = None,
    method: Methods = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Images in one call; may be given again.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of the CPU; by default the library's choice.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="In which each call is timed once.")] = 30,
    no_naive: Annotated[
        bool, typer.Option("--no-naive", help="Leave out naive H: with many patches it takes long.")
    ] = False,
    memory: Annotated[
        bool, typer.Option(help="Measure peak memory, in a fresh process for each row.")
    ] = True,
    destination: Annotated[
        Path | None, typer.Option("--out", help="File for the figures: .md, .csv or .json.")
    ] = None,
    device: Device = "cpu",
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Of ONNX files: onnxruntime (default) or openvino; may be given again."),
    ] = None,
    plain: Annotated[
        list[Path] | None,
        typer.Option(
            help="The untouched model's file, once an ONNX --model in the same order; without it "
            "it is cut out of the file, where it can be."
        ),
    ] = None,
    preprocess: UsePreprocess = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure time and memory of prediction, maps and other methods.

    Rows: forward is the prediction alone; reciprocam the prediction and the map of each image's top
    class; all scores those of all classes; all maps these scaled to [0, 1] besides; naive H the top
    class's map with the rest of the network run once a mask. By default relevance is measured
    besides, where the model has it; --method reciprocam measures no other method. Calls take turns,
    so ratios hold where the machine is not idle.

    Exit code 0: all done; 1: something could not be measured, it is listed and the rest done; 2:
    nothing could be done.
    """
    with errors_in_one_line(debug, lambda: "nothing is written"):
        if destination is not None:
            check_choice("the ending of --out", destination.suffix, (".md", ".csv", ".json"))
            check_folder(destination.parent)
        classifiers = load_all(
            model,
            weights,
            random=random,
            device=device,
            prompts=prompt,
            backends=backend,
            onnx={"preprocess": preprocess},
            **parse_options(option),
        )
        with _live() as update:
            rows = benchmark(
                classifiers,
                method,
                batch_sizes=batch or (1,),
                rounds=rounds,
                threads=threads,
                naive=not no_naive,
                memory=memory,
                plain=_plain_files(plain, model or [DEFAULT_MODEL], len(backend or [""])),
                progress=update,
            )
        report = {
            "generator": GENERATOR,
            "environment": environment(),
            "random_weights": random,
            "options": parse_options(option),
            "rows": [_record(row) for row in rows],
        }
        if destination is not None:
            destination.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(destination, _written(destination.suffix, rows, report).encode())
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(rows, report)
    for row in rows:
        if row.note:
            where = f"{row.model}, batch {row.batch}, {row.method}"
            say("failed", f"{where}: {row.note}")
    if any(row.note for row in rows):
        raise typer.Exit(1 if any(row.ms for row in rows) else 2)


def _plain_files(
    plain: list[Path] | None, models: list[str], backends: int
) -> list[Path | None] | None:
    """One for each of the models that `load_all` gives.

    Raises:
        InputError: If there is not one for each ONNX file.
    """
    if not plain:
        return None
    count = sum(map(is_onnx, models))
    if len(plain) != count:
        raise InputError(
            f"{len(plain)} --plain for {count} ONNX files: give one for each, in the same order"
        )
    files = iter(plain)
    found: list[Path | None] = []
    for name in models:
        found += [next(files)] * backends if is_onnx(name) else [None]
    return found


@contextlib.contextmanager
def _live() -> Iterator[Callable[[int, int], None]]:
    with bar("Measuring") as shown:
        task = shown.add_task("", total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def _print(rows: list[Row], report: dict[str, Any]) -> None:
    """A table each of model and batch size, in 80 columns; --out and --json have all figures."""
    for title, group in _groups(rows):
        path = next((row.path for row in group if row.path), "")
        out.print(f"[bold]{escape(title)}[/bold] {path}", highlight=False, soft_wrap=True)
        table = Table(Column("method", overflow="fold"), box=box.SIMPLE_HEAD)
        for heading in ("ms", "FPS", "÷ forward", "÷ reciprocam", "peak MiB\n(added)"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in group:
            name = row.method.replace("reciprocam, ", "… ")
            _, _, ms, fps, to_forward, to_reciprocam, memory = _cells(row)
            ms = "–" if row.ms is None else ms.partition(" (")[0]
            to_reciprocam = to_reciprocam.partition(" (")[0]
            table.add_row(*map(escape, (name, ms, fps, to_forward, to_reciprocam, memory)))
        out.print(table)
    out.print(escape(_about(rows, report)), highlight=False, soft_wrap=True)


def _groups(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """Rows of one model and batch size, with a title."""
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
    if row.ms is None:
        return [row.method, row.path, "not measured", "", "", "", ""]
    memory = ""
    if row.peak_bytes is not None and row.added_bytes is not None:
        memory = f"{row.peak_bytes / MIB:.0f} ({row.added_bytes / MIB:.0f})"
    return [
        row.method,
        row.path,
        _spread(row.ms),
        "" if row.fps is None else _digits(row.fps),
        _spread(row.to_forward),
        _spread(row.to_reciprocam),
        memory,
    ]


def _spread(value: Spread | None) -> str:
    if value is None:
        return ""
    if value.low == value.high:
        return _digits(value.median)
    return f"{_digits(value.median)} ({_digits(value.low)}–{_digits(value.high)})"


def _digits(value: float) -> str:
    """Two decimals below ten, one below a thousand."""
    return f"{value:.{2 if value < 10 else 1 if value < 1000 else 0}f}"


def _about(rows: list[Row], report: dict[str, Any]) -> str:
    """The line under the table."""
    machine = report["environment"]
    backends = dict.fromkeys(row.backend for row in rows)
    runtimes = ", ".join(f"{name} {version(name)}" for name in backends)
    counts = sorted({row.rounds for row in rows if row.rounds})
    times = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0] if counts else 0}"
    processor = machine["processor"]
    devices = ", ".join(dict.fromkeys([*(row.device for row in rows), processor]))
    return (
        f"{devices} ({machine['cores']} cores), {rows[0].threads} threads, {machine['system']}, "
        f"Python {machine['python']}, {runtimes}; medians of {times} rounds in "
        "turn, and what the middle half lies between"
    )


def _record(row: Row) -> dict[str, Any]:
    """A row as JSON has it, spreads by name."""
    record = dataclasses.asdict(row)
    for key, value in record.items():
        if isinstance(value, Spread):
            record[key] = value._asdict()
    return record


def _written(ending: str, rows: list[Row], report: dict[str, Any]) -> str:
    if ending == ".json":
        return json.dumps(report, indent=2) + "\n"
    return _csv(report["rows"]) if ending == ".csv" else _markdown(rows, report)


def _csv(records: list[dict[str, Any]]) -> str:
    """A line a row, a spread in three columns."""
    spreads = ("ms", "to_forward", "to_reciprocam")
    flat = []
    for record in records:
        line: dict[str, Any] = {}
        for key, value in record.items():
            if key in spreads:
                line[key] = (value or {}).get("median")
                line[f"{key}_low"] = (value or {}).get("low")
                line[f"{key}_high"] = (value or {}).get("high")
            else:
                line[key] = "x".join(map(str, value)) if key == "size" else value
        flat.append(line)
    return csv_text(flat, list(flat[0]))


def _markdown(rows: list[Row], report: dict[str, Any]) -> str:
    columns = ["model, batch", *HEADINGS]
    lines = [markdown_row(columns), markdown_row(["---"] * len(columns))]
    for title, group in _groups(rows):
        lines += [markdown_row([title, *_cells(row)]) for row in group]
    lines += ["", f"{_about(rows, report)}."]
    lines += [f"\n{row.method} on {row.model}: {row.note}" for row in rows if row.note]
    return "\n".join(lines) + "\n"
