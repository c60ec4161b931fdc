"""The calls that `benchmark` measures."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.methods import METHODS, MethodSpec, check_settings
from vit_reciprocam.onnx.run.explainer import OnnxExplainer
from vit_reciprocam.onnx.run.sessions import Session, open_session

__all__ = [
    "ALL_MAPS",
    "ALL_SCORES",
    "FIXED",
    "FORWARD",
    "NAIVE",
    "RECIPROCAM",
    "Call",
    "OnnxFiles",
    "device_name",
    "make_call",
]

FORWARD = "forward"
RECIPROCAM = "reciprocam"
ALL_SCORES = "reciprocam, all scores"
ALL_MAPS = "reciprocam, all maps"
NAIVE = "naive H"
FIXED = (FORWARD, RECIPROCAM, ALL_SCORES, ALL_MAPS, NAIVE)

Call = Callable[[], tuple[Any, str]]
"""Gives the result, and by which path ReciproCAM came to it."""


@dataclasses.dataclass(frozen=True)
class OnnxFiles:
    """A file with an explanation and one of the same model without; each is opened on first use.

    Attributes:
        options: Of `OnnxExplainer`, as plain JSON values.
        plain: The untouched model's file.
    """

    options: dict[str, Any]
    plain: str

    @functools.cached_property
    def explainer(self) -> OnnxExplainer:
        """The file with the explanation."""
        return OnnxExplainer(**self.options)

    @functools.cached_property
    def untouched(self) -> Session:
        """The other one, in the same runtime."""
        options = {name: value for name, value in self.options.items() if name != "path"}
        return open_session(self.plain, **options)

    def check(self, size: tuple[int, int]) -> None:
        """Refuse a plain file that is another model.

        Raises:
            InputError: If its prediction for a random image is another one.
        """
        image = np.random.default_rng(0).standard_normal((1, 3, *size), dtype=np.float32)
        ours, theirs = self.explainer.predict(image), self.forward(image)()
        if ours.shape != theirs.shape or abs(ours - theirs).max() > 0.1 * abs(ours).max():
            raise InputError(
                f"{self.plain} is not the model that {self.explainer.path} explains: their "
                "predictions differ"
            )

    def forward(self, images: np.ndarray) -> Callable[[], np.ndarray]:
        """The prediction of the untouched model.

        Raises:
            ModelError: If it has not one input and one output.
        """
        session = self.untouched
        if len(session.inputs) != 1 or len(session.outputs) != 1:
            raise ModelError(
                f"{self.plain} must be the untouched model, with one input and one output; it has "
                f"{sorted(session.inputs)} and {sorted(session.outputs)}"
            )
        ((name, port),) = session.inputs.items()
        (output,) = session.outputs
        pixels = images.astype(port.dtype)
        return lambda: session.run([output], {name: pixels})[0]


def make_call(model: Any, label: str, *, size: tuple[int, int], batch: int) -> Call:
    """A call on seeded random images that lie on the model's device.

    Logits and what ReciproCAM gives come back as NumPy arrays.

    Args:
        model: A PyTorch classifier, or `OnnxFiles`.
        label: One of `FIXED`, or a method as `MethodSpec.parse` reads it.
        size: (height, width) of the images.
        batch: How many images.

    Raises:
        InputError: If an ONNX file cannot do that, or there is no such method or setting.
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

    def explained(what: str, targets: Any = None, **settings: Any) -> Call:
        explainer = ReciproCAM(model, **settings)

        def call() -> tuple[Any, str]:
            explanation = explainer(images, targets)
            return getattr(explanation, what), explanation.path

        return call

    if label == FORWARD:
        return forward
    if label == ALL_SCORES:
        return explained("scores", "all")
    if label == ALL_MAPS:
        return explained("maps", "all")
    if label == NAIVE:
        return explained("maps", path="direct")
    method = MethodSpec.parse(label)
    if method.name == RECIPROCAM:
        return explained("maps", **method.settings)
    check_settings(method.name, method.settings)  # imports its library

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
    what = "scores" if label == ALL_SCORES else "maps"

    def call() -> tuple[Any, str]:
        explanation = explainer(images, targets)
        return getattr(explanation, what), explanation.path

    return call


def device_name(model: Any) -> str:
    """Of the processor that a PyTorch classifier or an ONNX file runs on; None is the CPU."""
    if isinstance(model, OnnxFiles) and "CPU" not in model.explainer.session.device:
        return model.explainer.session.device
    torch_model = None if isinstance(model, OnnxFiles) else model
    device = None if torch_model is None else next(torch_model.parameters()).device
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    if device is not None and device.type != "cpu":
        return str(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
