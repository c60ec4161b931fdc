"""Weights files on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vit_reciprocam.errors import WeightsError

__all__ = ["RANDOM", "read_weights"]

RANDOM = "random"
"""The value of `weights` that leaves a model as its library initialises it; nothing is fetched."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a .safetensors file, or from a .pth file that holds tensors only.

    A training checkpoint may hold several; the averaged weights come first.
    """
    if not path.is_file():
        raise WeightsError(f"no such weights file: {path}")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, pickle and zip errors share no base
        raise WeightsError(
            f"{path} cannot be read as weights ({type(error).__name__}): pass a .safetensors file, "
            "or a .pth file that holds tensors only"
        ) from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise WeightsError(f"{path} does not hold a state dict, a mapping from names to tensors")
    # "module." is what DataParallel puts before each name
    return {key.removeprefix("module."): value for key, value in state.items()}
