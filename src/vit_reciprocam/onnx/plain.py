"""The untouched model of an explained file, to hold the explanation's cost against."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vit_reciprocam.errors import MissingDependencyError, ModelError
from vit_reciprocam.onnx.header import read_header
from vit_reciprocam.onnx.metadata import Metadata

if TYPE_CHECKING:
    import onnx

__all__ = ["cut_plain"]

_WEIGHING = ("MatMul", "Gemm", "Conv", "MatMulInteger", "QLinearMatMul")


def cut_plain(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Write a file cut down to its prediction, the nodes that the logits need.

    That is the untouched model where the explanation was inserted beside it. Where prediction and
    maps come from the same operations, as in files that `export` writes, it is not, and is refused.

    Args:
        path: A file with an explanation.
        out: Where to write it; its weights lie in it or beside it.

    Raises:
        ModelError: If the prediction cannot be cut out.
        MissingDependencyError: If the package onnx is not installed.
    """
    about = Metadata.from_properties(read_header(path).properties, file=str(path))
    try:
        import onnx
        import onnx.utils
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"cutting {path} down to its prediction (or give the untouched model: --plain FILE)",
            "onnx",
        ) from error
    model = onnx.load(path, load_external_data=False)
    needed = _needed(model, about.logits, stop=())
    of_maps = _needed(model, "scores", stop=("classes",))
    last = [number for number in needed if model.graph.node[number].op_type in _WEIGHING]
    if last and max(last) in of_maps:
        raise ModelError(
            f"in {path} prediction and maps come from the same operations, so the untouched model "
            "cannot be cut out of it: give that as a file of its own, --plain FILE"
        )
    onnx.utils.extract_model(path, out, [about.images], [about.logits], check_model=False)


def _needed(model: onnx.ModelProto, output: str, stop: tuple[str, ...]) -> set[int]:
    """Numbers of the nodes that an output needs, not going on through values in `stop`."""
    maker = {
        name: number for number, node in enumerate(model.graph.node) for name in node.output if name
    }
    found: set[int] = set()
    waiting = [output]
    while waiting:
        name = waiting.pop()
        number = maker.get(name)
        if number is None or number in found or name in stop:
            continue
        found.add(number)
        waiting += model.graph.node[number].input
    return found
