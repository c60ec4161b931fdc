"""The cut just before a head pools all tokens, which is the same for every library.

Letters of the shapes: B images, T tokens that are pooled, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from vit_reciprocam.core.split import Cut, MeanPool, Readout, Split, Tap
from vit_reciprocam.errors import InputError
from vit_reciprocam.libraries.common.running import Grid, same

__all__ = ["no_pool", "split_pool"]


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
    pool: Callable[[Tensor], Tensor],
    finish: Callable[[Tensor], Tensor],
    readout: Readout | MeanPool | str,
    block: nn.Module,
    prefix: int = 0,
) -> Split:
    """Cut a model before its pool. There is no skip path: F is X.

    Args:
        tokens: Images (B, 3, H, W) -> the patch grid, and the tokens (B, T, D) that are pooled.
        pool: The tokens -> the pooled features.
        finish: The pooled features -> logits (B, C).
        readout: What the closed form needs, or the reason why it does not hold.
        block: The last block, or the module after it.
        prefix: Number of the pooled tokens before the patches.
    """

    def cut(images: Tensor) -> Cut:
        grid, x = tokens(images)
        return Cut(
            grid=grid,
            x=x,
            norm=same,
            rest=lambda normed, _x: finish(pool(normed)),
            readout=None if isinstance(readout, str) else readout,
        )

    return Split(
        cut=cut,
        prefix_tokens=prefix,
        block=block,
        tap=Tap((block,)),
        direct_because=readout if isinstance(readout, str) else "",
    )
