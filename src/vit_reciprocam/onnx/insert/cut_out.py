"""Cut the untouched model out of an explained file, to hold the explanation's cost against."""

from __future__ import annotations

import os
from pathlib import Path

from vit_reciprocam.errors import MissingDependencyError, ModelError
from vit_reciprocam.onnx.contract import Metadata
from vit_reciprocam.onnx.run.protobuf import read_header

__all__ = ["cut_out_prediction"]

_WEIGHING = ("MatMul", "Gemm", "Conv", "MatMulInteger", "QLinearMatMul")


def cut_out_prediction(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Write the nodes of a file that its logits need as a file of their own.

    That is the untouched model where the explanation was inserted beside it. Where prediction and
    maps come from the same operations, as in files that `export` writes, it is not, and is refused.

    Args:
        path: A file with an explanation.
        out: The file to write; its weights lie in it or beside it.

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
    from vit_reciprocam.onnx.insert.graph import Graph

    graph = Graph(onnx.load(path, load_external_data=False), Path(path).parent)
    needed = graph.nodes_above([about.logits])
    of_maps = graph.nodes_above(["scores"], until=["classes"])
    # An inserted branch shares what stands before F, but has copies of what comes after it. So if
    # the maps need the prediction's last product too, nothing was inserted.
    last = [number for number in needed if graph.nodes[number].op_type in _WEIGHING]
    if last and max(last) in of_maps:
        raise ModelError(
            f"in {path} prediction and maps come from the same operations, so the untouched model "
            "cannot be cut out of it: give that as a file of its own, --plain FILE"
        )
    onnx.utils.extract_model(path, out, [about.images], [about.logits], check_model=False)
