"""The calls that are measured: a prediction, a prediction with maps, or another method's maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vit_reciprocam.benchmark.models import OnnxFiles
from vit_reciprocam.errors import InputError
from vit_reciprocam.methods import METHODS, MethodSpec, check_settings

__all__ = [
    "ALL_MAPS",
    "ALL_SCORES",
    "FIXED",
    "FORWARD",
    "NAIVE",
    "RECIPROCAM",
    "Call",
    "make_call",
]

FORWARD = "forward"
RECIPROCAM = "reciprocam"
ALL_SCORES = "reciprocam, all scores"
ALL_MAPS = "reciprocam, all maps"
NAIVE = "naive H"
FIXED = (FORWARD, RECIPROCAM, ALL_SCORES, ALL_MAPS, NAIVE)
"""The calls that are measured for every model, see `Row.method`."""

Call = Callable[[], tuple[Any, str]]
"""A function that returns the result, and the path of ReciproCAM, or "" if it did not run."""


def make_call(model: Any, label: str, *, size: tuple[int, int], batch: int) -> Call:
    """Return a call on random images, the same in every run, that lie on the model's device.

    The call returns logits, and the results of ReciproCAM, as NumPy arrays.

    Args:
        model: A PyTorch classifier, or `OnnxFiles`.
        label: One of `FIXED`, or a method as `MethodSpec.parse` reads it.
        size: (height, width) of the images in pixels.
        batch: Number of images.

    Raises:
        InputError: If an ONNX file lacks what is asked for, or there is no such method or setting.
        ModelError: If ReciproCAM does not support the model.
    """
    images = np.random.default_rng(0).standard_normal((batch, 3, *size), dtype=np.float32)
    if isinstance(model, OnnxFiles):
        return _onnx_call(label, model, images)
    return _torch_call(label, model, images)


def _torch_call(label: str, model: Any, pixels: np.ndarray) -> Call:
    import torch

    from vit_reciprocam.core.split import logits_of
    from vit_reciprocam.reciprocam import ReciproCAM

    images = torch.from_numpy(pixels).to(next(model.parameters()))

    @torch.no_grad()
    def forward() -> tuple[Any, str]:
        return logits_of(model(images)).float().cpu().numpy(), ""

    def reciprocam(result: str, targets: Any = None, **settings: Any) -> Call:
        explainer = ReciproCAM(model, **settings)

        def call() -> tuple[Any, str]:
            explanation = explainer(images, targets)
            return getattr(explanation, result), explanation.path

        return call

    if label == FORWARD:
        return forward
    if label == ALL_SCORES:
        return reciprocam("scores", "all")
    if label == ALL_MAPS:
        return reciprocam("maps", "all")
    if label == NAIVE:
        return reciprocam("maps", path="direct")
    method = MethodSpec.parse(label)
    if method.name == RECIPROCAM:
        return reciprocam("maps", **method.settings)
    # this imports the method's library, so that the import is not timed
    check_settings(method.name, method.settings)

    def other() -> tuple[Any, str]:
        maps = METHODS[method.name](model, images, **method.settings)
        if maps.device.type == "cuda":
            torch.cuda.synchronize(maps.device)
        return maps.cpu(), ""

    return other


def _onnx_call(label: str, files: OnnxFiles, images: np.ndarray) -> Call:
    if label == FORWARD:
        forward = files.forward(images)
        return lambda: (forward(), "")
    if label not in (RECIPROCAM, ALL_SCORES, ALL_MAPS):
        raise InputError(
            "an ONNX file holds ReciproCAM's maps and no other method: measure "
            f"{label!r} on a PyTorch model"
        )
    explainer = files.explainer
    kind = explainer.metadata.targets
    if label != RECIPROCAM and kind not in ("all", "input"):
        raise InputError(f"the file explains the {kind} classes only")
    targets = None if label == RECIPROCAM else "all"
    result = "scores" if label == ALL_SCORES else "maps"

    def call() -> tuple[Any, str]:
        explanation = explainer(images, targets)
        return getattr(explanation, result), explanation.path

    return call
