"""`vit-reciprocam reproduce`: the paper's tables and figures, as presets over other commands."""

from __future__ import annotations

import enum
import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from vit_reciprocam.classifier.explain import explain
from vit_reciprocam.cli import options
from vit_reciprocam.cli.benchmark import benchmark_command
from vit_reciprocam.cli.console import errors_in_one_line, out, progress, say
from vit_reciprocam.cli.evaluate import evaluate_command, report_command
from vit_reciprocam.errors import ImageError, InputError
from vit_reciprocam.methods import MethodSpec
from vit_reciprocam.methods.null import NULLS
from vit_reciprocam.pictures.read import find_images
from vit_reciprocam.pictures.render import panels, png
from vit_reciprocam.results.files import check_folder, holds_results, write_folder

__all__ = ["reproduce_command"]

MODELS = [f"timm:deit_{size}_patch16_224" for size in ("tiny", "small", "base")]
FIGURE_METHODS = ["relevance", "reciprocam:kernel=dirac", "reciprocam"]
KERNELS = ["reciprocam:kernel=dirac", "reciprocam:kernel=gaussian"]
TABLE_METHODS = {
    "table1": ["reciprocam", "reciprocam:kernel=dirac", "relevance", "rollout", *NULLS],
    "table3": [method + rest for method in KERNELS for rest in ("", ",class_token=false")],
    "table4": [method + rest for method in KERNELS for rest in ("", ",layer=block")],
}

# a table of the paper, or its figures; the values are these names in lower case
Preset = enum.StrEnum("Preset", ["TABLE1", "TABLE2", "TABLE3", "TABLE4", "FIGURES"])


def reproduce_command(
    what: Annotated[
        Preset,
        typer.Argument(
            metavar="WHAT", help="Part of the paper: table1, table2, table3, table4 or figures."
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Data set as evaluate takes it, or for figures a folder of pictures; not given "
            "for table2."
        ),
    ] = None,
    model: options.Models = None,
    weights: options.WeightsOfEach = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:KEY=VALUE,…]",
            help="Method to add to those of the paper; may be given again.",
        ),
    ] = None,
    destination: options.Out = Path("vit-reciprocam-reproduced"),
    resume: options.Resume = False,
    limit: options.Limit = None,
    batch_size: options.BatchSize = 16,
    device: options.Device = "cpu",
    debug: options.Debug = False,
) -> None:
    """Repeat a table or the figures of the paper.

    Methods and protocol are the paper's, and so are the models, DeiT-Tiny, -Small and -Base, unless
    --model names others. table1 compares methods and null baselines, table2 measures time, table3
    masks the class token too, table4 masks another layer, and figures draws the maps of each
    picture's two most probable classes side by side. With ILSVRC2012's validation pictures as
    --data the tables are those of the paper.
    """
    unused: dict[Preset, dict[str, object]] = {
        Preset.TABLE2: {"--data": data, "--limit": limit, "--resume": resume},
        Preset.FIGURES: {"--resume": resume},
    }
    with errors_in_one_line(debug):
        if given := [name for name, value in unused.get(what, {}).items() if value]:
            raise InputError(f"{what} takes no {', '.join(given)}")
        if data is None and what is not Preset.TABLE2:
            raise InputError(f"{what} needs pictures: give --data")
    names = model or MODELS
    shared: dict[str, Any] = {"model": names, "weights": weights, "device": device, "debug": debug}
    folder = destination / what
    more = method or []
    if what is Preset.TABLE2:
        methods, file = ["relevance", *more], folder.with_suffix(".md")
        benchmark_command(**shared, method=methods, batch=[1], destination=file)
        return
    if what is Preset.FIGURES:
        methods = [*FIGURE_METHODS, *more]
        with errors_in_one_line(debug):
            failed = _draw(
                data or "", methods, folder, limit, models=names, weights=weights, device=device
            )
        if failed:
            raise typer.Exit(1)
        return
    some_failed = None
    try:
        evaluate_command(
            data=data or "",
            **shared,
            method=[*TABLE_METHODS[what], *more],
            destination=folder / "run",
            resume=resume,
            limit=limit,
            batch_size=batch_size,
        )
    except typer.Exit as ended:
        if ended.exit_code != 1:
            raise
        some_failed = ended  # there is still a report to make on the other pictures
    report_command(runs=[folder / "run"], destination=folder / "report", debug=debug)
    if some_failed is not None:
        raise some_failed


def _draw(data: str, methods: list[str], folder: Path, limit: int | None, **models: Any) -> bool:
    """Draw maps, with a row per class and a column per method; return whether pictures failed."""
    check_folder(folder)
    files: dict[str, bytes] = {}
    failed = False
    specs = [MethodSpec.parse(method) for method in methods]
    pictures = find_images([data], skip=holds_results)[:limit]
    if not any(path.exists() for path in pictures):
        raise InputError(f"no such folder of pictures: {data}")
    tasks = [(one, path) for one in options.load_models(**models) for path in pictures]
    for classifier, path in progress(tasks, "Drawing"):
        try:
            explained = [
                explain(path, classifier, top=2, method=spec.name, **spec.settings)
                for spec in specs
            ]
        except ImageError as error:
            failed = True
            say("failed", str(error))
            continue
        drawn, captions = [], []
        for target in range(2):
            index = explained[0].targets[0, target]
            class_name = explained[0].names[0][target].split(",")[0]
            drawn += [*(explained[0].pictures or ()), *(one.overlay(target) for one in explained)]
            captions += [f"{explained[0].probs[0, index]:.1%} {class_name}", *methods]
        place = Path(os.path.relpath(path, data)).with_suffix("")
        name = re.sub(r"[^\w.-]+", "-", f"{classifier.name}-{place}") + ".png"
        files[name] = png(panels(drawn, captions, columns=1 + len(specs)))
    if not files:
        raise InputError(f"no picture of {data} could be drawn")
    write_folder(folder, files, {"methods": methods, "models": models["models"]})
    out.print(f"{len(files)} pictures in {folder}", soft_wrap=True)
    return failed
