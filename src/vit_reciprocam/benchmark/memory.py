"""The peak memory of one call, made in a fresh process.

Run as a module it is that process.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vit_reciprocam.benchmark.calls import make_call
from vit_reciprocam.benchmark.models import OnnxFiles
from vit_reciprocam.errors import ModelError

__all__ = ["Peak", "peak_memory", "saved"]


class Peak(NamedTuple):
    """Peak memory of a process during a call in bytes, and how much of it was not held before."""

    total: int
    added: int


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
    command = [sys.executable, "-m", "vit_reciprocam.benchmark.memory", request]
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
