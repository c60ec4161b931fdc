"""Models of every library with random weights and without memory, as their listings build them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vit_reciprocam.libraries.common.zero_shot import ZeroShot

__all__ = ["PROMPTS", "Architecture", "NoValues", "is_named", "short_reason", "with_prompts"]

PROMPTS = 8
"""Number of random prompts that an image tower gets as classes."""


@dataclass(frozen=True)
class Architecture:
    """A model that can be built with random weights.

    Attributes:
        spec: The model as `load` takes it, or a class of transformers, perhaps with a setting of
            its configuration, such as "hf:BeitForImageClassification(use_mean_pooling=False)".
        build: () -> the model on the meta device, as its library makes it. Raises `ModelError` for
            one that is refused even before it is built.
        listed: Whether it goes by the name of a transformer, so that a table should name it even
            where it is refused.
    """

    spec: str
    build: Callable[[], nn.Module]
    listed: bool = True


class NoValues(TorchFunctionMode):
    """Skip what initialises weights on the meta device: they have no values, yet it takes time."""

    _SKIPPED = frozenset(
        getattr(Tensor, f"{name}_")
        for name in ("normal", "uniform", "erfinv", "clamp", "mul", "add", "fill", "zero")
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, or return its first argument as it is."""
        if func in self._SKIPPED and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def is_named(module: str) -> bool:
    """Return whether a module's name says that it holds transformers."""
    return "vit" in module or "former" in module


def with_prompts(tower: nn.Module, width: int) -> nn.Module:
    """Return an image tower, with features of this width, that has random prompts as classes."""
    return ZeroShot(tower, torch.randn(PROMPTS, width), scale=10.0).eval()


def short_reason(refusal: str) -> str:
    """Return a refusal without the name of what is refused, and without what else there is."""
    return re.sub("^.{,80}? is not supported: ", "", refusal).partition(". Supported are")[0]
