"""What every library's listing needs to build models without weights or memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vit_reciprocam.libraries.common.zero_shot import ZeroShot

__all__ = [
    "PROMPTS",
    "Architecture",
    "NoValues",
    "is_named_transformer",
    "short_reason",
    "with_prompts",
]

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


def short_reason(refusal: str) -> str:
    """Return the reason in a refusal, without the model's name and the list of supported models."""
    return re.sub("^.{,80}? is not supported: ", "", refusal).partition(". Supported are")[0]
