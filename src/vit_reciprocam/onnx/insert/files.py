"""Read and write ONNX files, with weights in files beside them."""

from __future__ import annotations

import shutil
from pathlib import Path

from google.protobuf.message import DecodeError

import onnx
from onnx import external_data_helper
from vit_reciprocam.errors import ModelError
from vit_reciprocam.onnx.files import find_weights, write_then_move

__all__ = ["external_files", "load_model", "save_model"]


def load_model(path: Path) -> onnx.ModelProto:
    """Read a model without the weights in files beside it, of which only the paths are checked."""
    if not path.is_file():
        raise ModelError(f"no such model file: {path}")
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ModelError(f"{path} is not an ONNX file, or was cut short") from error
    if not model.graph.node or not model.opset_import:
        raise ModelError(f"{path} is not an ONNX file, or was cut short")
    folder = path.parent.resolve()
    for place in external_files(model):
        # A link out of the folder is refused too: insert copies the file that it leads to.
        if not find_weights(path, place).resolve().is_relative_to(folder):
            raise ModelError(
                f"{path} asks for weights outside its folder, by the link {place!r}: that is "
                "refused. Put the file itself in place of the link"
            )
    return model


def save_model(model: onnx.ModelProto, path: Path, *, folder: Path) -> None:
    """Write a model, whole or not at all, and copy its external weights from `folder` beside it."""
    names = {
        place: f"{path.name}.{number}.data" for number, place in enumerate(external_files(model))
    }
    with write_then_move(path) as file:
        if path.parent.resolve() != folder.resolve():
            for place, name in names.items():
                shutil.copyfile(folder / place, file.with_name(name))
            for entry in _locations(model):
                entry.value = names[entry.value]
        file.write_bytes(model.SerializeToString())


def external_files(model: onnx.ModelProto) -> list[str]:
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
