"""`vit-reciprocam export` and `insert`: ONNX files with prediction and maps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from vit_reciprocam.classifier.load import load
from vit_reciprocam.cli import options
from vit_reciprocam.cli.console import err, errors_in_one_line, out
from vit_reciprocam.core.masks import describe_maskings
from vit_reciprocam.errors import MissingDependencyError
from vit_reciprocam.libraries import LIBRARIES

__all__ = ["export_command", "insert_command"]


def export_command(
    spec: Annotated[
        str,
        typer.Argument(
            metavar="SPEC",
            help=f"Model: {options.join_names(library.spec for library in LIBRARIES.values())}.",
        ),
    ],
    destination: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="File to write.")],
    weights: options.Weights = None,
    prompt: options.Prompts = None,
    option: options.LibraryOptions = None,
    name: options.ModelName = None,
    target: options.FileTargets = "all",
    kernel: options.Kernel = None,
    class_token: options.ClassToken = None,
    layer: options.Layer = None,
    depth: options.Depth = None,
    normalize: options.Normalize = None,
    raw: options.Raw = False,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="HxW",
            help="Height and width of the images in pixels, such as 384x512, or one number for "
            "both.",
        ),
    ] = None,
    dynamic_size: Annotated[
        bool,
        typer.Option(
            "--dynamic-size", help="Leave the size of the images open, if the model permits it."
        ),
    ] = False,
    half: Annotated[
        bool, typer.Option("--half", help="Round weights to float16, which about halves the file.")
    ] = False,
    external_data: Annotated[
        bool,
        typer.Option(
            "--external-data",
            help="Put the weights into OUT.onnx.data, as is always done above 2 GB.",
        ),
    ] = False,
    opset: Annotated[
        int, typer.Option(help="Version of ONNX's standard operators, 17 or later.")
    ] = 18,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Write a model with its explanation as an ONNX file.

    The file takes images and gives logits, saliency maps and scores, at about the price of the
    prediction alone if the closed form holds. It is checked, and compared with PyTorch in ONNX
    Runtime, before it is moved into place. Explain pictures with it: explain IMAGE --model
    OUT.onnx.
    """
    with errors_in_one_line(debug):
        try:
            from vit_reciprocam.onnx.export.export import export
        except ModuleNotFoundError as error:
            raise MissingDependencyError("export", "torch,onnx") from error
        pixels = options.parse_size(size)
        classifier = load(spec, weights=weights, prompts=prompt, **options.parse_options(option))
        err.print(f"exporting {escape(spec)}: about half a minute")
        done = export(
            classifier,
            destination,
            name=name,
            size=pixels,
            **options.drop_none(
                {
                    "kernel": kernel,
                    "class_token": class_token,
                    "layer": layer,
                    "depth": depth,
                    "normalize": normalize,
                }
            ),
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
        | describe_maskings(done.metadata.maskings)
        | {"normalize": done.metadata.normalize},
    }
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
        return
    difference = f"{done.difference:.1e} of the largest value"
    _print_facts(
        {
            "file": ", ".join(map(str, done.files)),
            "size": f"{done.bytes / 1e6:.1f} MB",
            "path": _describe_path(done.metadata.path, done.direct_because),
            "inputs": ", ".join(done.inputs),
            "outputs": ", ".join(done.outputs),
            "opset": str(done.opset),
            "check": f"ONNX Runtime differs from PyTorch by {difference}",
        }
    )


def insert_command(
    source: Annotated[
        Path, typer.Argument(metavar="IN.onnx", help="File of the model, from any exporter.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="File to write.")],
    target: options.FileTargets = "all",
    kernel: options.Kernel = None,
    class_token: options.ClassToken = None,
    normalize: options.Normalize = None,
    raw: options.Raw = False,
    target_node: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Name of the value to mask, or of its node, if it is not found."
        ),
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(metavar="HxW", help="Rows and columns of patches, if they are not found."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="HxW",
            help="Height and width of the images in pixels, if the file leaves them open.",
        ),
    ] = None,
    preprocess: options.Preprocess = None,
    class_names: options.ClassNames = None,
    name: options.ModelName = None,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Put maps into a Vision Transformer's ONNX file.

    The file may come from any exporter, and PyTorch is not needed. Its nodes and outputs stay as
    they are, and outputs for saliency maps and scores are added. These come from the closed form if
    the graph permits it, else from a loop that runs the last block once per mask. Explain pictures
    with the new file: explain IMAGE --model OUT.onnx.
    """
    with errors_in_one_line(debug):
        try:
            from vit_reciprocam.onnx.insert.insert import insert
        except ModuleNotFoundError as error:
            raise MissingDependencyError("insert", "onnx") from error
        done = insert(
            source,
            destination,
            **options.drop_none(
                {"kernel": kernel, "class_token": class_token, "normalize": normalize}
            ),
            targets=target,
            raw=raw,
            grid=options.parse_size(grid, "--grid"),
            size=options.parse_size(size),
            target_node=target_node,
            class_names=None if class_names is None else options.read_lines(class_names),
            preprocess=preprocess,
            name=name,
        )
    if as_json:
        typer.echo(json.dumps({"file": str(destination), **dataclasses.asdict(done)}, indent=2))
        return
    height, width = done.grid
    difference = f"{done.difference:.1e} of the largest"
    _print_facts(
        {
            "file": str(destination),
            "path": _describe_path(done.path, done.direct_because),
            "masked": done.normed,
            "tokens": f"{done.prefix_tokens} + {height}x{width}, {done.classes} classes",
            "check": f"scores differ from the file's own nodes under masks by {difference}",
        }
    )


def _print_facts(facts: Mapping[str, str]) -> None:
    """Print a table with one line per fact: its name and its text."""
    table = Table(show_header=False)
    for name, fact in facts.items():
        table.add_row(name, escape(fact))
    out.print(table)


def _describe_path(path: str, because: str) -> str:
    """Return the path that an explained file takes, and the reason if it is the direct one."""
    return f"{path}, since {because}" if because else path
