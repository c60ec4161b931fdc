"""`vit-reciprocam evaluate`: methods measured on a data set."""

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
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from vit_reciprocam.cli.parts import (
    AsJson,
    Debug,
    Device,
    Threads,
    UsePreprocess,
    err,
    errors_in_one_line,
    out,
)
from vit_reciprocam.cli.several import (
    Methods,
    Models,
    Options,
    Prompts,
    Weights,
    load_all,
    parse_options,
)
from vit_reciprocam.errors import MissingDependencyError

FAILURES_SHOWN = 10


def evaluate_command(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A folder of class folders, a CSV or Parquet listing, ILSVRC2012's pictures, or "
            "scenes:N.",
        ),
    ],
    model: Models = None,
    weights: Weights = None,
    method: Methods = None,
    prompt: Prompts = None,
    option: Options = None,
    protocol: Annotated[
        str, typer.Option(help="byun2023, poppi2021, or a .toml or .json file with your own.")
    ] = "byun2023",
    destination: Annotated[
        Path, typer.Option("--out", help="Folder of the run: new, or with --resume an earlier one.")
    ] = Path("vit-reciprocam-run"),
    insertion: Annotated[
        bool, typer.Option(help="Also insertion and deletion: some 30 forward passes a picture.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run cut short.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N pictures.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in one call.")] = 16,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read pictures.")] = 2,
    ground_truth: Annotated[
        Path | None, typer.Option(help="Of ILSVRC2012's pictures, where it is not found.")
    ] = None,
    boxes: Annotated[
        Path | None, typer.Option(help="Folder of ILSVRC2012's box annotations (XML).")
    ] = None,
    device: Device = "cpu",
    backend: Annotated[
        str | None, typer.Option(help="Of ONNX files: onnxruntime (default) or openvino.")
    ] = None,
    threads: Threads = None,
    streams: Annotated[
        int | None, typer.Option(min=1, help="Of OpenVINO: parts of a batch at the same time.")
    ] = None,
    preprocess: UsePreprocess = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure methods on a data set.

    Drop, increase, coherency, complexity and ADCC; where objects are known also how well maps lie
    on them. Every picture's figures and map are kept in the run's folder; a run cut short goes on
    with --resume. `vit-reciprocam report` makes tables and a page of it.

    Exit code 0: all done; 1: some pictures failed, they are listed and the others done; 2: nothing
    could be done; 3: cut short, as by a full disk: --resume goes on.
    """
    with errors_in_one_line(debug):
        run, protocols = _imported()
        classifiers = load_all(
            model,
            weights,
            device=device,
            prompts=prompt,
            backends=[backend] if backend else None,
            onnx={"threads": threads, "streams": streams, "preprocess": preprocess},
            **parse_options(option),
        )
        methods = method or ["reciprocam"]
        with _live(protocols.get_protocol(protocol)) as update:
            manifest = run.evaluate(
                data,
                classifiers,
                methods,
                out=destination,
                protocol=protocol,
                insertion=insertion,
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
        out.print(
            f"report: [bold]vit-reciprocam report {escape(str(destination))}[/bold]",
            highlight=False,
            soft_wrap=True,
        )
    listed = [("failed", one["error"], one) for one in manifest["failures"]]
    listed += [("object not located", one["note"], one) for one in manifest["not_located"]]
    for what, why, about in listed[:FAILURES_SHOWN]:
        text = escape(why if about["source"] in why else f"{about['source']}: {why}")
        err.print(f"[red]{what}:[/red] {text}", highlight=False, soft_wrap=True)
    if len(listed) > FAILURES_SHOWN:
        err.print(f"… and {len(listed) - FAILURES_SHOWN} more: {destination / 'manifest.json'}")
    if listed:
        raise typer.Exit(1 if manifest["images"] else 2)


def _imported() -> tuple[Any, Any]:
    try:
        from vit_reciprocam import protocols
        from vit_reciprocam.evaluate import run
    except ModuleNotFoundError as error:
        raise MissingDependencyError("evaluate", "evaluate") from error
    return run, protocols


@contextlib.contextmanager
def _live(protocol: Any) -> Iterator[Callable[[Any], None] | None]:
    """A bar with pictures a second, time left, and each method's ADCC of the pictures so far."""
    if not err.is_terminal:
        yield None
        return
    columns = (
        TextColumn("Evaluating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        TextColumn("ADCC {task.fields[adcc]}"),
    )
    seen: dict[str, dict[str, list[float]]] = {}
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("", total=None, speed="", adcc="…")

        def update(progress: Any) -> None:
            for record in progress.records:
                if "error" not in record:
                    model = record["model"].rpartition(":")[2]
                    each = seen.setdefault(f"{model} {record['method']}", defaultdict(list))
                    for name in ("p", "o", "coherency", "complexity"):
                        each[name].append(record[name])
            shown = [
                f"{name} {protocol.summary({k: np.array(v) for k, v in each.items()})['adcc']:.1f}"
                for name, each in seen.items()
            ]
            speed = bar.tasks[0].speed
            bar.update(
                task,
                total=progress.total,
                completed=progress.done,
                speed=f"{speed:.1f} images/s" if speed else "",
                adcc=", ".join(shown),
            )

        yield update


def _print(manifest: dict[str, Any], summaries: list[dict[str, Any]]) -> None:
    """A table for each model."""
    from vit_reciprocam.evaluate.tables import METRICS

    shown = {name: one for name, one in METRICS.items() if any(name in row for row in summaries)}
    for model in manifest["models"]:
        table = Table(
            Column("method", overflow="fold", min_width=12),
            title=escape(model),
            box=box.SIMPLE_HEAD,
        )
        for about in shown.values():
            arrow = "↑" if about.higher else "↓"
            table.add_column(f"{about.heading} {arrow}", justify="right", no_wrap=True)
        for row in summaries:
            if row["model"] == model:
                figures = [f"{row[name]:.2f}" if name in row else "" for name in shown]
                table.add_row(escape(row["method"]), *figures)
        out.print(table)
    protocol = manifest["protocol"]["name"]
    left_out = f", {manifest['duplicates']} duplicates left out" if manifest["duplicates"] else ""
    out.print(
        f"percent, protocol {protocol}, {manifest['images']} pictures of "
        f"{escape(manifest['data']['name'])}{left_out}",
        highlight=False,
        soft_wrap=True,
    )
