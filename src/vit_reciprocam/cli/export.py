"""`vit-reciprocam export`: a PyTorch model as one ONNX file with prediction and maps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from vit_reciprocam.classifier.load import load
from vit_reciprocam.cli.console import (
    AsJson,
    ClassToken,
    Debug,
    FileName,
    FileTargets,
    Raw,
    UseKernel,
    err,
    errors_in_one_line,
    parse_size,
    path_and_reason,
    print_facts,
)
from vit_reciprocam.cli.options import Options, Prompts, WeightsFile, parse_options
from vit_reciprocam.core.masks import LAYERS
from vit_reciprocam.errors import MissingDependencyError
from vit_reciprocam.libraries import LIBRARIES

__all__ = [
    "export_command",
]


def export_command(
    spec: Annotated[
        str,
        typer.Argument(
            metavar="SPEC",
            help=f"One of {', '.join(library.spec for library in LIBRARIES.values())}.",
        ),
    ],
    destination: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="The file to write.")],
    weights: WeightsFile = None,
    prompt: Prompts = None,
    option: Options = None,
    name: FileName = None,
    target: FileTargets = "all",
    kernel: UseKernel = "gaussian",
    class_token: ClassToken = True,
    layer: Annotated[str, typer.Option(help=f"One of {', '.join(LAYERS)}.")] = "norm1",
    raw: Raw = False,
    size: Annotated[
        str | None,
        typer.Option(metavar="HxW", help="Of the images, such as 384 or 384x512, in pixels."),
    ] = None,
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="Leave their size open, if the model can.")
    ] = False,
    half: Annotated[
        bool, typer.Option("--half", help="Round weights to float16: about half the file.")
    ] = False,
    external_data: Annotated[
        bool,
        typer.Option("--external-data", help="Put the weights into OUT.onnx.data, as if > 2 GB."),
    ] = False,
    opset: Annotated[int, typer.Option(help="Of ONNX's standard operators, from 17.")] = 18,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a model with its explanation as an ONNX file.

    It takes images and gives logits, saliency maps and scores, at about the price of the
    prediction where the closed form holds. Before it is in its place it is checked, and run with
    ONNX Runtime against PyTorch. Explain pictures with it: explain IMAGE --model OUT.onnx.
    """
    with errors_in_one_line(debug):
        try:
            from vit_reciprocam.onnx.export.export import export
        except ModuleNotFoundError as error:
            raise MissingDependencyError("export", "torch,onnx") from error
        extra: dict[str, Any] = {} if prompt is None else {"prompts": prompt}
        pixels = parse_size(size)
        classifier = load(spec, weights=weights, **parse_options(option), **extra)
        err.print(f"exporting {escape(spec)}: about half a minute", highlight=False)
        done = export(
            classifier,
            destination,
            name=name,
            size=pixels,
            kernel=kernel,
            class_token=class_token,
            layer=layer,
            targets=target,
            raw=raw,
            half=half,
            dynamic_size=dynamic_size,
            opset=opset,
            external_data=external_data or None,
        )
    summary = {
        "files": [str(file) for file in done.files],
        "bytes": done.bytes,
        "path": done.metadata.path,
        "direct_because": done.direct_because,
        "inputs": list(done.inputs),
        "outputs": list(done.outputs),
        "opset": done.opset,
        "difference": done.difference,
        "settings": {"targets": target, "raw": raw, "half": half, "dynamic_size": dynamic_size}
        | dataclasses.asdict(done.metadata.masking),
    }
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
        return
    difference = f"{done.difference:.1e} of the largest value"
    print_facts(
        {
            "file": ", ".join(map(str, done.files)),
            "size": f"{done.bytes / 1e6:.1f} MB",
            "path": path_and_reason(done.metadata.path, done.direct_because),
            "inputs": ", ".join(done.inputs),
            "outputs": ", ".join(done.outputs),
            "opset": str(done.opset),
            "check": f"ONNX Runtime differs from PyTorch by {difference}",
        }
    )
