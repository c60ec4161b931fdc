"""Export a PyTorch model as one ONNX file that gives prediction and maps."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

import onnx
from vit_reciprocam.core.masks import Masking, read_maskings
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.libraries.dispatch import split_model
from vit_reciprocam.onnx.contract import Metadata, check_classes, check_file_targets
from vit_reciprocam.onnx.export import edit, prepare
from vit_reciprocam.onnx.export.check import compare
from vit_reciprocam.onnx.export.trace import ModelWithMaps, trace
from vit_reciprocam.onnx.files import check_output, write_then_move
from vit_reciprocam.pictures.preprocess import Preprocess
from vit_reciprocam.results.files import library_versions

__all__ = ["OPSET", "ExportedFile", "export"]

OPSET = 18
_LEAST_OPSET = 17
_LARGE = 2_000_000_000  # bytes of weights; an ONNX file itself cannot exceed 2 GiB
# Batch sizes. They differ, so that the check fails if the trace froze the batch size.
_TRACED, _CHECKED = 2, 3
_BATCH = Dim("batch")


@dataclass(frozen=True)
class ExportedFile:
    """What `export` has written.

    Attributes:
        files: The ONNX file, and the file of its weights if they are separate.
        metadata: Metadata of the file.
        direct_because: Why maps are computed by the direct path; empty for the closed form.
        inputs: Names of the graph's inputs.
        outputs: Names of the graph's outputs.
        opset: Version of ONNX's operators.
        bytes: Size of all files together.
        difference: Largest difference between PyTorch and ONNX Runtime on random images, relative
            to the largest value of the same output.
    """

    files: tuple[Path, ...]
    metadata: Metadata
    direct_because: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    opset: int
    bytes: int
    difference: float


def export(
    model: Any,
    path: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    preprocess: Preprocess | None = None,
    name: str | None = None,
    size: tuple[int, int] | None = None,
    kernel: str = "gaussian",
    class_token: bool = True,
    layer: str = "norm1",
    depth: int = 1,
    normalize: str = "minmax",
    fuse: Sequence[Mapping[str, Any]] = (),
    targets: str = "all",
    raw: bool = False,
    half: bool = False,
    dynamic_size: bool = False,
    opset: int = OPSET,
    external_data: bool | None = None,
) -> ExportedFile:
    """Write a model with its explanation as an ONNX file.

    The file takes `images` and gives `logits`, `saliency` and `scores`, as described by
    `vit_reciprocam.onnx.contract`. The method is that of `ReciproCAM`, with the same settings. The
    batch is dynamic, operators are ONNX's standard ones, and the input is float32. If the closed
    form does not hold, a loop runs the end of the model for a few masks at a time.

    The file is moved to its place only after ONNX Runtime has computed PyTorch's results from it.

    Args:
        model: A supported classifier, or what `load` returns, which also has class names,
            preprocessing and name. It is left as it is.
        path: File to write; replaced if it exists.
        class_names: One name per class, for the file's metadata.
        preprocess: Preprocessing of pictures for the model, for the file's metadata; it also gives
            the size of the images.
        name: Name of the model; by default that of its Python class.
        size: (height, width) of the images in pixels, if the preprocessing does not give it or
            you want another.
        kernel: Window kept around each patch, as in `ReciproCAM`.
        class_token: Whether prefix tokens are kept, as in `ReciproCAM`.
        layer: Place where tokens are masked, as in `ReciproCAM`.
        depth: Number of masked blocks, as in `ReciproCAM`.
        normalize: "minmax" or "evidence", as in `ReciproCAM`. With evidence, which needs the closed
            form, the output `scores` holds the signed evidence.
        fuse: Settings whose evidence is fused, as in `ReciproCAM`.
        targets: Which classes are explained: "all"; "top1", "top3" … of each image, which are then
            the output `classes`; or "input", which adds the input `targets`.
        raw: Whether to leave out `saliency`, the scores scaled to [0, 1].
        half: Whether to round weights to float16 and store them so, in about half the space.
            Runtimes widen them, so the file is as fast and runs wherever the full one does; the
            input stays float32.
        dynamic_size: Whether to leave the size of the images open, for models that take several.
        opset: Version of ONNX's standard operators, 17 or newer.
        external_data: Whether weights go to a separate file, `path` + ".data". By default they do
            if they take more than 2 GB, which is too large for one file.

    Raises:
        InputError: If an option or the image size does not fit.
        ModelError: If the model is not supported or cannot be written, with the reason, or if the
            file's results differ from PyTorch's. No file is left then.
    """
    model, class_names, preprocess, name = prepare.unpack_classifier(
        model, class_names, preprocess, name
    )
    masking = Masking(kernel=kernel, class_token=class_token, layer=layer, depth=depth)
    maskings = read_maskings(masking, normalize, fuse)
    top = check_file_targets(targets)
    path = check_output(path)
    newest = onnx.defs.onnx_opset_version()
    if not isinstance(opset, int) or not _LEAST_OPSET <= opset <= newest:
        raise InputError(
            f"opset must be between {_LEAST_OPSET}, the first with LayerNormalization, and "
            f"{newest}, the newest of the installed onnx; got {opset!r}"
        )
    preprocess, size = prepare.choose_size(preprocess, size)
    prepare.check_model(model)
    converted = prepare.convert_to_float32(model, half=half)
    deepest = max(one.depth for one in maskings)
    split = split_model(converted, pool=layer == "pool", depth=deepest)
    if split.direct_because and (deepest > 1 or normalize == "evidence"):
        raise ModelError(
            "depth and evidence need the closed form in a file, and it does not hold for this "
            f"model: {split.direct_because}. Leave out depth and normalize"
        )
    cut, classes = prepare.cut_example(split, size)
    patch = size[0] // cut.grid[0], size[1] // cut.grid[1]
    sizes = [size, prepare.find_second_size(split, size, patch)] if dynamic_size else [size]
    check_classes(classes, class_names, top)

    outputs = ["logits", *([] if raw else ["saliency"]), "scores", *(["classes"] if top else [])]
    module = ModelWithMaps(converted, maskings, normalize=normalize, top=top, raw=raw)
    # If there are two sizes, the second is traced: at its own size a model may not resize its
    # position embedding, and the trace would lack that.
    inputs = {"images": torch.zeros(_TRACED, 3, *sizes[-1])}
    # input -> its free dimensions -> a Dim, or a multiple of one
    dynamic: dict[str, dict[int, Any]] = {"images": {0: _BATCH}}
    if dynamic_size:
        rows, columns = Dim("rows", min=2), Dim("columns", min=2)
        dynamic["images"] |= {2: patch[0] * rows, 3: patch[1] * columns}
    if targets == "input":
        inputs["targets"] = torch.zeros(_TRACED, 2, dtype=torch.int64)
        dynamic["targets"] = {0: _BATCH, 1: Dim("targets")}
    chunk = []
    if (
        split.direct_because
    ):  # see `ModelWithMaps`: one chunk of masks, and the logits of all chunks
        count = cut.grid[0] * cut.grid[1]
        inputs["masks"] = torch.ones(edit.chunk_size(count), split.prefix_tokens + count)  # (M, T)
        inputs["rows"] = torch.zeros(count, _TRACED, classes)  # (N, B, C)
        dynamic["rows"] = {1: _BATCH}
        chunk = ["chunk"]
    graph = trace(module, inputs, outputs=[*outputs, *chunk], dynamic=dynamic, opset=opset)
    if split.direct_because:
        edit.loop_over_masks(
            graph, cut.grid, masking, prefix_tokens=split.prefix_tokens, classes=classes
        )
    edit.strip_notes(graph)
    if half:
        edit.store_as_half(graph)
    metadata = Metadata(
        name=name,
        masking=masking,
        path="direct" if split.direct_because else "closed-form",
        normalize=normalize,
        fuse=maskings if fuse else (),
        targets=targets,
        class_names=None if class_names is None else tuple(class_names),
        preprocess=preprocess,
        versions=library_versions(),
    )
    graph.metadata_props.update(metadata.to_properties())
    if external_data is None:
        numbers = sum(tensor.numel() for tensor in prepare.all_tensors(converted))
        external_data = 4 * numbers > _LARGE
    with write_then_move(path) as file:
        edit.save(graph, file, external_data=external_data)
        difference = _compare_at(sizes, file, converted, metadata)
    files = (path, path.with_name(f"{path.name}.data")) if external_data else (path,)
    return ExportedFile(
        files=files,
        metadata=metadata,
        direct_because=split.direct_because,
        inputs=("images", "targets") if targets == "input" else ("images",),
        outputs=tuple(outputs),
        opset=opset,
        bytes=sum(each.stat().st_size for each in files),
        difference=difference,
    )


def _compare_at(
    sizes: Sequence[tuple[int, int]], file: Path, model: nn.Module, metadata: Metadata
) -> float:
    """Return the largest difference from PyTorch at any of the sizes; refuse it if too large."""
    count = 1 if metadata.path == "direct" else _CHECKED
    try:
        return max(compare(file, model, metadata, (count, 3, *size)) for size in sizes)
    except ModelError as error:
        if len(sizes) == 1:
            raise
        raise ModelError(
            "the size of the images cannot stay open, since parts of the model are traced for one "
            f"size only ({error}). Leave out dynamic_size"
        ) from error
