"""`vit-reciprocam insert`: maps put into an ONNX file from anywhere."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from vit_reciprocam.cli.console import (
    AsJson,
    ClassNames,
    ClassToken,
    Debug,
    FileName,
    FileTargets,
    Raw,
    UseKernel,
    UsePreprocess,
    errors_in_one_line,
    parse_size,
    path_and_reason,
    print_facts,
    read_lines,
)
from vit_reciprocam.errors import MissingDependencyError

__all__ = [
    "insert_command",
]


def insert_command(
    source: Annotated[Path, typer.Argument(metavar="IN.onnx", help="Of any exporter.")],
    destination: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="The file to write.")],
    target: FileTargets = "all",
    kernel: UseKernel = "gaussian",
    class_token: ClassToken = True,
    raw: Raw = False,
    target_node: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The value to mask, or its node, where not found."),
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(metavar="HxW", help="Rows and columns of patches, where not found."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="HxW", help="Of the images in pixels, where the file leaves it open."),
    ] = None,
    preprocess: UsePreprocess = None,
    class_names: ClassNames = None,
    name: FileName = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Put maps into a Vision Transformer's ONNX file.

    Whoever exported it: its nodes and outputs stay as they are. Beside them come saliency maps and
    scores, by the closed form where the graph permits, else by a loop that runs the last block once
    a mask. Without PyTorch. Explain pictures with it: explain IMAGE --model OUT.onnx.
    """
    with errors_in_one_line(debug):
        try:
            from vit_reciprocam.onnx.insert.insert import insert
        except ModuleNotFoundError as error:
            raise MissingDependencyError("insert", "onnx") from error
        done = insert(
            source,
            destination,
            kernel=kernel,
            class_token=class_token,
            targets=target,
            raw=raw,
            grid=parse_size(grid, "--grid"),
            size=parse_size(size),
            target_node=target_node,
            class_names=None if class_names is None else read_lines(class_names),
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
            "path": path_and_reason(done.path, done.direct_because),
            "masked": done.normed,
            "tokens": f"{done.prefix_tokens} + {height}x{width}, {done.classes} classes",
            "check": f"scores differ from the file's own nodes under masks by {difference}",
        }
    )
