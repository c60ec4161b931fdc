"""The two cuts of every library's models: at an encoder block, and just before a head's pool."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vit_reciprocam.core.split import (
    Attention,
    Cut,
    MeanPool,
    Readout,
    ReadoutBlock,
    Split,
    Tap,
)
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
        projections: The modules that project keys and values, each with the part of its output that
            holds them; empty if no module does. What they give in the plain pass is used again.
    """

    tap: Tap
    attention: Callable[[Grid, dict[str, Any], int], Attention] = _not_known
    finish: Callable[[Tensor, Tensor, Tensor], Tensor] = _not_known
    why_unknown: Callable[[], str] = lambda: "the parts of the last block are not known"
    projections: Sequence[tuple[nn.Module, slice]] = ()

    def norm(self, x: Tensor) -> Tensor:
        """Return F for X."""
        if self.tap.side == "input":
            return x
        normed = [module(x) for module in self.tap.modules]
        return normed[0] if len(normed) == 1 else torch.cat(normed, dim=-1)


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
    describe: Callable[[nn.Module, str], BlockDescription],
    enter: Callable[[Sequence[nn.Module], Tensor], tuple[Grid, list[Call]]],
    head: Callable[[Tensor], Tensor],
    reads: int | str,
    before: Sequence[nn.Module] = (),
    depth: int = 1,
    prefix: int = 0,
    why_unknown: str = "",
    run: Callable[[nn.Module, Call, Tensor], Tensor] = run_again,
) -> Split:
    """Cut a model at the place of F in a block.

    Args:
        blocks: The block and those after it.
        describe: A block, and what error texts call it -> the block by its parts.
        enter: Some blocks and images (B, 3, H, W) -> the patch grid, and the call of each of these
            blocks by the model, in which X (B, T, D) is the first argument.
        head: The last block's output (B, T, D) -> logits (B, C).
        reads: R, the number of tokens that the head reads, from the first on; if it reads all of
            them, a clause that says so.
        before: The blocks before these.
        depth: Number of blocks, the last ones, that the readout holds; more than 1 only for a cut
            in the last block.
        prefix: Number of tokens before the patches.
        why_unknown: Why the head may read more tokens than that, "" if it does not.
        run: A block, its call, and other tokens in place of X -> the block's output.
    """
    description = describe(blocks[0], "the last block")
    tap = description.tap
    if isinstance(reads, str):
        because, tokens = reads, 0
    else:
        not_last = "the cut is not in the last block" if len(blocks) > 1 else ""
        because, tokens = not_last or description.why_unknown() or why_unknown, reads

    earlier = [] if because else _describe_earlier(before, depth, describe)

    def cut(images: Tensor) -> Cut:
        with _kept_projections(earlier) as projected:
            modules = [*before[len(before) - len(earlier) :], *blocks]
            grid, calls = enter(modules, images)
        calls_before, calls = calls[: len(earlier)], calls[len(earlier) :]

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
            attention = description.attention(grid, options, tokens)
            readout_blocks = [
                ReadoutBlock(
                    x=call[0][0],
                    norm=one.norm,
                    attention=one.attention(grid, call[1], tokens),
                    finish=one.finish,
                    projected=(kept[0], kept[1]) if kept else None,
                )
                for one, call, kept in zip(earlier, calls_before, projected, strict=True)
            ]
            readout = Readout(tokens, attention, finish, tuple(readout_blocks))
        return Cut(grid, x, description.norm, rest, readout)

    return Split(cut, prefix, blocks[0], tap, because)


def _describe_earlier(
    before: Sequence[nn.Module],
    depth: int,
    describe: Callable[[nn.Module, str], BlockDescription],
) -> list[BlockDescription]:
    """Return the blocks before the last that a depth needs, by their parts; refuse unknown ones."""
    if depth > len(before) + 1:
        raise InputError(
            f"depth={depth}, but the model has {len(before) + 1} blocks that its readout tokens "
            "run through: the most it takes"
        )
    found: list[BlockDescription] = []
    for number in range(2, depth + 1):  # from the last but one towards the first
        what = f"block {number} from the end"
        try:
            description = describe(before[1 - number], what)
            because = description.why_unknown()
        except ModelError as error:
            because = str(error)
        if because:
            raise InputError(
                f"depth={depth} reaches {what}, where the closed form does not hold: {because}. "
                f"The deepest that holds is depth={number - 1}"
            )
        found.insert(0, description)
    return found


@contextlib.contextmanager
def _kept_projections(blocks: Sequence[BlockDescription]) -> Iterator[list[list[Tensor]]]:
    """Keep the keys and values that the model projects in some blocks while the context lasts."""
    kept: list[list[Tensor]] = [[] for _ in blocks]

    def keep(number: int, part: slice, _module: nn.Module, _args: Any, output: Tensor) -> None:
        kept[number].append(output[..., part])

    with contextlib.ExitStack() as stack:
        for number, block in enumerate(blocks):
            for module, part in block.projections:
                hook = functools.partial(keep, number, part)
                stack.callback(module.register_forward_hook(hook).remove)
        yield kept


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
