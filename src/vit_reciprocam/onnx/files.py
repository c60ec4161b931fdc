"""Find the weights that lie beside an ONNX file, and write such a file whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from vit_reciprocam.errors import InputError, ModelError

__all__ = ["check_output", "find_weights", "write_then_move"]


def check_output(path: str | os.PathLike[str]) -> Path:
    """Return the path as a `Path`; refuse one to which no ONNX file can be written."""
    file = Path(path)
    if file.suffix != ".onnx":
        raise InputError(f"the file to write must end in .onnx; got {file}")
    if file.is_dir():
        raise InputError(f"{file} is a folder: name a file")
    if not file.parent.is_dir():
        raise InputError(f"there is no folder {file.parent} to write {file.name} to: make it first")
    if not os.access(file.parent, os.W_OK):
        raise InputError(f"{file} cannot be written: no permission for {file.parent}")
    return file


def find_weights(file: Path, location: str) -> Path:
    """Return the file that holds weights of an ONNX file, given by `external_data` in that file.

    The ONNX file may be hostile. So whatever location it gives, nothing outside its own folder is
    opened, on any system and however the path is written. Links in that folder are followed: an
    ONNX file cannot have made them.
    """
    readings = PurePosixPath(location), PureWindowsPath(location)
    if any(path.anchor or ".." in path.parts for path in readings):
        raise ModelError(
            f"{file} asks for weights outside its folder, in {location!r}: that is refused. Store "
            "its weights beside it, by onnx.save(..., save_as_external_data=True)"
        )
    weights = file.parent / location
    if not weights.is_file():
        raise ModelError(
            f"{file} has its weights in {location!r}, which is missing: copy that file into "
            f"{file.parent} too"
        )
    return weights


@contextlib.contextmanager
def write_then_move(path: Path) -> Iterator[Path]:
    """Yield where to write a graph, and files of its weights beside it, before they are moved.

    That place is a hidden folder. When the block ends, all files there are moved beside `path`.
    After an error in the block they are gone, and an older file is still in its place.
    """
    folder = path.with_name(f".{uuid.uuid4().hex}.tmp")
    folder.mkdir()
    try:
        yield folder / path.name
        weights = [file for file in folder.iterdir() if file.name != path.name]
        files = [*weights, folder / path.name]
        for file in files:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        if weights:  # so that a graph never lies beside the weights of another
            path.unlink(missing_ok=True)
        for file in files:
            file.replace(path.with_name(file.name))
    finally:
        shutil.rmtree(folder)
