"""The calls that `benchmark` measures: made here, and each once in a fresh process for its memory.

Run as a module it is that process.
"""

from __future__ import annotations

import contextlib
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

from vit_reciprocam.classifier import ASSETS
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.methods import METHODS, MethodSpec, check_settings

__all__ = [
    "ALL_MAPS",
    "ALL_SCORES",
    "FIXED",
    "FORWARD",
    "NAIVE",
    "RECIPROCAM",
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


def make_call(
    model: Any, label: str, *, size: tuple[int, int], batch: int, threads: int | None = None
) -> Call:
    """A call on seeded random images that lie on the model's device.

    Logits and what ReciproCAM gives come back as NumPy arrays.

    Args:
        model: A PyTorch classifier, or None for the bundled demo model.
        label: One of `FIXED`, or a method as `MethodSpec.parse` reads it.
        size: (height, width) of the images.
        batch: How many images.
        threads: Of ONNX Runtime, which the demo model runs in.

    Raises:
        InputError: If the demo model cannot do that, or there is no such method or setting.
        ModelError: If ReciproCAM does not support the model.
    """
    images = np.random.default_rng(0).standard_normal((batch, 3, *size), dtype=np.float32)
    if model is None:
        return _demo_call(label, images, threads)
    return _torch_call(label, model, images)


def _torch_call(label: str, model: Any, pixels: np.ndarray) -> Call:
    import torch

    from vit_reciprocam.adapters.by_target import logits_of
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


def _demo_call(label: str, images: np.ndarray, threads: int | None) -> Call:
    from vit_reciprocam.onnx.runtime import OnnxExplainer, open_session

    if label == FORWARD:
        plain = open_session(ASSETS / "demo-plain.onnx", threads=threads)
        return lambda: (plain.run(["logits"], {"images": images})[0], "")
    if label not in (RECIPROCAM, ALL_SCORES, ALL_MAPS):
        raise InputError(
            f"the demo model is an exported file, which holds ReciproCAM's closed form and nothing "
            f"else: measure {label!r} on a PyTorch model"
        )
    explainer = OnnxExplainer(ASSETS / "demo.onnx", threads=threads)
    targets = None if label == RECIPROCAM else "all"
    what = "scores" if label == ALL_SCORES else "maps"
    return lambda: (getattr(explainer(images, targets), what), "closed-form")


def device_name(model: Any) -> str:
    """Of the processor that a PyTorch classifier is on; None is the demo model."""
    device = None if model is None else next(model.parameters()).device
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
def saved(model: Any) -> Iterator[Path | None]:
    """Within, the whole model in a file for fresh processes; None for the demo model.

    Raises:
        ModelError: If it cannot be written, as with hooks that are local functions.
    """
    if model is None:
        yield None
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
        yield file


def peak_memory(
    file: Path | None, label: str, *, size: tuple[int, int], batch: int, threads: int
) -> Peak:
    """Peak memory of a fresh process that makes one call; on a GPU what PyTorch held there.

    Args:
        file: From `saved`.
        label: See `make_call`.
        size: Likewise.
        batch: Likewise.
        threads: Of the CPU.

    Raises:
        ModelError: If that process fails, as where memory runs out.
    """
    settings = {"label": label, "size": size, "batch": batch, "threads": threads}
    request = json.dumps({"file": None if file is None else str(file), **settings})
    command = [sys.executable, "-m", "vit_reciprocam.calls", request]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        last = (finished.stderr.strip() or "it was killed").splitlines()[-1]
        raise ModelError(f"memory was not measured, its process failed: {last}")
    return Peak(*json.loads(finished.stdout.splitlines()[-1]))


def _child(request: str) -> None:
    """In the fresh process: write the peak of one call, and how much of it the call added."""
    wanted = json.loads(request)
    file, label, threads = wanted["file"], wanted["label"], wanted["threads"]
    model = None
    if file is not None:
        import torch

        torch.set_num_threads(threads)
        model = torch.load(file, weights_only=False)  # our own, just written
    size, batch = tuple(wanted["size"]), wanted["batch"]
    call = make_call(model, label, size=size, batch=batch, threads=threads)
    peak = _peak_of(model)
    before = peak()
    call()
    after = peak()
    sys.stdout.write(json.dumps([after, after - before]) + "\n")


def _peak_of(model: Any) -> Callable[[], int]:
    """A function that gives the most bytes held from now on."""
    device = None if model is None else next(model.parameters()).device
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
