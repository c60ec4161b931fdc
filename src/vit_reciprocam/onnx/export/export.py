"""A PyTorch model as one ONNX file that gives prediction and maps, checked before it is there."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

import onnx
from vit_reciprocam.core.masks import Masking
from vit_reciprocam.core.split import Cut, Split, logits_of
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.libraries.dispatch import split_model
from vit_reciprocam.libraries.validation import check_mode
from vit_reciprocam.onnx.contract import Metadata, check_file_targets
from vit_reciprocam.onnx.export.check import compare, written
from vit_reciprocam.onnx.export.trace import (
    Explained,
    clean,
    insert_loop,
    masks_at_once,
    store_as_half,
    trace,
)
from vit_reciprocam.onnx.paths import check_output
from vit_reciprocam.pictures.preprocess import Preprocess
from vit_reciprocam.results.files import library_versions

__all__ = ["Exported", "export", "export_plain"]

OPSET = 18
_LEAST_OPSET = 17
_LARGE = 2_000_000_000  # bytes of weights; an ONNX file itself ends at 2 GiB
_TRACED, _CHECKED = 2, 3  # images; unlike, to find what froze


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        files: The ONNX file, and the file of its weights if that is apart.
        metadata: What the file says of itself.
        direct_because: Why the maps go by the direct path; empty for the closed form.
        inputs: Names.
        outputs: Names.
        opset: Of its operators.
        bytes: Of all files.
        difference: Between PyTorch and ONNX Runtime on random images: the largest, relative to the
            largest value of its output.
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
    targets: str = "all",
    raw: bool = False,
    half: bool = False,
    dynamic_size: bool = False,
    opset: int = OPSET,
    external_data: bool | None = None,
) -> Exported:
    """Write a model with its explanation as an ONNX file.

    It takes `images` and gives `logits`, `saliency` and `scores`.
    The method is that of `ReciproCAM`, with the same settings. Shapes and names stand in
    `vit_reciprocam.onnx.contract`. The batch is dynamic, operators are ONNX's standard ones, and
    the input is float32 on any device. Where the closed form does not hold, a loop runs the end of
    the model a few masks at a time.

    Before the file is in its place it is checked, and run with ONNX Runtime against PyTorch.

    Args:
        model: A supported classifier, or what `load` returns, which brings class names,
            preprocessing and name along. Left as it is.
        path: The file to write; replaced if it is there.
        class_names: One a class, for the file's metadata.
        preprocess: What stands before the model, for the metadata; gives the size of the images.
        name: What the model is called; by default its class.
        size: (height, width) of the images, where the preprocessing does not tell or another is
            wanted.
        kernel: As in `ReciproCAM`.
        class_token: Likewise.
        layer: Likewise.
        targets: Whose maps: "all" classes, or "top1", "top3" … of each image, which `classes` then
            names, or "input", which adds the input `targets`.
        raw: Leave out `saliency`: only the probabilities, not scaled to [0, 1].
        half: Round weights to float16 and store them so: about half the file. Runtimes widen them,
            so it is as fast and runs wherever the other does; the input stays float32.
        dynamic_size: Leave the size of the images open, for models that take several.
        opset: Of ONNX's standard operators, 17 or newer.
        external_data: Whether weights go to a file of their own beside it, `path` + ".data". By
            default where they are too large for one file, about 2 GB.

    Raises:
        InputError: If an option or the image size does not fit.
        ModelError: If the model is not supported or cannot be written, with the reason, or if the
            file's results differ from PyTorch's. No file is left then.
    """
    model, class_names, preprocess, name = _brought(model, class_names, preprocess, name)
    masking = Masking(kernel=kernel, class_token=class_token, layer=layer)
    top = check_file_targets(targets)
    path = check_output(path)
    _check_opset(opset)
    preprocess, size = _sized(preprocess, size)
    _check_model(model)
    work = _portable(model, half=half)
    split = split_model(work, pool=layer == "pool")
    direct = bool(split.direct_because)
    sizes = [size]
    cut, classes = _tried(work, split, size)
    if dynamic_size:
        step = size[0] // cut.grid[0], size[1] // cut.grid[1]
        sizes.append(_another_size(work, split, size, step, direct))
    _check_classes(classes, class_names, top)

    module = Explained(work, masking, direct=direct, top=top, raw=raw)
    # Of several sizes the other one: at its own a model may skip to resize its position embedding.
    inputs = {"images": torch.zeros(_TRACED, 3, *sizes[-1])}
    batch = Dim("batch")
    dynamic: dict[str, dict[int, Any]] = {"images": {0: batch}}
    if dynamic_size:
        rows, columns = Dim("rows", min=2), Dim("columns", min=2)
        dynamic["images"] |= {2: step[0] * rows, 3: step[1] * columns}
    if targets == "input":
        inputs["targets"] = torch.zeros(_TRACED, 2, dtype=torch.int64)
        dynamic["targets"] = {0: batch, 1: Dim("targets")}
    outputs = ["logits", *([] if raw else ["saliency"]), "scores", *(["classes"] if top else [])]
    more = []
    if direct:
        count = cut.grid[0] * cut.grid[1]
        inputs["masks"] = torch.ones(masks_at_once(count), split.prefix_tokens + count)
        inputs["rows"] = torch.zeros(count, _TRACED, classes)
        dynamic["rows"] = {1: batch}
        more = ["chunk"]
    graph = trace(module, inputs, outputs=[*outputs, *more], dynamic=dynamic, opset=opset)
    if direct:
        insert_loop(graph, cut.grid, masking, prefix_tokens=split.prefix_tokens, classes=classes)
    clean(graph)
    if half:
        store_as_half(graph)
    metadata = Metadata(
        name=name,
        masking=masking,
        path="direct" if direct else "closed-form",
        targets=targets,
        class_names=None if class_names is None else tuple(class_names),
        preprocess=preprocess,
        versions=library_versions(),
    )
    graph.metadata_props.update(metadata.to_properties())
    apart = _bytes(work) > _LARGE if external_data is None else external_data
    with written(graph, path, external_data=apart) as (file, done):
        count = 1 if direct else _CHECKED
        try:
            difference = max(
                compare(file, work, masking, metadata, (count, 3, *one)) for one in sizes
            )
        except ModelError as error:
            if not dynamic_size:
                raise
            raise ModelError(
                "the size of the images cannot stay open, since parts of the model are traced for "
                f"one size only ({error}). Leave out dynamic_size"
            ) from error
        files = done()
    return Exported(
        files=files,
        metadata=metadata,
        direct_because=split.direct_because,
        inputs=("images", "targets") if targets == "input" else ("images",),
        outputs=tuple(outputs),
        opset=opset,
        bytes=sum(each.stat().st_size for each in files),
        difference=difference,
    )


class _Plain(nn.Module):
    """Logits alone, of models that wrap them too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.training = model.training
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.model(images))


