"""The two cuts of every library's models: at an encoder block, and just before a head's pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vit_reciprocam.core.split import Attention, Cut, MeanPool, Readout, Split, Tap
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.libraries.common.running import Call, Grid, same

__all__ = ["BlockDescription", "no_pool", "run_again", "split_block", "split_pool"]


def _not_known(*_: Any) -> Any:
    """Stand for the parts of a block of which only the tap is known."""
    raise ModelError("the parts of the block are not known")


@dataclass(frozen=True)
class BlockDescription:
    """An encoder block by its parts, whichever of the model's blocks it is.

    The tap alone is enough for the direct path.

    Attributes:
        tap: The place of F in the block. On its side "output", F is what the tap's modules, norms,
            make of X; on its side "input", F is X itself.
        attention: The patch grid, the keyword arguments of the model's call of the block, and the
            number R of readout tokens -> the block's attention.
        finish: The joined heads (n, B, R, A), F (n, B, R, D) and X (n, B, R, D) of the readout
            tokens -> the block's output (n, B, R, D).
        why_unknown: () -> why attention and finish cannot be used, "" if they can.
    """

    tap: Tap
    attention: Callable[[Grid, dict[str, Any], int], Attention] = _not_known
    finish: Callable[[Tensor, Tensor, Tensor], Tensor] = _not_known
    why_unknown: Callable[[], str] = lambda: "the parts of the last block are not known"


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
    description: BlockDescription,
    enter: Callable[[Tensor], tuple[Grid, list[Call]]],
    head: Callable[[Tensor], Tensor],
    reads: int | str,
    prefix: int = 0,
    why_unknown: str = "",
    run: Callable[[nn.Module, Call, Tensor], Tensor] = run_again,
) -> Split:
    """Cut a model at the place of F in a block.

    Args:
        blocks: The block and those after it.
        description: The block by its parts.
        enter: Images (B, 3, H, W) -> the patch grid, and the call of each block by the model, in
            which X (B, T, D) is the first argument.
        head: The last block's output (B, T, D) -> logits (B, C).
        reads: R, the number of tokens that the head reads, from the first on; if it reads all of
            them, a clause that says so.
        prefix: Number of tokens before the patches.
        why_unknown: Why the head may read more tokens than that, "" if it does not.
        run: A block, its call, and other tokens in place of X -> the block's output.
    """
    tap = description.tap
    if isinstance(reads, str):
        because, tokens = reads, 0
    else:
        not_last = "the cut is not in the last block" if len(blocks) > 1 else ""
        because, tokens = not_last or description.why_unknown() or why_unknown, reads

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
            y = description.finish(heads, normed, x)
            # the head takes one batch, in which each mask of an image is like one more image
            return head(y.flatten(0, 1)).view(*y.shape[:2], -1)

        (x, *_), options = calls[0]
        readout = None
        if not because:
            readout = Readout(tokens, description.attention(grid, options, tokens), finish)
        return Cut(grid, x, same if tap.side == "input" else norm, rest, readout)

    return Split(cut, prefix, blocks[0], tap, because)


def no_pool(model: nn.Module, because: str = "") -> InputError:
    """Return the error for a model whose head neither averages all tokens nor attends to them."""
    because = because or f"this {type(model).__name__} reads its class token"
    return InputError(
        "layer='pool' cuts before a head takes the mean of all tokens or attends to them, but "
        f"{because}: use layer='norm1'"
    )


def split_pool(
    *,
    tokens: Callable[[Tensor], tuple[Grid, Tensor]],
    finish: Callable[[Tensor], Tensor],
    block: nn.Module,
    prefix: int = 0,
    pool: Callable[[Tensor], Tensor] | None = None,
    readout: Readout | str = "",
) -> Split:
    """Cut a model before its pool. There is no skip path: F is X.

    Args:
        tokens: Images (B, 3, H, W) -> the patch grid, and the tokens (B, T, D) that are pooled.
        finish: The pooled features -> logits (B, C).
        block: The last block, or the module after it.
        prefix: Number of the pooled tokens before the patches.
        pool: The tokens -> the pooled features; None if they are the mean of the tokens.
        readout: What the closed form needs of `pool`, or the reason why it does not hold.
    """

    def cut(images: Tensor) -> Cut:
        grid, x = tokens(images)
        if pool is None:
            return Cut(grid, x, same, lambda f, _x: finish(f.mean(dim=1)), MeanPool(finish))
        known = None if isinstance(readout, str) else readout
        return Cut(grid, x, same, lambda f, _x: finish(pool(f)), known)

    because = readout if isinstance(readout, str) else ""
    return Split(cut, prefix, block, Tap((block,)), because)
