"""`vit-reciprocam explain` and `demo`: what a model predicts for pictures, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import PIL.Image
import typer
from rich.markup import escape
from rich.table import Column, Table

from vit_reciprocam.benchmark.calls import ALL_MAPS, FORWARD
from vit_reciprocam.benchmark.measure import benchmark
from vit_reciprocam.classifier.explain import explain, explain_with, parse_targets
from vit_reciprocam.classifier.load import ASSETS, is_onnx, load
from vit_reciprocam.cli import options
from vit_reciprocam.cli.console import err, errors_in_one_line, out, progress, say
from vit_reciprocam.core.masks import NORMALIZATIONS, SCORES, Masking
from vit_reciprocam.errors import InputError, ReciproCAMError, check_choice
from vit_reciprocam.methods import SIGNED, MethodSpec
from vit_reciprocam.pictures.read import find_images
from vit_reciprocam.pictures.render import COLORMAPS
from vit_reciprocam.results.explanation import Explanation
from vit_reciprocam.results.files import (
    GENERATOR,
    check_folder,
    holds_results,
    is_ours,
    write_atomically,
)
from vit_reciprocam.results.pick import MOST_DRAWN
from vit_reciprocam.results.ranges import write_range, write_remark

__all__ = ["demo_command", "explain_command"]

SETTINGS = ("method", "kernel", "class_token", "layer", "depth", "fuse", "score", "normalize")


def explain_command(
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE", help="Pictures, folders of pictures, or globs.")
    ],
    model: options.Model = options.DEFAULT_MODEL,
    weights: options.Weights = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TARGET",
            help="Class to explain: top1 (the default), top3 …, a class's index or name, or all; "
            "may be given again. Beside named classes, top3 is the three most probable others.",
        ),
    ] = None,
    prompt: options.Prompts = None,
    option: options.LibraryOptions = None,
    method: options.Method = "reciprocam",
    kernel: options.Kernel = None,
    class_token: options.ClassToken = None,
    layer: options.Layer = None,
    depth: options.Depth = None,
    score: options.Score = None,
    normalize: options.Normalize = None,
    destination: options.Out = options.DEFAULT_OUT,
    colormap: options.Colormap = "viridis",
    opacity: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Opacity of the map on the picture: 0 hides the map, 1 the picture."
        ),
    ] = 0.55,
    against: Annotated[
        bool,
        typer.Option(
            "--against",
            help="Evidence against the class is drawn too, in blue, and evidence for it in orange; "
            "needs a method with evidence, such as deep:fast.",
        ),
    ] = False,
    device: options.Device = "cpu",
    backend: options.Backend = None,
    threads: options.Threads = None,
    preprocess: options.Preprocess = None,
    class_names: options.ClassNames = None,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of pixels above which a picture is refused; default: Pillow's limit.",
        ),
    ] = None,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Explain what a model predicts for pictures.

    The results are one explanations.json, and for each picture a folder with overlays, maps and a
    manifest. Overlays show the region that the model saw, usually the centre crop. Bright yellow is
    strong, dark purple is weak, and each map is scaled on its own.

    Exit code 0: all was done. 1: some pictures failed; they are listed, and the others were done.
    2: nothing could be done.
    """
    with errors_in_one_line(debug):
        if max_pixels is not None:
            PIL.Image.MAX_IMAGE_PIXELS = max_pixels
        check_choice("colormap", colormap, COLORMAPS)
        masking = {"kernel": kernel, "class_token": class_token, "layer": layer, "depth": depth}
        reading = options.drop_none({"score": score, "normalize": normalize})
        settings = _read_settings(method, options.drop_none(masking), reading)
        if against and not is_onnx(model):
            _check_evidence(settings)
        paths = find_images(images, skip=holds_results)
        if not any(path.exists() for path in paths):
            raise InputError(f"no such file: {', '.join(map(str, paths))}")
        check_folder(destination)
        summary = destination / "explanations.json"
        if summary.exists() and not is_ours(summary):
            raise InputError(f"{summary} is not ours to replace: choose another --out")
        name = "" if is_onnx(model) else model.partition(":")[2]
        if name and weights is None and not Path(name).is_dir():
            err.print(
                f"fetching {model}, or taking it from the cache (--weights FILE needs no network)",
                markup=False,
                soft_wrap=True,
            )
        classifier = load(
            model,
            weights=weights,
            prompts=prompt,
            device=device,
            backend=backend,
            threads=threads,
            preprocess=preprocess,
            class_names=None if class_names is None else options.read_lines(class_names),
            **options.parse_options(option),
        )
        explainer = classifier.backend.make_explainer(**settings)
        targets = target or ["top1"]
        parse_targets(classifier, targets=targets)
        report = _start_report(model, settings)
        for path, folder in progress(_name_folders(paths, destination), "Explaining"):
            try:
                explanation = explain_with(explainer, path, classifier, targets=targets)
                explanation.save(folder, colormap=colormap, opacity=opacity, against=against)
            except (ReciproCAMError, OSError) as error:
                if debug:
                    err.print_exception()
                report["failures"].append({"source": str(path), "error": str(error)})
                continue
            _add_picture(report, explanation, folder)
        if report["images"]:
            write_atomically(summary, (json.dumps(report, indent=2) + "\n").encode())
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    elif report["images"]:
        _print_report(report)
    for failure in report["failures"]:
        say("failed", failure["error"])
    if report["failures"]:
        raise typer.Exit(1 if report["images"] else 2)


