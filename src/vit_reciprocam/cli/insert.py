"""`vit-reciprocam insert`: put maps into an ONNX file from any exporter."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from vit_reciprocam.cli import options
from vit_reciprocam.cli.console import describe_path, errors_in_one_line, print_facts
from vit_reciprocam.errors import MissingDependencyError

__all__ = ["insert_command"]


def insert_command(
    source: Annotated[
        Path, typer.Argument(metavar="IN.onnx", help="File of the model, from any exporter.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="File to write.")],
    target: options.FileTargets = "all",
    kernel: options.Kernel = None,
    class_token: options.ClassToken = None,
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
            **options.drop_none({"kernel": kernel, "class_token": class_token}),
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
    print_facts(
        {
            "file": str(destination),
            "path": describe_path(done.path, done.direct_because),
            "masked": done.normed,
            "tokens": f"{done.prefix_tokens} + {height}x{width}, {done.classes} classes",
            "check": f"scores differ from the file's own nodes under masks by {difference}",
        }
    )
