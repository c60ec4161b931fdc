"""One ONNX file that gives the prediction and every class's map: the closed form as a graph."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

import vit_reciprocam
from vit_reciprocam.adapters import check_mode, split_model
from vit_reciprocam.closed_form import closed_form_rows
from vit_reciprocam.errors import ClosedFormError
from vit_reciprocam.files import write_atomically
from vit_reciprocam.images import Preprocess
from vit_reciprocam.masks import Masking
from vit_reciprocam.onnx.metadata import Metadata

__all__ = ["export_explainer", "export_plain"]

OPSET = 18


class _Explained(nn.Module):
    """images -> logits (B, C), saliency (B, C, h, w) in [0, 1], scores (B, C, h, w)."""

    def __init__(self, model: nn.Module, masking: Masking) -> None:
        super().__init__()
        self.training = model.training
        self.model = model
        self.masking = masking

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        split = split_model(self.model, pool=self.masking.layer == "pool")
        cut = split.cut(images)
        count = 1 + cut.grid[0] * cut.grid[1]
        rows = closed_form_rows(cut, split.prefix_tokens, self.masking)(0, count)
        scores = rows[1:].softmax(dim=-1).permute(1, 2, 0)
        low, high = scores.amin(dim=-1, keepdim=True), scores.amax(dim=-1, keepdim=True)
        flat = high - low <= 4 * torch.finfo(torch.float32).eps * high
        saliency = torch.where(flat, 0.0, (scores - low) / torch.where(flat, 1.0, high - low))
        return rows[0], saliency.unflatten(2, cut.grid), scores.unflatten(2, cut.grid)


def export_explainer(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    class_names: Sequence[str],
    preprocess: Preprocess,
    name: str,
    masking: Masking | None = None,
) -> None:
    """Write a model with its explanation: `images` -> `logits`, `saliency` and `scores`.

    The batch is dynamic.

    Args:
        model: A classifier for which the closed form holds, in evaluation mode, float32.
        path: The file to write.
        class_names: One a class, for the file's metadata.
        preprocess: What stands before the model; gives the image size.
        name: What the model is called.
        masking: What to keep and where to cut; by default as in the paper.

    Raises:
        ClosedFormError: If the closed form does not hold for the model.
        InputError: If the masking is before a pooling that the model does not have.
    """
    check_mode(model)
    masking = masking or Masking()
    reason = split_model(model, pool=masking.layer == "pool").direct_because
    if reason:
        raise ClosedFormError(f"only closed-form models can be exported: {reason}")
    metadata = Metadata(
        name=name,
        class_names=tuple(class_names),
        preprocess=preprocess,
        masking=masking,
        version=vit_reciprocam.__version__,
    )
    _export(
        _Explained(model, masking), path, ("logits", "saliency", "scores"), preprocess, metadata
    )


def export_plain(model: nn.Module, path: str | os.PathLike[str], *, preprocess: Preprocess) -> None:
    """Write the model alone by the same exporter, to hold an explanation's cost against."""
    _export(model, path, ("logits",), preprocess, None)


def _export(
    module: nn.Module,
    path: str | os.PathLike[str],
    outputs: tuple[str, ...],
    preprocess: Preprocess,
    metadata: Metadata | None,
) -> None:
    images = torch.zeros(2, 3, *preprocess.size)
    with torch.no_grad():
        program = torch.onnx.export(
            module,
            (images,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=list(outputs),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    graph = proto.graph
    for part in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        del part.metadata_props[:]  # the exporter's notes hold paths of the machine it ran on
    for initializer in graph.initializer:
        del initializer.metadata_props[:]
    for key, value in (metadata.to_properties() if metadata else {}).items():
        proto.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(proto, full_check=True)
    write_atomically(Path(path), proto.SerializeToString())
