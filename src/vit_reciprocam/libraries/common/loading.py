"""What every library needs to load models by name, and to list those that it can build."""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vit_reciprocam.errors import DownloadError, ModelError, WeightsError, first_line
from vit_reciprocam.libraries.common.zero_shot import ZeroShot

__all__ = [
    "PROMPTS",
    "RANDOM",
    "Architecture",
    "NoValues",
    "first_sentence",
    "is_named_transformer",
    "no_such_model",
    "not_fetched",
    "quiet",
    "read_weights",
    "with_prompts",
]

RANDOM = "random"
"""The value of `weights` that leaves a model as its library initialises it; nothing is fetched."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a .safetensors file, or from a .pth file that holds tensors only."""
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
    # a training checkpoint may hold several; the averaged weights come first
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise WeightsError(f"{path} does not hold a state dict, a mapping from names to tensors")
    # "module." is what DataParallel puts before each name
    return {key.removeprefix("module."): value for key, value in state.items()}


@contextlib.contextmanager
def quiet(*loggers: str, level: int = logging.ERROR) -> Iterator[None]:
    """Mute loggers (by name, "" is the root) below a level, as long as the context lasts."""
    # they would repeat for each retry what the error says at the end
    found = [logging.getLogger(name) for name in loggers]
    before = [logger.level for logger in found]
    for logger in found:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, old in zip(found, before, strict=True):
            logger.setLevel(old)


def first_sentence(error: Exception) -> str:
    """Return the first sentence of an error's message, without the advice that hub clients add."""
    return first_line(error).partition(". ")[0] or type(error).__name__


def not_fetched(what: str, error: Exception, instead: str) -> DownloadError:
    """Return the error for something that could not be fetched, and what to pass instead."""
    return DownloadError(
        f"{what} could not be fetched: {first_sentence(error)}. Without network, pass {instead}"
    )


def no_such_model(library: ModuleType, name: str, names: Sequence[str]) -> ModelError:
    """Return the error for a name that a library does not have, with the most similar names."""
    close = difflib.get_close_matches(name, names, n=3)
    hint = f". Closest: {', '.join(close)}" if close else ""
    return ModelError(f"{library.__name__} {library.__version__} has no model {name!r}{hint}")


PROMPTS = 8
"""Number of random prompts that an image tower gets as classes."""


@dataclass(frozen=True)
class Architecture:
    """A model that its library can build.

    Attributes:
        spec: The model as `load` takes it, or a class of transformers, perhaps with a setting of
            its configuration, such as "hf:BeitForImageClassification(use_mean_pooling=False)".
        build: () -> the model on the meta device, as its library makes it. Raises `ModelError` if
            it is refused even before it is built.
        listed: Whether a table should list it even if it is refused, because its name says that it
            is a transformer.
    """

    spec: str
    build: Callable[[], nn.Module]
    listed: bool = True


class NoValues(TorchFunctionMode):
    """Skip the initialisation of weights on the meta device, which have no values to fill."""

    _SKIPPED = frozenset(
        getattr(Tensor, f"{name}_")
        for name in ("normal", "uniform", "erfinv", "clamp", "mul", "add", "fill", "zero")
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, or return its first argument unchanged if it would fill that."""
        if func in self._SKIPPED and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def is_named_transformer(module: str) -> bool:
    """Return whether the name of a Python module says that it defines transformers."""
    return "vit" in module or "former" in module


def with_prompts(tower: nn.Module, width: int) -> nn.Module:
    """Return a classifier of random prompts by an image tower whose features have this width."""
    return ZeroShot(tower, torch.randn(PROMPTS, width), scale=10.0).eval()