def export_plain(
    model: nn.Module, path: str | os.PathLike[str], *, size: tuple[int, int], opset: int = OPSET
) -> None:
    """Write the model alone by the same exporter, to hold an explanation's cost against.

    Args:
        model: As in `export`.
        path: Likewise.
        size: (height, width) of the images.
        opset: As in `export`.
    """
    graph = trace(
        _Plain(_portable(model, half=False)),
        {"images": torch.zeros(_TRACED, 3, *size)},
        outputs=["logits"],
        dynamic={"images": {0: Dim("batch")}},
        opset=opset,
    )
    clean(graph)
    with written(graph, check_output(path), external_data=_bytes(model) > _LARGE) as (_, done):
        done()


def _brought(
    model: Any, class_names: Any, preprocess: Preprocess | None, name: str | None
) -> tuple[nn.Module, Sequence[str] | None, Preprocess | None, str]:
    """The module, and what a `Classifier` brings along."""
    if isinstance(model, nn.Module):
        return model, class_names, preprocess, name or type(model).__name__
    inner = getattr(model, "model", None)
    if not hasattr(model, "preprocess"):
        raise ModelError(
            "model must be a torch.nn.Module or what vit_reciprocam.load returns, got "
            f"{type(model).__name__}"
        )
    if not isinstance(inner, nn.Module):
        raise ModelError(
            f"{name or model.name} is no PyTorch model but an ONNX file already: copy the file, or "
            "export the model that it was made from"
        )
    return (
        inner,
        model.class_names if class_names is None else class_names,
        preprocess or model.preprocess,
        name or model.name,
    )


