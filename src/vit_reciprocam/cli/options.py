"""Options of commands about models, methods and data sets, and loading several models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from vit_reciprocam.classifier.classifier import Classifier
from vit_reciprocam.classifier.load import is_onnx, load, specs
from vit_reciprocam.cli.console import DEFAULT_MODEL
from vit_reciprocam.errors import InputError
from vit_reciprocam.methods import METHODS

__all__ = [
    "BatchSize",
    "Limit",
    "Methods",
    "Models",
    "Options",
    "Prompts",
    "Resume",
    "Weights",
    "WeightsFile",
    "load_all",
    "parse_options",
]

Models = Annotated[
    list[str] | None,
    typer.Option("--model", help=f"One of {', '.join(specs())}; may be given again."),
]
Weights = Annotated[
    list[Path] | None,
    typer.Option(help="Local weights, once a --model in the same order, or not at all."),
]
WeightsFile = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="FILE",
        help="Local .safetensors or .pth file instead of the published weights, or random.",
    ),
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        metavar="NAME[:KEY=VALUE,…]",
        help=f"May be given again, with settings such as reciprocam:kernel=dirac; of "
        f"{', '.join(METHODS)}.",
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="KEY=VALUE",
        help="For the library that builds the models, such as timm's img_size=1024; may be given "
        "again.",
    ),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt", metavar="TEXT", help="A text as a class, once a class: open_clip, some hf."
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run cut short.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N pictures.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Pictures in one call.")]


def load_all(
    models: list[str] | None,
    weights: list[Path] | None,
    *,
    random: bool = False,
    device: str = "cpu",
    backends: list[str] | None = None,
    onnx: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[Classifier]:
    """The models, or the default one, with their weights; ONNX files once for each backend.

    Args:
        models: As `load` takes them.
        weights: Once a model, or not at all.
        random: Leave PyTorch models untrained.
        device: Of all models.
        backends: Of ONNX files.
        onnx: Options for `load` that only ONNX files have; None stands for not given.
        options: For `load`.

    Raises:
        InputError: If there are weights for some of the models only, or beside random ones, or
            options of ONNX files without one.
    """
    names = models or [DEFAULT_MODEL]
    if weights and random:
        raise InputError("--random leaves weights untrained: drop it or --weights")
    if weights and len(weights) != len(names):
        raise InputError(
            f"{len(weights)} --weights for {len(names)} --model: give one for each, in the same "
            "order, or none for the published weights"
        )
    files: list[Any] = [*weights] if weights else [None for _ in names]
    if random:
        files = [None if is_onnx(name) else "random" for name in names]
    given = {name: value for name, value in (onnx or {}).items() if value is not None}
    if (given or backends) and not any(map(is_onnx, names)):
        wanted = ", ".join(f"--{name}" for name in [*given, *(["backend"] if backends else [])])
        raise InputError(f"{wanted}: for ONNX files, and no --model is one")
    found = []
    for name, file in zip(names, files, strict=True):
        each: list[dict[str, Any]] = [{}]
        if is_onnx(name):
            each = [{**given, "backend": one} for one in backends or ["onnxruntime"]]
        found += [load(name, weights=file, device=device, **own, **options) for own in each]
    return found


def parse_options(pairs: list[str] | None) -> dict[str, Any]:
    """Of KEY=VALUE pairs, values as JSON where they are that, else as text.

    Raises:
        InputError: If one is no such pair.
    """
    options = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise InputError(f"--option must be KEY=VALUE, such as img_size=1024; got {pair!r}")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options
