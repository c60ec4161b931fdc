"""Any module of a user's own, cut at the output of a module that the user names -> Split."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vit_reciprocam.adapters.parts import same
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.split import Cut, Split, Tap

__all__ = ["logits_of", "split"]


def split(
    model: nn.Module, target: nn.Module, *, grid: tuple[int, int] | None, prefix_tokens: int
) -> Split:
    """Cut a model at the output of one of its modules, (B, T, D) or (B, h, w, D).

    What follows the cut is run by running the whole model with that output replaced, so nothing
    needs to be known of it, and each mask costs one forward pass.

    Args:
        model: Images -> logits (B, C), or an object that holds them as `logits`.
        target: The module, called once a forward pass.
        grid: (h, w) of the patches; not needed for outputs (B, h, w, D).
        prefix_tokens: How many tokens stand before the patches.

    Raises:
        InputError: If target is no module of the model, or grid and prefix_tokens make no sense.
    """
    if not isinstance(target, nn.Module) or all(target is not one for one in model.modules()):
        raise InputError("target must be one of the model's own modules, such as model.blocks[-1]")
    if prefix_tokens < 0:
        raise InputError(f"prefix_tokens must not be negative, got {prefix_tokens}")
    tap = Tap((target,))

    def cut(images: Tensor) -> Cut:
        outputs: list[Any] = []

        def note(tokens: Tensor, _number: int) -> Tensor:
            outputs.append(tokens)
            return tokens

        with tap.changed(note):
            logits_of(model(images))
        if len(outputs) != 1:
            raise ModelError(
                f"the target {type(target).__name__} ran {len(outputs)} times in one forward pass; "
                "it must run once"
            )
        tokens = outputs[0]

        def rest(normed: Tensor, _x: Tensor) -> Tensor:
            times = len(normed) // len(images)
            with tap.replaced(normed):
                return logits_of(model(images.repeat(times, 1, 1, 1)))

        return Cut(grid=_grid(tokens, target, grid, prefix_tokens), x=tokens, norm=same, rest=rest)

    return Split(
        cut=cut,
        prefix_tokens=prefix_tokens,
        block=target,
        tap=tap,
        direct_because="the cut is at a module that you named, and what follows it is not known",
    )


def logits_of(output: Any) -> Tensor:
    """A model's class scores (B, C), also out of an object that holds them.

    Raises:
        ModelError: If there are none.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        what = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise ModelError(f"the model must give logits (batch, classes), but gave {what}")
    return logits


def _grid(
    tokens: Any, target: nn.Module, grid: tuple[int, int] | None, prefix: int
) -> tuple[int, int]:
    name = type(target).__name__
    if not isinstance(tokens, Tensor) or tokens.ndim not in (3, 4):
        what = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise InputError(
            f"the target {name} must give tokens (B, T, D) or (B, h, w, D), but gave {what}"
        )
    if tokens.ndim == 4:
        have = (tokens.shape[1], tokens.shape[2])
        if prefix:
            raise InputError(f"a grid of tokens {have} has no prefix: use prefix_tokens=0")
        if grid is not None and tuple(grid) != have:
            raise InputError(f"the target {name} gives a grid of {have} tokens, not {tuple(grid)}")
        return have
    patches = tokens.shape[1] - prefix
    if grid is None:
        raise InputError(
            f"the target {name} gives {tokens.shape[1]} tokens: say how the patches lie with "
            "grid=(h, w), and how many tokens stand before them with prefix_tokens="
        )
    if grid[0] * grid[1] != patches:
        raise InputError(
            f"grid={tuple(grid)} is {grid[0] * grid[1]} patches, but the target {name} gives "
            f"{tokens.shape[1]} tokens, of which prefix_tokens={prefix} are no patches"
        )
    return int(grid[0]), int(grid[1])
