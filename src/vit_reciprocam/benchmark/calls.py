"""The calls that `benchmark` measures: made here, and each once in a fresh process for its memory.

Run as a module it is that process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
    "Peak",
    "device_name",
    "make_call",
    "peak_memory",
    "saved",
]

FORWARD = "forward"
RECIPROCAM = "reciprocam"
ALL_SCORES = "reciprocam, all scores"
ALL_MAPS = "reciprocam, all maps"
NAIVE = "naive H"
FIXED = (FORWARD, RECIPROCAM, ALL_SCORES, ALL_MAPS, NAIVE)

Call = Callable[[], tuple[Any, str]]
"""Gives the result, and by which path ReciproCAM came to it."""


class Peak(NamedTuple):
    """Peak memory of a process during a call in bytes, and how much of it was not held before."""

    total: int
    added: int


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


# --- memory ------------------------------------------------------------------------------------


@contextlib.contextmanager
def saved(model: Any) -> Iterator[dict[str, Any]]:
    """Within, the whole model lies in files; gives JSON values by which a fresh process finds it.

    Raises:
        ModelError: If it cannot be written, as with hooks that are local functions.
    """
    if isinstance(model, OnnxFiles):
        yield {"options": model.options, "plain": model.plain}
        return
    import torch

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pt"
        try:
            torch.save(model, file)
        except Exception as error:  # pickling raises errors of many unrelated kinds
            raise ModelError(
                f"the model cannot be handed to a fresh process: {_first_line(error)}"
            ) from error
        yield {"file": str(file)}


def peak_memory(
    where: dict[str, Any], label: str, *, size: tuple[int, int], batch: int, threads: int
) -> Peak:
    """Peak memory of a fresh process that makes one call; on a GPU what PyTorch held there.

    Args:
        where: From `saved`.
        label: See `make_call`.
        size: Likewise.
        batch: Likewise.
        threads: Of the CPU.

    Raises:
        ModelError: If that process fails, as where memory runs out.
    """
    settings = {"label": label, "size": size, "batch": batch, "threads": threads}
    request = json.dumps({**where, **settings})
    command = [sys.executable, "-m", "vit_reciprocam.benchmark.calls", request]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        last = (finished.stderr.strip() or "it was killed").splitlines()[-1]
        raise ModelError(f"memory was not measured, its process failed: {last}")
    return Peak(*json.loads(finished.stdout.splitlines()[-1]))


def _child(request: str) -> None:
    """In the fresh process: write the peak of one call, and how much of it the call added."""
    wanted = json.loads(request)
    model: Any
    if "file" in wanted:
        import torch

        torch.set_num_threads(wanted["threads"])
        model = torch.load(wanted["file"], weights_only=False)  # our own, just written
    else:
        model = OnnxFiles(wanted["options"], wanted["plain"])
    size, batch = tuple(wanted["size"]), wanted["batch"]
    call = make_call(model, wanted["label"], size=size, batch=batch)
    peak = _peak_of(model)
    before = peak()
    call()
    after = peak()
    sys.stdout.write(json.dumps([after, after - before]) + "\n")


def _peak_of(model: Any) -> Callable[[], int]:
    """A function that gives the most bytes held from now on."""
    device = next(model.parameters()).device if hasattr(model, "parameters") else None
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device)
    if device is not None and device.type != "cpu":
        raise ModelError(f"peak memory is known on the CPU and on CUDA, not on {device.type}")
    status = Path("/proc/self/status")
    if status.exists():
        with contextlib.suppress(OSError):  # then it is the most held since the process began
            Path("/proc/self/clear_refs").write_text("5")
        # getrusage would also count what the process held that started this one
        return lambda: 1024 * int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0])
    import resource  # not on Windows

    return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


if __name__ == "__main__":
    _child(sys.argv[1])
