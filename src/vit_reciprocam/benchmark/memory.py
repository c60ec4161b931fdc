"""The peak memory of one call, measured in a fresh process.

That process runs this module: `python -m vit_reciprocam.benchmark.memory`.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vit_reciprocam.benchmark.calls import OnnxFiles, make_call
from vit_reciprocam.errors import ModelError, first_line

__all__ = ["measure_peak"]


def measure_peak(
    model: Any, label: str, *, size: tuple[int, int], batch: int, threads: int
) -> tuple[int, int]:
    """Return the peak bytes of a fresh process that makes one call, and how many the call added.

    On a GPU it is the most that PyTorch held there. The arguments are those of `make_call`; a
    `ModelError` says that the model cannot be handed over or that the process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model, OnnxFiles):
            where = {"options": model.options, "untouched": model.untouched}
        else:
            where = {"file": _store(model, Path(folder) / "model.pt")}
        request = json.dumps([where, threads, {"label": label, "size": size, "batch": batch}])
        command = [sys.executable, "-m", "vit_reciprocam.benchmark.memory", request]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        last = (finished.stderr.strip() or "it was killed").splitlines()[-1]
        raise ModelError(f"memory was not measured, its process failed: {last}")
    total, added = json.loads(finished.stdout.splitlines()[-1])
    return total, added


def _store(model: Any, file: Path) -> str:
    import torch

    try:
        torch.save(model, file)
    except Exception as error:  # pickling raises errors of many unrelated kinds
        reason = first_line(error)
        raise ModelError(f"the model cannot be handed to a fresh process: {reason}") from error
    return str(file)


def _answer(request: str) -> None:
    """Make one call in this process, and print its peak and how much of it the call added."""
    where, threads, arguments = json.loads(request)
    model: Any
    if "file" in where:
        import torch

        torch.set_num_threads(threads)
        model = torch.load(where["file"], weights_only=False)  # our own file, just written
    else:
        model = OnnxFiles(**where)
    call = make_call(model, **arguments)
    peak = _watch_memory(model)
    before = peak()
    call()
    after = peak()
    sys.stdout.write(json.dumps([after, after - before]) + "\n")


def _watch_memory(model: Any) -> Callable[[], int]:
    """Return a function that gives the most bytes held since now."""
    device = next(model.parameters()).device if hasattr(model, "parameters") else None
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device)
    if device is not None and device.type != "cpu":
        raise ModelError(f"peak memory is known on the CPU and on CUDA, not on {device.type}")
    status = Path("/proc/self/status")
    if status.exists():
        with contextlib.suppress(OSError):  # without it the peak is that since the process began
            Path("/proc/self/clear_refs").write_text("5")
        # getrusage would also count what the parent held when it started this process
        return lambda: 1024 * int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0])
    import resource  # Windows has no such module

    return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


if __name__ == "__main__":
    _answer(sys.argv[1])
