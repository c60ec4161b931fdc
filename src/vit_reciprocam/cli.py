"""The command line: `vit-reciprocam explain | demo | models`.

Results go to stdout, all else to stderr.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import PIL.Image
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vit_reciprocam.classifier import (
    ASSETS,
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
from vit_reciprocam.files import GENERATOR, is_ours, write_atomically
from vit_reciprocam.images import find_images, read_image
from vit_reciprocam.masks import KERNELS, LAYERS, Masking
from vit_reciprocam.render import COLORMAPS

app = typer.Typer(
    name="vit-reciprocam",
    help="See what a Vision Transformer looks at, for the price of one forward pass.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console()
err = Console(stderr=True)

T = TypeVar("T")
DEFAULT_MODEL = "timm:deit_tiny_patch16_224"
DEFAULT_OUT = Path("vit-reciprocam-out")

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
    images: Annotated[list[str], typer.Argument(help="Pictures, folders of pictures, or globs.")],
    model: Annotated[str, typer.Option(help="demo or timm:NAME.")] = DEFAULT_MODEL,
    weights: Annotated[
        Path | None,
        typer.Option(help="Local .safetensors or .pth file instead of the published weights."),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="top1, top3, …, a class's index or name; may be given again."),
    ] = None,
    kernel: Annotated[str, typer.Option(help=f"{' or '.join(KERNELS)}.")] = "gaussian",
    class_token: Annotated[bool, typer.Option(help="Keep the class token under the masks.")] = True,
    layer: Annotated[str, typer.Option(help=f"{' or '.join(LAYERS)}.")] = "norm1",
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
        summary = destination / "explanations.json"
        if summary.exists() and not is_ours(summary):
            raise InputError(f"{summary} is not ours to replace: choose another --out")
        classifier = load(model, weights=weights, device=device)
        classifier.make_explainer(**settings)
        choice = _read_targets(target or ["top1"])
        parse_targets(classifier, **choice)
    failures: list[dict[str, str]] = []
    records: list[dict[str, Any]] = []
    for path, folder in _progress(_folders(paths, destination), "Explaining"):
        try:
            explanation = explain(path, classifier, **choice, **settings)
            explanation.save(folder, colormap=colormap, opacity=opacity)
        except (ReciproCAMError, OSError) as error:
            if debug:
                err.print_exception()
            failures.append({"source": str(path), "error": str(error)})
            continue
        records.append(explanation.record() | {"path": explanation.path, "folder": str(folder)})
    report = {
        "generator": GENERATOR,
        "model": model,
        "settings": settings,
        "images": records,
        "failures": failures,
    }
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
    """Explain the bundled picture with the bundled model: no network, no torch."""
    with _errors_in_one_line(debug):
        classifier = load("demo")
        explanation = explain(ASSETS / "demo.png", classifier, top=3)
        folder = explanation.save(destination, colormap=colormap)
        plain_ms, explained_ms = _time_demo(classifier)
    ratio = explained_ms / plain_ms
    record = explanation.record()
    if as_json:
        timing = {"plain_ms": plain_ms, "explained_ms": explained_ms, "ratio": ratio}
        typer.echo(json.dumps(record | {"folder": str(folder), "timing": timing}, indent=2))
        return
    rows, columns = explanation.scores.shape[2:]
    classes = explanation.probs.shape[1]
    _print_report({"images": [record | {"folder": str(folder)}]}, as_json=False)
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
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the models that can be explained, by which path, and why others cannot.

    timm models are built without weights or memory to find out; all of them take about half a
    minute.
    """
    with _errors_in_one_line(debug):
        rows = [{"model": "demo", "path": "closed-form", "why": ""}]
        try:
            names = timm_names(pattern)
        except MissingDependencyError as error:
            names = []
            err.print(str(error), highlight=False, soft_wrap=True, markup=False)
        for name in _progress(names, "Looking"):
            path, why = describe_timm(name)
            rows.append({"model": f"timm:{name}", "path": path, "why": why})
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("model", "path", "why")
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row.values()))
    out.print(table)


# --- what the commands share ----------------------------------------------------------------


@contextlib.contextmanager
def _errors_in_one_line(debug: bool) -> Iterator[None]:
    """Bad input ends with one line and exit code 2, anything unexpected with one line and 1."""
    try:
        yield
    except Exception as error:
        if debug:
            raise
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
    with Progress(*columns, console=err, disable=len(items) < 2, transient=True) as bar:
        yield from bar.track(items)


def _read_targets(wanted: list[str]) -> dict[str, Any]:
    """`explain`'s top= or targets= from what stands behind --target."""
    tops = [value for value in wanted if value.startswith("top") and value[3:].isdecimal()]
    if tops and len(wanted) > 1:
        raise InputError(f"--target {tops[0]} stands alone: it cannot be mixed with other targets")
    if tops:
        return {"top": int(tops[0][3:])}
    return {"targets": "all" if wanted == ["all"] else wanted}


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


def _print_report(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    if not report["images"]:
        return
    table = Table("picture", "explained class", "probability", "folder")
    for record in report["images"]:
        for position, target in enumerate(record["targets"]):
            first = position == 0
            flat = " (no preference)" if target["degenerate"] else ""
            table.add_row(
                escape(Path(record["source"]).name) if first else "",
                escape(target["name"]) + flat,
                f"{target['probability']:.1%}",
                escape(record["folder"]) if first else "",
            )
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


if __name__ == "__main__":
    main()
