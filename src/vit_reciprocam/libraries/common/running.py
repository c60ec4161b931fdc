"""How any model is run by its parts: hooks that live for one call and are removed even if it fails.

A cut needs the residual stream that enters a block, and the block run again with other tokens after
its first LayerNorm. Both are had from the model's own code, so no adapter repeats it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vit_reciprocam.errors import InputError, ModelError

__all__ = [
    "Call",
    "Reached",
    "blocks_from",
    "call_of",
    "calls_of",
    "infer_grid",
    "repeated",
    "same",
]


class Reached(BaseException):
    """Leaves a forward pass; no library's `except Exception` may stop it."""


Call = tuple[tuple[Any, ...], dict[str, Any]]


def call_of(model: nn.Module, module: nn.Module, *inputs: Any, **options: Any) -> Call:
    """Run the model until it calls a module, and give the arguments of that call.

    Raises:
        ModelError: If the forward pass never calls it.
    """
    return calls_of(model, [module], *inputs, **options)[0]


def calls_of(
    model: nn.Module, modules: Sequence[nn.Module], *inputs: Any, **options: Any
) -> list[Call]:
    """Run the model until it calls the last of some modules, and give the arguments of each call.

    Raises:
        ModelError: If the forward pass does not call them all, one after the other.
    """
    calls: list[Call] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(calls) < len(modules) and module is modules[len(calls)]:
            calls.append((args, kwargs))
        if len(calls) == len(modules) and not torch.compiler.is_compiling():
            raise Reached  # but a tracer wants its calls to return

    with contextlib.ExitStack() as stack:
        for module in modules:
            hook = module.register_forward_pre_hook(note, prepend=True, with_kwargs=True)
            stack.callback(hook.remove)
        with contextlib.suppress(Reached):
            model(*inputs, **options)
    if len(calls) < len(modules):
        raise ModelError(
            f"the forward pass of {type(model).__name__} does not call its "
            f"{type(modules[len(calls)]).__name__}, where this method cuts"
        )
    return calls


def blocks_from(block: int, blocks: Iterable[Any]) -> list[Any]:
    """The block that a negative number from the end means, and those after it.

    Raises:
        InputError: If there is none.
    """
    every = list(blocks)
    count = len(every)
    if not -count <= block <= -1:
        raise InputError(
            f"block counts from the end: -1, the last, to {-count}, the first of the {count} that "
            f"see the whole grid; got {block}"
        )
    return every[block:]


def same(value: Tensor) -> Tensor:
    """The identity."""
    return value


def infer_grid(patches: int, height: int, width: int) -> tuple[int, int]:
    """The patch grid of so many patches on an image of so many pixels, for square patches.

    Raises:
        InputError: If no square patch size gives that number.
    """
    for size in range(1, min(height, width) + 1):
        if (height // size) * (width // size) == patches:
            return height // size, width // size
    raise InputError(
        f"{patches} patch tokens fit no grid of square patches on {height}x{width} pixels"
    )


def repeated(value: Any, batch: int, times: int) -> Any:
    """Tensors of that batch size, also inside tuples, lists and dicts, repeated along it."""
    if isinstance(value, Tensor):
        many = value.ndim > 0 and value.shape[0] == batch
        return value.repeat(times, *(1,) * (value.ndim - 1)) if many else value
    if isinstance(value, (tuple, list)):
        return type(value)(repeated(part, batch, times) for part in value)
    if isinstance(value, dict):
        return {key: repeated(part, batch, times) for key, part in value.items()}
    return value
