"""Check the path of a file to write, and the paths of weights that lie beside a file."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

from vit_reciprocam.errors import InputError, ModelError

__all__ = ["check_output", "find_weights"]


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
