"""`vit-reciprocam evaluate` and `report`: measure methods on a data set, and make tables of it."""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich import box
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.progress import TextColumn
from rich.table import Column, Table
from rich.text import Text

from vit_reciprocam.cli import options
from vit_reciprocam.cli.console import command_line, err, errors_in_one_line, out, progress_bar, say
from vit_reciprocam.errors import InputError, MissingDependencyError
from vit_reciprocam.evaluate.metrics.protocols import get_protocol
from vit_reciprocam.evaluate.metrics.registry import METRICS, summarize
from vit_reciprocam.methods import MethodSpec
from vit_reciprocam.results.files import check_folder

__all__ = ["evaluate_command", "report_command"]

FAILURES_SHOWN = 10
METHOD_WIDTH = 12  # least width of the column with the methods' names


def evaluate_command(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Data set: a folder of class folders, a CSV or Parquet listing, the folder of "
            "ILSVRC2012's pictures, or scenes:N for N drawn pictures.",
        ),
    ],
    model: options.Models = None,
    weights: options.WeightsOfEach = None,
    method: options.Methods = None,
    prompt: options.Prompts = None,
    option: options.LibraryOptions = None,
    protocol: Annotated[
        str,
        typer.Option(
            help="Protocol of the metrics: byun2023, poppi2021, or a .toml or .json file with "
            "your own."
        ),
    ] = "byun2023",
    destination: Annotated[
        Path,
        typer.Option(
            "--out", help="Folder of the run: a new one, or with --resume an earlier one."
        ),
    ] = Path("vit-reciprocam-run"),
    insertion: Annotated[
        bool,
        typer.Option(
            help="Measure insertion and deletion too, which takes some 30 more forward passes per "
            "picture."
        ),
    ] = False,
    mosaic: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Number of pictures along each side of a mosaic, to measure GridPG and nothing "
            "else: mosaics of pictures that the model classifies rightly take their place.",
        ),
    ] = None,
    resume: options.Resume = False,
    limit: options.Limit = None,
    batch_size: options.BatchSize = 16,
    workers: Annotated[int, typer.Option(min=1, help="Number of threads that read pictures.")] = 2,
    ground_truth: Annotated[
        Path | None,
        typer.Option(
            help="File with the classes of ILSVRC2012's pictures; default: one found beside them."
        ),
    ] = None,
    boxes: Annotated[
        Path | None, typer.Option(help="Folder of box annotations (XML) of ILSVRC2012's pictures.")
    ] = None,
    device: options.Device = "cpu",
    backend: options.Backend = None,
    threads: options.Threads = None,
    streams: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of parts of a batch that OpenVINO computes at the same time."
        ),
    ] = None,
    preprocess: options.Preprocess = None,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Measure methods on a data set.

    The metrics are drop, increase, coherency, complexity and ADCC, and how well maps find the
    objects, if the data set says where these are; with --mosaic, GridPG alone. Every picture's
    figures and maps are kept in the run's folder. --resume continues a run that was cut short, and
    `vit-reciprocam report` makes tables and a page from it. By default the method is reciprocam and
    the model timm:deit_tiny_patch16_224.

    Exit code 0: all was done. 1: some pictures failed; they are listed, and the others were done.
    2: nothing could be done. 3: the run was cut short, for instance by a full disk; 130: by Ctrl-C.
    """
    begun = resume or not (destination / "run.json").exists()
    with errors_in_one_line(
        debug, lambda: _describe_kept(destination) if begun else "nothing is written"
    ):
        try:
            from vit_reciprocam.evaluate import run
            from vit_reciprocam.evaluate.data import datasets
        except ModuleNotFoundError as error:
            raise MissingDependencyError("evaluate", "evaluate") from error
        chosen = get_protocol(protocol)
        methods = method or ["reciprocam"]
        for one in methods:
            MethodSpec.parse(one)
        check_folder(destination)
        datasets.check_dataset(data, ground_truth=ground_truth, boxes=boxes)
        classifiers = options.load_models(
            model,
            weights,
            device=device,
            prompts=prompt,
            backends=[backend] if backend else None,
            onnx={"threads": threads, "streams": streams, "preprocess": preprocess},
            **options.parse_options(option),
        )
        with _show_progress(chosen, name_models=len(classifiers) > 1) as update:
            manifest = run.evaluate(
                data,
                classifiers,
                methods,
                out=destination,
                protocol=chosen,
                insertion=insertion,
                mosaic=mosaic,
                resume=resume,
                limit=limit,
                batch_size=batch_size,
                workers=workers,
                ground_truth=ground_truth,
                boxes=boxes,
                progress=update,
            )
        summaries = run.summaries(destination)
    if as_json:
        typer.echo(json.dumps({"out": str(destination), **manifest, "summaries": summaries}))
    else:
        _print(manifest, summaries)
        command = escape(f"vit-reciprocam report {destination}")
        out.print(f"report: [bold]{command}[/bold]", soft_wrap=True)
    listed = [("failed", one["error"], one) for one in manifest["failures"]]
    listed += [("object not located", one["note"], one) for one in manifest["not_located"]]
    for what, why, about in listed[:FAILURES_SHOWN]:
        say(what, why if about["source"] in why else f"{about['source']}: {why}")
    if len(listed) > FAILURES_SHOWN:
        err.print(f"… and {len(listed) - FAILURES_SHOWN} more: {destination / 'manifest.json'}")
    if listed:
        raise typer.Exit(1 if manifest["images"] else 2)


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


def _describe_kept(folder: Path) -> str:
    """Return how much of a stopped run is kept, and the command that continues it."""
    from vit_reciprocam.evaluate.store import RunFolder, count_wanted, read_run

    try:
        settings, _ = read_run(folder)
    except InputError:
        return "nothing was measured yet"
    total = count_wanted(settings)
    done = len(RunFolder(folder, settings).done())
    models = f", of {len(settings['models'])} models" if len(settings["models"]) > 1 else ""
    return (
        f"{done} of {total} pictures{models} are kept in {folder}. Go on with:\n"
        f"  {command_line('--resume')}"
    )


@contextlib.contextmanager
def _show_progress(protocol: Any, *, name_models: bool) -> Iterator[Callable[[Any], None] | None]:
    """Show a bar, and the ADCC or GridPG so far; yield the function to call after each batch.

    Outside of a terminal nothing is shown, and there is no such function.
    """
    if not err.is_terminal:
        yield None
        return
    seen: dict[str, dict[str, list[float]]] = {}
    shown = progress_bar("Evaluating", TextColumn("{task.fields[speed]}"))
    task = shown.add_task("", total=None, speed="")
    with Live(shown, console=err, transient=True) as live:

        def update(progress: Any) -> None:
            for record in progress.records:
                if "error" in record:
                    continue
                model = f"{record['model'].rpartition(':')[2]} " if name_models else ""
                each = seen.setdefault(f"{model}{record['method']}", defaultdict(list))
                for name in ("p", "o", "coherency", "complexity", "gridpg"):
                    each[name].append(record.get(name, np.nan))
            columns = {n: {k: np.array(v) for k, v in each.items()} for n, each in seen.items()}
            found = {n: summarize(each, protocol) for n, each in columns.items()}
            watched = "gridpg" if any("gridpg" in one for one in found.values()) else "adcc"
            figures = ", ".join(f"{name} {one[watched]:.1f}" for name, one in found.items())
            speed = shown.tasks[0].speed
            shown.update(
                task,
                total=progress.total,
                completed=progress.done,
                speed=f"{speed:.1f} images/s" if speed else "",
            )
            heading = f"{METRICS[watched].heading}: "
            live.update(Group(shown, Text(heading + figures if figures else "")))

        yield update


def _print(manifest: dict[str, Any], summaries: list[dict[str, Any]]) -> None:
    """Print a table per model; one that is too wide is split, first after the paper's metrics."""
    shown = [name for name in METRICS if any(name in row for row in summaries)]
    groups = _split(shown)
    if len(groups) > 1:
        groups = _split([name for name in shown if METRICS[name].kind == "adcc"])
        groups += _split([name for name in shown if METRICS[name].kind != "adcc"])
    for model in manifest["models"]:
        out.print(f"[bold]{escape(model)}[/bold]", soft_wrap=True)
        for metrics in groups:
            out.print(_table([row for row in summaries if row["model"] == model], metrics))
    protocol, data = manifest["protocol"]["name"], escape(manifest["data"]["name"])
    left_out = f", {manifest['duplicates']} duplicates left out" if manifest["duplicates"] else ""
    what = "pictures"
    if "mosaic" in manifest:
        what = "cells of {n}x{n} mosaics of pictures".format(n=manifest["mosaic"]["n"])
    about = f"percent, protocol {protocol}, {manifest['images']} {what} of {data}{left_out}"
    out.print(about, soft_wrap=True)


def _width(metric: str) -> int:
    """Return the width below which a metric's column would be cut."""
    return max(len(METRICS[metric].heading_with_arrow), len("100.00"))


def _split(metrics: list[str]) -> list[list[str]]:
    """Return the metrics in groups, each with as many as fit into one table of the terminal."""
    groups: list[list[str]] = []
    free = 0
    for metric in metrics:
        needed = _width(metric) + 3  # with a space on both sides, and one between columns
        if needed > free:
            groups.append([])
            free = out.width - (METHOD_WIDTH + 3) - 1
        groups[-1].append(metric)
        free -= needed
    return groups


def _table(rows: list[dict[str, Any]], metrics: list[str]) -> Table:
    """Return a table with a row per method and a column per metric."""
    method = Column("method", overflow="fold", min_width=METHOD_WIDTH)
    table = Table(method, box=box.SIMPLE_HEAD)
    for name in metrics:
        heading = METRICS[name].heading_with_arrow
        table.add_column(heading, justify="right", min_width=_width(name))
    for row in rows:
        figures = [f"{row[name]:.2f}" if name in row else "" for name in metrics]
        table.add_row(escape(row["method"]), *figures)
    return table