def _check_opset(opset: int) -> None:
    newest = onnx.defs.onnx_opset_version()
    if not isinstance(opset, int) or not _LEAST_OPSET <= opset <= newest:
        raise InputError(
            f"opset must be between {_LEAST_OPSET}, the first with LayerNormalization, and "
            f"{newest}, the newest of the installed onnx; got {opset!r}"
        )


def _sized(
    preprocess: Preprocess | None, size: tuple[int, int] | None
) -> tuple[Preprocess | None, tuple[int, int]]:
    if size is None:
        if preprocess is None:
            raise InputError(
                "the size of the images is not known: pass size=(height, width) or preprocess="
            )
        return preprocess, preprocess.size
    good = len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)
    if not good:
        raise InputError(f"size must be (height, width) in pixels, got {size!r}")
    size = (size[0], size[1])
    return preprocess and dataclasses.replace(preprocess, size=size), size


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(model.parameters(), model.buffers())


def _bytes(model: nn.Module) -> int:
    return 4 * sum(tensor.numel() for tensor in _tensors(model))


def _check_model(model: nn.Module) -> None:
    """Refuse what cannot run, or not for sure the same each time."""
    if any(tensor.is_meta for tensor in _tensors(model)):
        raise ModelError(
            f"the {type(model).__name__} is on the meta device, which holds shapes and no numbers: "
            "load its weights onto a device"
        )
    check_mode(model)
    split_model(model)  # whose reasons name the user's own model, not a copy


def _portable(model: nn.Module, *, half: bool) -> nn.Module:
    """The model in float32 on the CPU, a copy where it is not; with `half` a rounded copy."""
    floats = [tensor for tensor in _tensors(model) if tensor.is_floating_point()]
    plain = all(one.dtype == torch.float32 for one in floats)
    if plain and not half and all(one.device.type == "cpu" for one in _tensors(model)):
        return model
    try:
        made = copy.deepcopy(model).to("cpu").float()
    except Exception as error:  # anything that a module's state may hold
        raise ModelError(
            f"the model cannot be copied, which float32 on the CPU needs ({error}): convert it "
            "with model.float().cpu() before"
        ) from error
    if half:
        with torch.no_grad():
            for weight in made.parameters():
                rounded = weight.half().float()
                if not rounded.isfinite().all():
                    raise ModelError(
                        "weights of this model exceed float16, whose largest number is 65504: "
                        "leave out half"
                    )
                if weight.ndim > 1:
                    weight.copy_(rounded)
    return made


@torch.no_grad()
def _tried(model: nn.Module, split: Split, size: tuple[int, int]) -> tuple[Cut, int]:
    """The cut of one image of a size, and the number of classes."""
    cut = split.cut(torch.zeros(1, 3, *size))
    logits = cut.rest(cut.norm(cut.x), cut.x)
    if logits.ndim != 2:
        raise ModelError(
            f"the model gives {tuple(logits.shape)} for an image, not one score a class"
        )
    return cut, logits.shape[1]


def _another_size(
    model: nn.Module, split: Split, size: tuple[int, int], step: tuple[int, int], direct: bool
) -> tuple[int, int]:
    """Another size that the model takes.

    Raises:
        InputError: If there is none, with the model's reason.
    """
    if direct:
        raise InputError(
            "this model's maps need a loop over the masks of one image size "
            f"({split.direct_because}): leave out dynamic_size"
        )
    another = size[0] + step[0], size[1] + 2 * step[1]
    try:
        _tried(model, split, another)
    except (InputError, AssertionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"the size of the images cannot stay open: {error}. Leave out dynamic_size"
        ) from error
    return another


def _check_classes(classes: int, class_names: Sequence[str] | None, top: int | None) -> None:
    if class_names is not None and len(class_names) != classes:
        raise InputError(f"{len(class_names)} class names given for a model of {classes} classes")
    if top is not None and top > classes:
        raise InputError(f"targets='top{top}' of a model of {classes} classes: ask for fewer")