def demo_command(
    destination: options.Out = options.DEFAULT_OUT / "demo",
    colormap: options.Colormap = "viridis",
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Explain the bundled picture, without torch.

    The bundled model is small and knows 12 drawn classes; for photographs use the command explain
    with another model. Nothing is fetched.
    """
    with errors_in_one_line(debug):
        classifier = load("demo")
        explanation = explain(ASSETS / "demo.png", classifier, top=3)
        folder = explanation.save(destination, colormap=colormap)
        rows = benchmark([classifier], (), naive=False)
    ms: dict[str, Any] = {row.method: row.ms for row in rows}
    predicted_ms, explained_ms = ms[FORWARD].median, ms[ALL_MAPS].median
    ratio = explained_ms / predicted_ms
    report = _start_report("demo", {})
    _add_picture(report, explanation, folder)
    if as_json:
        timing = {"plain_ms": predicted_ms, "explained_ms": explained_ms, "ratio": ratio}
        typer.echo(json.dumps(report | {"timing": timing}, indent=2))
        return
    height, width = explanation.scores.shape[2:]
    classes = explanation.probs.shape[1]
    _print_report(report)
    out.print(
        f"prediction alone {predicted_ms:.1f} ms; with the {height}×{width} maps of all {classes} "
        f"classes {explained_ms:.1f} ms: [bold]{ratio:.2f}×[/bold]\n"
        "(medians of runs taken in turn, ONNX Runtime, this machine)"
    )
    out.print(f"look at [bold]{escape(str(folder / 'grid.png'))}[/bold]", soft_wrap=True)


def _read_settings(method: str, masking: dict[str, Any], reading: dict[str, Any]) -> dict[str, Any]:
    """Return the method and its settings, with ReciproCAM's own options among them."""
    spec = MethodSpec.parse(method)
    if spec.name == "reciprocam":
        Masking(**masking)
        check_choice("score", reading.get("score", SCORES[0]), SCORES)
        check_choice("normalize", reading.get("normalize", NORMALIZATIONS[0]), NORMALIZATIONS)
        return {"method": spec.name, **masking, **reading, **spec.settings}
    if given := [f"--{name.replace('_', '-')}" for name in (*masking, *reading)]:
        raise InputError(
            f"{options.join_names(given)}: for method reciprocam only, not for {spec.name}; give "
            f"its own settings as --method {spec.name}:KEY=VALUE"
        )
    return {"method": spec.name, **spec.settings}


def _check_evidence(settings: dict[str, Any]) -> None:
    """Refuse --against before a model is loaded, if the method gives no evidence."""
    method = settings["method"]
    every = {"normalize": "evidence" if method in SIGNED else "minmax"} | settings
    if every["normalize"] != "evidence":
        raise InputError(
            f"--against shows signed evidence, which {method} does not give with these settings: "
            "use --method deep:fast, or --normalize evidence"
        )


def _name_folders(paths: list[Path], destination: Path) -> list[tuple[Path, Path]]:
    """Pair each picture with a folder of its name, with a number if that name is taken."""
    taken: set[str] = set()
    folders = []
    for path in paths:
        name, number = path.stem, 2
        while name.casefold() in taken:
            name, number = f"{path.stem}-{number}", number + 1
        taken.add(name.casefold())
        folders.append((path, destination / name))
    return folders


def _start_report(model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the report on pictures, to be printed and written, before any is explained."""
    about = {"generator": GENERATOR, "model": model, "settings": settings}
    return {**about, "images": [], "failures": []}


def _add_picture(report: dict[str, Any], explanation: Explanation, folder: Path) -> None:
    """Add one picture's record, and the settings of the masks if its method has them."""
    used = {name: explanation.settings[name] for name in SETTINGS if name in explanation.settings}
    report["settings"] = used | report["settings"]
    place = {"path": explanation.path, "folder": str(folder)}
    report["images"].append(explanation.record() | place)


def _print_report(report: dict[str, Any]) -> None:
    """Print a table with one line per picture and class."""
    headings = ("picture", "explained class", "probability", "map", "folder")
    table = Table(*(Column(heading, overflow="fold") for heading in headings))
    for record in report["images"]:
        picture, folder = escape(Path(record["source"]).name), escape(record["folder"])
        for name, probability, span in _list_classes(record):
            table.add_row(picture, escape(name), probability, span, folder)
            picture = folder = ""  # they are printed once
    out.print(table)


def _list_classes(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the explained classes, or the most probable of many, their probabilities and ranges.

    The range is that of the scores from which the class's map is scaled.
    """
    targets = record["targets"]
    if len(targets) > MOST_DRAWN:
        targets = sorted(targets, key=lambda target: -target["probability"])[:MOST_DRAWN]
    rows = []
    for target in targets:
        note = f" ({remark})" if (remark := write_remark(target)) else ""
        rows.append((target["name"] + note, f"{target['probability']:.1%}", write_range(target)))
    if hidden := len(record["targets"]) - len(targets):
        rows.append((f"… and {hidden} less probable: maps.npz, --json", "", ""))
    predicted = record["prediction"]
    if predicted["index"] not in [target["index"] for target in record["targets"]]:
        rows.append((f"(predicted: {predicted['name']})", f"{predicted['probability']:.1%}", ""))
    return rows
