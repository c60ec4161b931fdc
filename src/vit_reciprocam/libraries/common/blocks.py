"""The cut at an encoder block, which is the same for every library.

Letters of the shapes: B images, T tokens, of which the first R are the readout tokens, D width,
A width of the joined heads, C classes; n masks at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vit_reciprocam.core.split import Attention, Cut, Readout, Split, Tap
from vit_reciprocam.libraries.common.running import Call, Grid, same

__all__ = ["run_again", "split_block"]


def run_again(
    block: nn.Module, call: Call, x: Float[Tensor, "batch *tokens D"]
) -> Float[Tensor, "batch *tokens D"]:
    """Return the output of a block that is called as before, but with other tokens."""
    (_, *others), options = call
    y = block(x, *others, **options)
    tokens: Tensor = y if isinstance(y, Tensor) else y[0]
    return tokens


def split_block(
    *,
    blocks: Sequence[nn.Module],
    enter: Callable[[Tensor], tuple[Grid, list[Call]]],
    tap: Tap,
    head: Callable[[Tensor], Tensor],
    because: str,
    prefix: int = 0,
    readout_tokens: int = 1,
    attention: Callable[[Grid, dict[str, Any]], Attention] | None = None,
    finish_block: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    run: Callable[[nn.Module, Call, Tensor], Tensor] = run_again,
) -> Split:
    """Cut a model at the place of F in a block.

    Args:
        blocks: The block and those after it.
        enter: Images (B, 3, H, W) -> the patch grid, and the call of each block by the model, in
            which X (B, T, D) is the first argument.
        tap: The place of F in the block. On its side "output", F is what the tap's modules, norms,
            make of X; on its side "input", F is X itself.
        head: The last block's output (B, T, D) -> logits (B, C).
        because: Why the closed form does not hold, "" if it does; then it needs `readout_tokens`,
            `attention` and `finish_block`.
        prefix: Number of tokens before the patches.
        readout_tokens: R, the number of tokens that the head reads, from the first on.
        attention: The patch grid, and the keyword arguments of the model's call of the block -> the
            block's attention.
        finish_block: The joined heads (n, B, R, A), F (n, B, R, D) and X (n, B, R, D) of the
            readout tokens -> the block's output (n, B, R, D).
        run: A block, its call, and other tokens in place of X -> the block's output.
    """

    def norm(x: Tensor) -> Tensor:
        normed = [module(x) for module in tap.modules]
        return normed[0] if len(normed) == 1 else torch.cat(normed, dim=-1)

    def cut(images: Tensor) -> Cut:
        grid, calls = enter(images)

        def rest(normed: Tensor, y: Tensor) -> Tensor:
            (block, call), *later = zip(blocks, calls, strict=True)
            with tap.replaced(normed):
                y = run(block, call, y)
            for block, call in later:
                y = run(block, call, y)
            return head(y)

        def finish(heads: Tensor, normed: Tensor, x: Tensor) -> Tensor:
            assert finish_block is not None
            y = finish_block(heads, normed, x)
            # the head takes one batch, in which each mask of an image is like one more image
            return head(y.flatten(0, 1)).view(*y.shape[:2], -1)

        (x, *_), options = calls[0]
        readout = None
        if attention is not None and not because:
            readout = Readout(readout_tokens, attention(grid, options), finish)
        return Cut(grid, x, same if tap.side == "input" else norm, rest, readout)

    return Split(cut, prefix, blocks[0], tap, because)
