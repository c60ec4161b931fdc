"""The cut at an encoder block, alike for every library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vit_reciprocam.core.split import Attention, Cut, Readout, Split, Tap
from vit_reciprocam.libraries.common.running import Call, same

__all__ = ["run_again", "split_block"]

Grid = tuple[int, int]


def run_again(block: nn.Module, call: Call, x: Tensor) -> Tensor:
    """The output of a block called as it was, but with other tokens."""
    (_, *others), options = call
    y = block(x, *others, **options)
    tokens: Tensor = y if isinstance(y, Tensor) else y[0]
    return tokens


def split_block(
    *,
    blocks: Sequence[nn.Module],
    calls: Callable[[Tensor], tuple[Grid, list[Call]]],
    tap: Tap,
    head: Callable[[Tensor], Tensor],
    because: str,
    prefix: int = 0,
    tokens: int = 1,
    attention: Callable[[Grid, dict[str, Any]], Attention] | None = None,
    after: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    run: Callable[[nn.Module, Call, Tensor], Tensor] = run_again,
) -> Split:
    """Cut where F stands in a block.

    Args:
        blocks: The block and those after it.
        calls: Images -> patch grid, and how the model calls each block: X comes first.
        tap: Where in the block F stands: what norms make of X, or X itself on the side "input".
        head: The last block's output -> logits (B, C).
        because: Why the closed form does not hold. Where it does, the next four say how.
        prefix: How many tokens stand before the patches.
        tokens: R, how many the head reads, from the first on.
        attention: Patch grid, and the keywords that the block is called with -> its attention.
        after: Joined heads, F and X of the readout tokens -> the block's output.
        run: A block, its call and other tokens -> its output.
    """

    def norm(x: Tensor) -> Tensor:
        normed = [module(x) for module in tap.modules]
        return normed[0] if len(normed) == 1 else torch.cat(normed, dim=-1)

    def cut(images: Tensor) -> Cut:
        grid, called = calls(images)

        def rest(normed: Tensor, y: Tensor) -> Tensor:
            (block, call), *later = zip(blocks, called, strict=True)
            with tap.replaced(normed):
                y = run(block, call, y)
            for block, call in later:
                y = run(block, call, y)
            return head(y)

        def finish(heads: Tensor, normed: Tensor, x: Tensor) -> Tensor:
            assert after is not None
            y = after(heads, normed, x)
            return head(y.flatten(0, 1)).view(*y.shape[:2], -1)

        (x, *_), options = called[0]
        readout = None
        if attention is not None and not because:
            readout = Readout(tokens, attention(grid, options), finish)
        return Cut(grid, x, same if tap.side == "input" else norm, rest, readout)

    return Split(cut, prefix, blocks[0], tap, because)
