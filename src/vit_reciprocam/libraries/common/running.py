"""Run a model by its modules, with hooks that live for one call and go even if it fails.

A cut needs the residual stream X that enters a block, and the block run again with other tokens F
after its first LayerNorm. The model's own code gives both, so no vendor folder repeats a forward
pass.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vit_reciprocam.errors import InputError, ModelError

__all__ = [
    "Call",
    "Grid",
    "StopForward",
    "find_call",
    "find_calls",
    "get_first",
    "infer_grid",
    "last_blocks",
    "repeat_batch",
    "same",
]

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the keyword arguments with which a module is called."""

Grid = tuple[int, int]
"""Rows and columns of patches, (h, w)."""


class StopForward(BaseException):
    """A way out of a forward pass that a library's `except Exception` does not catch."""


def find_call(model: nn.Module, module: nn.Module, *inputs: Any, **options: Any) -> Call:
    """Run the model until it calls one of its modules, and return the arguments of that call."""
    return find_calls(model, [module], *inputs, **options)[0]


def find_calls(
    model: nn.Module, modules: Sequence[nn.Module], *inputs: Any, **options: Any
) -> list[Call]:
    """Run the model until it has called these modules, in order; return the calls' arguments."""
    calls: list[Call] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(calls) < len(modules) and module is modules[len(calls)]:
            calls.append((args, kwargs))
        # what follows the last module is not needed, but a tracer wants its calls to return
        if len(calls) == len(modules) and not torch.compiler.is_compiling():
            raise StopForward

    with contextlib.ExitStack() as stack:
        for module in modules:
            # before the user's own hooks, which will act when the module is run again
            hook = module.register_forward_pre_hook(record, prepend=True, with_kwargs=True)
            stack.callback(hook.remove)
        with contextlib.suppress(StopForward):
            model(*inputs, **options)
    if len(calls) < len(modules):
        raise ModelError(
            f"the forward pass of {type(model).__name__} does not call its "
            f"{type(modules[len(calls)]).__name__}, where this method cuts"
        )
    return calls


def last_blocks(number: int, blocks: Iterable[Any]) -> list[Any]:
    """Return the blocks from a number on, which counts from the end: -1 is the last block alone."""
    every = list(blocks)
    count = len(every)
    if not -count <= number <= -1:
        raise InputError(
            f"block counts from the end: -1, the last, to {-count}, the first of the {count} that "
            f"see the whole grid; got {number}"
        )
    return every[number:]


def get_first(module: Any, *paths: str) -> Any:
    """Return the first attribute that a module has of these dotted paths, None if it has none."""
    for path in paths:
        try:
            return operator.attrgetter(path)(module)
        except AttributeError:
            continue
    return None


def same(value: Tensor) -> Tensor:
    """Return the tensor unchanged."""
    return value


def infer_grid(patches: int, height: int, width: int) -> Grid:
    """Return the grid (h, w) of a number of square patches on an image of height x width pixels."""
    for size in range(1, min(height, width) + 1):
        if (height // size) * (width // size) == patches:
            return height // size, width // size
    raise InputError(
        f"{patches} patch tokens fit no grid of square patches on {height}x{width} pixels"
    )


def repeat_batch(value: Any, batch: int, times: int) -> Any:
    """Repeat each tensor (batch, …) in a value along its first dimension, and nothing else."""
    if isinstance(value, Tensor):
        one_per_image = value.ndim > 0 and value.shape[0] == batch
        return value.repeat(times, *(1,) * (value.ndim - 1)) if one_per_image else value
    if isinstance(value, (tuple, list)):
        return type(value)(repeat_batch(part, batch, times) for part in value)
    if isinstance(value, dict):
        return {key: repeat_batch(part, batch, times) for key, part in value.items()}
    return value
