"""The untouched model of an explained file, to hold the explanation's cost against."""

from __future__ import annotations

import os
from pathlib import Path

from vit_reciprocam.errors import MissingDependencyError, ModelError
from vit_reciprocam.onnx.contract import Metadata
from vit_reciprocam.onnx.run.protobuf import read_header

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
        import onnx.utils

        import onnx
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"cutting {path} down to its prediction (or give the untouched model: --plain FILE)",
            "onnx",
        ) from error
    model = onnx.load(path, load_external_data=False)
    from vit_reciprocam.onnx.insert.graph import Graph

    graph = Graph(model, Path(path).parent)
    needed = graph.above([about.logits])
    of_maps = graph.above(["scores"], until=["classes"])
    last = [number for number in needed if graph.nodes[number].op_type in _WEIGHING]
    if last and max(last) in of_maps:
        raise ModelError(
            f"in {path} prediction and maps come from the same operations, so the untouched model "
            "cannot be cut out of it: give that as a file of its own, --plain FILE"
        )
    onnx.utils.extract_model(path, out, [about.images], [about.logits], check_model=False)
