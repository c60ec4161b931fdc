"""Cut the untouched model out of an explained file, to measure what the explanation costs."""

from __future__ import annotations

from pathlib import Path

from vit_reciprocam.errors import MissingDependencyError, ModelError
from vit_reciprocam.onnx.contract import Metadata

__all__ = ["cut_out_prediction"]

_PRODUCTS = ("MatMul", "Gemm", "Conv", "MatMulInteger", "QLinearMatMul")


def cut_out_prediction(path: Path, about: Metadata, out: Path) -> None:
    """Write to another file only those nodes of an explained file that its logits need.

    They are the untouched model if the explanation was inserted. A file in which prediction and
    maps come from the same operations, as in those that `export` writes, is refused.
    """
    try:
        import onnx.utils

        import onnx
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"cutting {path} down to its prediction (or give the untouched model: --plain FILE)",
            "onnx",
        ) from error
    from vit_reciprocam.onnx.insert.graph import Graph

    graph = Graph(onnx.load(path, load_external_data=False), path.parent)
    needed = graph.nodes_above([about.logits])
    above_maps = graph.nodes_above(["scores"], until=["classes"])
    # An inserted branch shares the nodes before F and has copies of those after it. So if the maps
    # need the prediction's last product too, nothing was inserted.
    last = [number for number in needed if graph.nodes[number].op_type in _PRODUCTS]
    if last and max(last) in above_maps:
        raise ModelError(
            f"in {path} prediction and maps come from the same operations, so the untouched model "
            "cannot be cut out of it: give that as a file of its own, --plain FILE"
        )
    onnx.utils.extract_model(path, out, [about.images], [about.logits], check_model=False)
