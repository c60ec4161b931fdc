"""What the catalogues of all libraries need."""

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
    "CLASSES",
    "Architecture",
    "Built",
    "NoValues",
    "filled",
    "is_named",
    "noise",
    "pair",
    "short_reason",
    "with_prompts",
]

CLASSES = 8

Built = tuple[nn.Module, Tensor]
"""A model in evaluation mode and images that it takes."""


@dataclass(frozen=True)
class Architecture:
    """A model that can be built with random weights.

    Attributes:
        spec: As `load` takes it, or a class of transformers, perhaps with a setting of its
            configuration, such as "hf:BeitForImageClassification(use_mean_pooling=False)".
        whole: Builds it without memory, on the meta device. Raises `ModelError` where it is refused
            even before.
        small: Builds a model of the same kind that is compared with the definition: where its
            builder can do that, cut to few blocks, on few patches.
        listed: Whether it goes by the name of a transformer, so that a table should name it even
            where it is refused.
        headless: Whether its library makes it without a head, so that one was put on.
    """

    spec: str
    whole: Callable[[], Built]
    small: Callable[[], Built]
    listed: bool = True
    headless: bool = False


class NoValues(TorchFunctionMode):
    """Within, what initialises weights on the meta device does nothing, for it takes time."""

    _SKIPPED = frozenset(
        getattr(Tensor, f"{name}_")
        for name in ("normal", "uniform", "erfinv", "clamp", "mul", "add", "fill", "zero")
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call, or do not."""
        if func in self._SKIPPED and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def is_named(module: str) -> bool:
    """Whether a module's name says that it holds transformers."""
    return "vit" in module or "former" in module


def noise(channels: int, height: int, width: int, *, batch: int = 2) -> Tensor:
    """Images, the same each time."""
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def pair(size: Any) -> tuple[int, int]:
    """(height, width) of one number or two."""
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return int(height), int(width)


def with_prompts(tower: nn.Module, width: int) -> nn.Module:
    """An image tower, whose features are so wide, with random prompts as classes."""
    return ZeroShot(tower, torch.randn(CLASSES, width), scale=10.0).eval()


def filled(model: nn.Module) -> nn.Module:
    """A model of the meta device with memory: zeros, but ones in LayerNorms; it has no buffers."""
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
    return model


def short_reason(refusal: str) -> str:
    """A refusal without the name of what is refused, and without what else there is."""
    return re.sub("^.{,80}? is not supported: ", "", refusal).partition(". Supported are")[0]
