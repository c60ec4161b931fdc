"""Read and write ONNX files, with weights in files beside them."""

from __future__ import annotations

import shutil
from pathlib import Path

from google.protobuf.message import DecodeError

import onnx
from onnx import external_data_helper, inliner
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.onnx.files import find_weights, write_then_move

__all__ = ["find_opset", "load_model", "save_model"]

_LEAST_OPSET = 11


def load_model(path: Path, destination: Path) -> onnx.ModelProto:
    """Read a model that is to be written to another place, with calls of its functions inlined.

    Weights in files beside it stay there; only their paths are checked.
    """
    if not path.is_file():
        raise ModelError(f"no such model file: {path}")
    damaged = ModelError(f"{path} is not an ONNX file, or was cut short")
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise damaged from error
    if not model.graph.node or not model.opset_import:
        raise damaged
    folder, files = path.parent.resolve(), [path]
    for place in _external_files(model):
        weights = find_weights(path, place)
        # A link out of the folder is refused too: insert copies the file that it leads to.
        if not weights.resolve().is_relative_to(folder):
            raise ModelError(
                f"{path} asks for weights outside its folder, by the link {place!r}: that is "
                "refused. Put the file itself in place of the link"
            )
        files.append(weights)
    if destination.resolve() in [file.resolve() for file in files]:
        raise InputError(f"{destination} belongs to the file to read: write to another place")
    opset, newest = find_opset(model), onnx.defs.onnx_opset_version()
    if not _LEAST_OPSET <= opset <= newest:
        raise ModelError(
            f"{path} is written in opset {opset}; {_LEAST_OPSET} to {newest} are read here"
        )
    return inliner.inline_local_functions(model) if model.functions else model


def find_opset(model: onnx.ModelProto) -> int:
    """Return the version of ONNX's own operators in a model."""
    versions = [each.version for each in model.opset_import if each.domain in ("", "ai.onnx")]
    return max(versions, default=0)


def save_model(model: onnx.ModelProto, path: Path, *, folder: Path) -> None:
    """Write a model, whole or not at all, and copy its external weights from `folder` beside it."""
    names = {
        place: f"{path.name}.{number}.data" for number, place in enumerate(_external_files(model))
    }
    with write_then_move(path) as file:
        if path.parent.resolve() != folder.resolve():
            for place, name in names.items():
                shutil.copyfile(folder / place, file.with_name(name))
            for entry in _locations(model):
                entry.value = names[entry.value]
        file.write_bytes(model.SerializeToString())


def _external_files(model: onnx.ModelProto) -> list[str]:
    """Return the paths of external weights, relative to the folder of the model's file."""
    return sorted({entry.value for entry in _locations(model)})


def _locations(model: onnx.ModelProto) -> list[onnx.StringStringEntryProto]:
    return [
        entry
        for tensor in external_data_helper._get_all_tensors(model)
        if external_data_helper.uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    ]
