"""The command line: `vit-reciprocam explain | demo | models`.

Results go to stdout, all else to stderr.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import PIL.Image
import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from vit_reciprocam.classifier import (
    ASSETS,
    SPECS,
    Classifier,
    describe_timm,
    explain,
    load,
    parse_targets,
    timm_names,
)
from vit_reciprocam.errors import (
    InputError,
    MissingDependencyError,
    ReciproCAMError,
    check_choice,
)
from vit_reciprocam.explanation import MOST_DRAWN, Explanation
from vit_reciprocam.files import GENERATOR, check_folder, is_ours, write_atomically
from vit_reciprocam.images import find_images, read_image
from vit_reciprocam.masks import KERNELS, LAYERS, Masking
from vit_reciprocam.render import COLORMAPS

app = typer.Typer(
    name="vit-reciprocam",
    help="See what a Vision Transformer looks at, for the price of one forward pass.",
    no_args_is_help=True,
    rich_markup_mode=None,  # its tables cut long defaults
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console()
err = Console(stderr=True)

T = TypeVar("T")
DEFAULT_MODEL = "timm:deit_tiny_patch16_224"
DEFAULT_OUT = Path("vit-reciprocam-out")
SETTINGS = ("kernel", "class_token", "layer")
NAMES_SHOWN = 3

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results.")]
UseColormap = Annotated[str, typer.Option("--colormap", help=f"One of {', '.join(COLORMAPS)}.")]


def main() -> None:
    """Entry point of the `vit-reciprocam` command."""
    app()


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if show_version:
        typer.echo(f"vit-reciprocam {version('vit-reciprocam')}")
        raise typer.Exit


@app.command("explain")
def explain_command(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE", help="Pictures, folders of pictures, or globs."),
    ],
    model: Annotated[str, typer.Option(help=f"One of {', '.join(SPECS)}.")] = DEFAULT_MODEL,
    weights: Annotated[
        Path | None,
        typer.Option(help="Local .safetensors or .pth file instead of the published weights."),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TARGET",
            help="top1 (the default), top3 …, a class's index or name, or all; may be given again.",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="A text as a class, once a class: open_clip, some hf."),
    ] = None,
    kernel: Annotated[str, typer.Option(help=f"One of {', '.join(KERNELS)}.")] = "gaussian",
    class_token: Annotated[bool, typer.Option(help="Keep the class token under the masks.")] = True,
    layer: Annotated[str, typer.Option(help=f"One of {', '.join(LAYERS)}.")] = "norm1",
    destination: Out = DEFAULT_OUT,
    colormap: UseColormap = "viridis",
    opacity: Annotated[float, typer.Option(min=0, max=1, help="Of the map on the picture.")] = 0.55,
    device: Annotated[str, typer.Option(help="Of a PyTorch model: cpu, cuda, mps …")] = "cpu",
    max_pixels: Annotated[
        int | None,
        typer.Option(min=1, help="Refuse pictures with more pixels; default: Pillow's limit."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Explain what a model predicts for pictures.

    Writes a folder for each picture: overlays, maps and a manifest, and one explanations.json.
    They show the region that the model saw, mostly the centre crop. Bright yellow is strong, dark
    purple weak, and each map is scaled for itself.

    Exit code 0: all done; 1: some pictures failed, they are listed and the others done; 2: nothing
    could be done.
    """
    with _errors_in_one_line(debug):
        if max_pixels is not None:
            PIL.Image.MAX_IMAGE_PIXELS = max_pixels
        check_choice("colormap", colormap, COLORMAPS)
        settings: dict[str, Any] = {"kernel": kernel, "class_token": class_token, "layer": layer}
        Masking(**settings)
        paths = find_images(images)
        check_folder(destination)
        summary = destination / "explanations.json"
        if summary.exists() and not is_ours(summary):
            raise InputError(f"{summary} is not ours to replace: choose another --out")
        name = model.partition(":")[2]
        if name and weights is None and not Path(name).is_dir():
            err.print(
                f"fetching {model}, or taking it from the cache (--weights FILE needs no network)",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
        classifier = load(model, weights=weights, prompts=prompt, device=device)
        classifier.make_explainer(**settings)
        targets = target or ["top1"]
        parse_targets(classifier, targets=targets)
    failures: list[dict[str, str]] = []
    records: list[dict[str, Any]] = []
    for path, folder in _progress(_folders(paths, destination), "Explaining"):
        try:
            explanation = explain(path, classifier, targets=targets, **settings)
            explanation.save(folder, colormap=colormap, opacity=opacity)
        except (ReciproCAMError, OSError) as error:
            if debug:
                err.print_exception()
            failures.append({"source": str(path), "error": str(error)})
            continue
        records.append(_record(explanation, folder))
    report = _report(model, settings, records, failures)
    if records:
        with _errors_in_one_line(debug):
            write_atomically(summary, (json.dumps(report, indent=2) + "\n").encode())
    _print_report(report, as_json)
    for failure in failures:
        err.print(f"[red]failed:[/red] {escape(failure['error'])}", highlight=False, soft_wrap=True)
    if failures:
        raise typer.Exit(1 if records else 2)


@app.command()
def demo(
    destination: Out = DEFAULT_OUT / "demo",
    colormap: UseColormap = "viridis",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Explain the bundled picture, without torch.

    No network either. The bundled model is small and knows 12 drawn classes; for photographs use
    explain with another model.
    """
    with _errors_in_one_line(debug):
        classifier = load("demo")
        explanation = explain(ASSETS / "demo.png", classifier, top=3)
        folder = explanation.save(destination, colormap=colormap)
        plain_ms, explained_ms = _time_demo(classifier)
    ratio = explained_ms / plain_ms
    settings = {name: explanation.settings[name] for name in SETTINGS}
    report = _report("demo", settings, [_record(explanation, folder)], [])
    if as_json:
        timing = {"plain_ms": plain_ms, "explained_ms": explained_ms, "ratio": ratio}
        typer.echo(json.dumps(report | {"timing": timing}, indent=2))
        return
    rows, columns = explanation.scores.shape[2:]
    classes = explanation.probs.shape[1]
    _print_report(report, as_json=False)
    out.print(
        f"prediction alone {plain_ms:.1f} ms; with the {rows}×{columns} maps of all {classes} "
        f"classes {explained_ms:.1f} ms: [bold]{ratio:.2f}×[/bold]\n"
        "(medians of runs taken in turn, ONNX Runtime, this machine)",
        highlight=False,
    )
    out.print(
        f"look at [bold]{escape(str(folder / 'grid.png'))}[/bold]", soft_wrap=True, highlight=False
    )


@app.command()
def models(
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
    with _errors_in_one_line(debug):
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
        for name in _progress(names, "Looking"):
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
    with _errors_in_one_line(debug):
        try:
            from vit_reciprocam import checks
        except ModuleNotFoundError as error:
            raise MissingDependencyError("models --check", "torch") from error
        found = list(checks.architectures(pattern))
        if not found:
            raise InputError(f"no architecture of the installed libraries fits {pattern!r}")
        results = [checks.check(one) for one in _progress(found, "Checking")]
        if file is not None:
            write_atomically(file, (checks.HEAD + checks.report(results)).encode())
        everything = [dataclasses.asdict(one) for one in results]
        typer.echo(json.dumps(everything, indent=2) if as_json else checks.report(results))
    if any(one.status in ("DIFFERENT", "failed") for one in results):
        raise typer.Exit(1)


# --- what the commands share ----------------------------------------------------------------


@contextlib.contextmanager
def _errors_in_one_line(debug: bool) -> Iterator[None]:
    """Bad input ends with one line and exit code 2, anything unexpected with one line and 1."""
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
        raise typer.Exit(2 if expected else 1) from error


def _progress(items: Sequence[T], what: str) -> Iterator[T]:
    """The items, with a bar on stderr where there are several."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = len(items) < 2 or not err.is_terminal
    with Progress(*columns, console=err, disable=hidden, transient=True) as bar:
        yield from bar.track(items)


def _folders(paths: list[Path], destination: Path) -> list[tuple[Path, Path]]:
    """Each picture with its folder, named after it; a second one of that name gets a number."""
    taken: set[str] = set()
    folders = []
    for path in paths:
        name, number = path.stem, 2
        while name.casefold() in taken:
            name, number = f"{path.stem}-{number}", number + 1
        taken.add(name.casefold())
        folders.append((path, destination / name))
    return folders


def _record(explanation: Explanation, folder: Path) -> dict[str, Any]:
    return explanation.record() | {"path": explanation.path, "folder": str(folder)}


def _report(
    model: str,
    settings: dict[str, Any],
    records: list[dict[str, Any]],
    failures: list[dict[str, str]],
) -> dict[str, Any]:
    return {
        "generator": GENERATOR,
        "model": model,
        "settings": settings,
        "images": records,
        "failures": failures,
    }


def _print_report(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    if not report["images"]:
        return
    headings = ("picture", "explained class", "probability", "folder")
    table = Table(*(Column(heading, overflow="fold") for heading in headings))
    for record in report["images"]:
        targets = record["targets"]
        if len(targets) > MOST_DRAWN:
            targets = sorted(targets, key=lambda target: -target["probability"])[:MOST_DRAWN]
        rows = [
            (
                target["name"] + (" (no preference)" if target["degenerate"] else ""),
                f"{target['probability']:.1%}",
            )
            for target in targets
        ]
        if hidden := len(record["targets"]) - len(targets):
            rows.append((f"… and {hidden} less probable: maps.npz, --json", ""))
        predicted = record["prediction"]
        if predicted["index"] not in [target["index"] for target in record["targets"]]:
            rows.append((f"(predicted: {predicted['name']})", f"{predicted['probability']:.1%}"))
        for number, row in enumerate(rows):
            picture, folder = Path(record["source"]).name, record["folder"]
            edges = ("", "") if number else (escape(picture), escape(folder))
            table.add_row(edges[0], *map(escape, row), edges[1])
    out.print(table)


def _time_demo(classifier: Classifier, runs: int = 30) -> tuple[float, float]:
    """Median milliseconds of the prediction alone and of prediction and maps, measured in turn."""
    from vit_reciprocam.onnx.runtime import open_session

    plain = open_session(ASSETS / "demo-plain.onnx")
    batch = classifier.preprocess(read_image(ASSETS / "demo.png"))[None]
    calls: list[Callable[[], Any]] = [
        lambda: plain.run(["logits"], {"images": batch}),
        lambda: classifier.model.session.run(["logits", "saliency"], {"images": batch}),
    ]
    times: list[list[float]] = [[], []]
    for _ in range(runs):
        for call, spent in zip(calls, times, strict=True):
            began = time.perf_counter()
            call()
            spent.append(1000 * (time.perf_counter() - began))
    return float(np.median(times[0])), float(np.median(times[1]))
