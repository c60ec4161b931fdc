"""Write an exported graph to its place, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

import onnx
from vit_reciprocam.errors import ModelError

__all__ = ["file_names", "write_then_move"]

_SMALL = 1024  # smaller constants stay in the ONNX file


def file_names(path: Path, *, external_data: bool) -> tuple[Path, ...]:
    """Return the files of a model: its graph, and its weights if they are separate."""
    return (path, path.with_name(f"{path.name}.data")) if external_data else (path,)


@contextlib.contextmanager
def write_then_move(model: ir.Model, path: Path, *, external_data: bool) -> Iterator[Path]:
    """Write a model to a hidden folder beside its place, and yield that file to check it.

    When the block ends, the file is moved to its place. After an error in the block the new file is
    gone, and an older one is still in its place.
    """
    names = [file.name for file in file_names(path, external_data=external_data)]
    data = names[1] if external_data else None
    folder = path.with_name(f".{uuid.uuid4().hex}.tmp")
    folder.mkdir()
    try:
        ir.save(model, folder / path.name, external_data=data, size_threshold_bytes=_SMALL)
        try:
            onnx.checker.check_model(folder / path.name, full_check=True)
        except Exception as error:  # the checker and its shape inference share no base
            raise ModelError(f"ONNX's checker refuses the exported graph: {error}") from error
        yield folder / path.name
        _move(names, folder, path.parent)
    finally:
        shutil.rmtree(folder)


def _move(names: list[str], source: Path, destination: Path) -> None:
    """Move a graph and its weights, so that a graph never lies beside those of another."""
    graph, *weights = names
    for name in names:
        with (source / name).open("rb") as file:
            os.fsync(file.fileno())
    if weights:
        (destination / graph).unlink(missing_ok=True)
    for name in (*weights, graph):
        (source / name).replace(destination / name)
