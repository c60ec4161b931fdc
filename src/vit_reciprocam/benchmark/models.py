"""What the measured calls run on: models, ONNX files beside their untouched models, threads."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_reciprocam.classifier.classifier import Classifier
from vit_reciprocam.classifier.load import ASSETS
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.onnx.insert.cut_out import cut_out_prediction
from vit_reciprocam.onnx.run.explainer import OnnxExplainer
from vit_reciprocam.onnx.run.sessions import Session, open_session

__all__ = ["OnnxFiles", "device_name", "prepare_model", "set_threads"]


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


def prepare_model(
    classifier: Classifier, plain: str | os.PathLike[str] | None, threads: int | None, cut: Path
) -> Any:
    """As `make_call` takes it; without a plain file one is written to `cut`."""
    model = classifier.backend
    if not isinstance(model, OnnxExplainer):
        return classifier.model
    options = model.options() if threads is None else model.options() | {"threads": threads}
    if plain is None and model.path == ASSETS / "demo.onnx":
        plain = ASSETS / "demo-plain.onnx"
    if plain is None:
        cut_out_prediction(model.path, cut)
    files = OnnxFiles(options, str(cut if plain is None else plain))
    files.check(classifier.preprocess.size)
    return files


@contextlib.contextmanager
def set_threads(wanted: int | None, classifiers: Sequence[Classifier]) -> Iterator[int]:
    """Within, PyTorch computes in so many threads; gives their number."""
    onnx = [one.backend for one in classifiers if isinstance(one.backend, OnnxExplainer)]
    if len(onnx) == len(classifiers):
        yield wanted or onnx[0].threads or os.cpu_count() or 1
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


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
