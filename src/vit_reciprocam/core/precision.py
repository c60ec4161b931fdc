"""Everything after the cut in float32, whatever the model's precision.

Masks change scores by little: on photographs the paper's scores range over 0.001 to 0.02. The
rounding of half precision is as large, so it would turn the maps into noise. The blocks before the
cut run once, as the model runs them, and all masks share what they round. What follows the cut is
computed once per mask, in at least float32.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from vit_reciprocam.core.split import Cut, Readout, ReadoutBlock, widen

__all__ = ["in_float32", "widen_cut"]

_HALF = (torch.bfloat16, torch.float16)


class _Widened(TorchFunctionMode):
    """Call every function of PyTorch with float32 in place of half precision.

    So a module computes in float32 although its weights stay as they are. Each weight is converted
    once as long as the mode lasts.
    """

    def __init__(self) -> None:
        super().__init__()
        self._converted: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function with converted tensors."""
        return func(*tree_map(self._convert, args), **tree_map(self._convert, kwargs or {}))

    def _convert(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype not in _HALF:
            return value
        if id(value) not in self._converted:  # the original is kept, so that its id stays its own
            self._converted[id(value)] = value, value.detach().float()
        return self._converted[id(value)][1]


@contextlib.contextmanager
def in_float32(like: Tensor) -> Iterator[None]:
    """Compute in at least float32 while the context lasts; `like` is what enters from before it."""
    device = like.device.type
    with contextlib.ExitStack() as stack:
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
        if like.dtype in _HALF:
            stack.enter_context(_Widened())
        yield


def widen_cut(cut: Cut) -> Cut:
    """Return a cut whose tensors are at least float32."""
    readout = cut.readout
    if isinstance(readout, Readout):
        earlier = tuple(_widen_block(block) for block in readout.earlier)
        readout = dataclasses.replace(readout, earlier=earlier)
    return dataclasses.replace(cut, x=widen(cut.x), readout=readout)


def _widen_block(block: ReadoutBlock) -> ReadoutBlock:
    projected = block.projected and (widen(block.projected[0]), widen(block.projected[1]))
    return dataclasses.replace(block, x=widen(block.x), projected=projected)
