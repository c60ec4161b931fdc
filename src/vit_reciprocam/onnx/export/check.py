"""An ONNX file put in its place whole or not at all, after it was checked against PyTorch."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import nn

import onnx
from vit_reciprocam.core.maps import min_max
from vit_reciprocam.core.masks import Masking
from vit_reciprocam.errors import ModelError
from vit_reciprocam.onnx.contract import Metadata
from vit_reciprocam.reciprocam import ReciproCAM

__all__ = ["compare", "written"]

_TOLERANCE = 1e-4
_SMALL = 1024  # bytes that stay in the file itself


@contextlib.contextmanager
def written(
    model: ir.Model, path: Path, *, external_data: bool
) -> Iterator[tuple[Path, Callable[[], tuple[Path, ...]]]]:
    """Write a model beside its place; the function moves it there, else it is gone afterwards.

    Args:
        model: What to write.
        path: Its place.
        external_data: Whether the weights go to `path` + ".data".

    Raises:
        ModelError: If ONNX's checker refuses it.
    """
    data = f"{path.name}.data" if external_data else None
    folder = path.with_name(f".{uuid.uuid4().hex}.tmp")
    folder.mkdir()
    try:
        ir.save(model, folder / path.name, external_data=data, size_threshold_bytes=_SMALL)
        try:
            onnx.checker.check_model(folder / path.name, full_check=True)
        except Exception as error:  # of its own and of its shape inference
            raise ModelError(f"ONNX's checker refuses the exported graph: {error}") from error
        yield folder / path.name, lambda: _moved(folder, path, data)
    finally:
        shutil.rmtree(folder)


def _moved(folder: Path, path: Path, data: str | None) -> tuple[Path, ...]:
    """Move the files to their place: at no moment does a graph lie there with other weights."""
    names = [path.name] if data is None else [data, path.name]
    for name in names:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    if data is not None:
        path.unlink(missing_ok=True)
    for name in names:
        (folder / name).replace(path.with_name(name))
    return tuple(path.with_name(name) for name in reversed(names))


def compare(
    file: Path, model: nn.Module, masking: Masking, metadata: Metadata, shape: tuple[int, ...]
) -> float:
    """How far ONNX Runtime's results for a file are from PyTorch's on random images.

    Args:
        file: An exported file.
        model: What it was exported from, in float32 on the CPU.
        masking: What its maps keep.
        metadata: What it says of itself.
        shape: Of the images.

    Returns:
        The largest difference of an output, relative to its largest value.

    Raises:
        ModelError: If it is more than 1e-4, or the file cannot be run.
    """
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    explainer = ReciproCAM(
        model, kernel=masking.kernel, class_token=masking.class_token, layer=masking.layer
    )
    expected = explainer(images, "all")
    classes = expected.logits.shape[1]
    feeds: dict[str, Any] = {"images": images.numpy()}
    if metadata.targets == "input":
        feeds["targets"] = np.tile(np.array([[classes - 1, 0, 0]]), (shape[0], 1))
    got = _run(file, feeds)
    chosen = got.get("classes", feeds.get("targets"))
    scores = expected.scores
    if chosen is not None:
        if chosen.min() < 0 or chosen.max() >= classes:
            raise ModelError("the exported file names classes that there are not")
        scores = np.take_along_axis(scores, chosen[:, :, None, None], axis=1)
    wanted = {"logits": expected.logits, "scores": scores}
    if "saliency" in got:  # of its own scores, since maps of nearly flat scores enlarge rounding
        wanted["saliency"] = min_max(got["scores"])[0]
    if "classes" in got:
        ranked = np.sort(got["logits"], axis=1)[:, ::-1][:, : got["classes"].shape[1]]
        named = np.take_along_axis(got["logits"], got["classes"], axis=1)
        if not np.array_equal(named, ranked):
            raise ModelError("the exported file's classes are not those of its largest logits")
    return max(_difference(name, got[name], one) for name, one in wanted.items())


def _run(file: Path, feeds: dict[str, Any]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(None, feeds), strict=True))
    except Exception as error:  # ONNX Runtime's own exceptions share no public base
        raise ModelError(f"ONNX Runtime cannot run the exported graph: {error}") from error


def _difference(name: str, got: np.ndarray, wanted: np.ndarray) -> float:
    if got.shape != wanted.shape:
        raise ModelError(f"the exported file gives {name} {got.shape}, PyTorch {wanted.shape}")
    largest = float(np.abs(wanted).max()) or 1.0
    difference = float(np.abs(got - wanted).max()) / largest
    if not difference <= _TOLERANCE:
        raise ModelError(
            f"the exported file's {name} differ from PyTorch's by {difference:.1e} of the largest, "
            f"more than {_TOLERANCE:.0e}, on random images"
        )
    return difference
