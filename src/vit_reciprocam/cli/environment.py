"""`vit-reciprocam --version --json`: describe the environment, for a bug report."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from vit_reciprocam.results.files import library_versions

__all__ = ["report_environment"]


def report_environment() -> dict[str, Any]:
    """Return the versions and devices that a result may depend on, without paths or user names.

    They are JSON values. "torch" is None if PyTorch is not installed. A library that is installed
    and cannot be imported has an "error" in its place.
    """
    return {
        "vit-reciprocam": version("vit-reciprocam"),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "libraries": library_versions(),
        "torch": _or_error(_torch) if find_spec("torch") else None,
        "onnxruntime": _or_error(_onnxruntime),
    }


def _or_error(describe: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return describe()
    except Exception as error:  # whatever is broken, it must not break the report on it
        return {"error": f"{type(error).__name__}: {error}"}


def _torch() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "version": torch.__version__,  # with the build, such as +cpu
        "cuda": torch.version.cuda,
        "cuda_available": torch.cuda.is_available(),
        "gpus": gpus,
        "mps_available": torch.backends.mps.is_available(),
    }


def _onnxruntime() -> dict[str, Any]:
    import onnxruntime

    return {
        "version": onnxruntime.__version__,  # its distribution may have another name
        "providers": onnxruntime.get_available_providers(),
    }
