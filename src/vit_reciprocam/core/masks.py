"""The masks of ViT-ReciproCAM: one per patch, which keeps a small window of the grid around it.

Byun & Lee 2023, section 3. A mask multiplies the tokens after the first LayerNorm of the last
encoder block.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vit_reciprocam.errors import InputError, check_choice

__all__ = [
    "KERNELS",
    "LAYERS",
    "NORMALIZATIONS",
    "SCORES",
    "Masking",
    "Place",
    "describe_maskings",
    "kernel_window",
    "mask_matrix",
    "read_maskings",
    "window_sizes",
]

KERNELS: dict[str, np.ndarray] = {
    "gaussian": np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16,
    "dirac": np.ones((1, 1)),
    "box": np.ones((3, 3)),
    "box5": np.ones((5, 5)),
}
"""Weights of each kernel, a square of an odd number of rows; none is above 1."""

LAYERS = ("norm1", "block", "pool")
"""Names of the places at which tokens can be masked."""


SCORES = ("probability", "log-probability", "logit")
"""Names of what is read under each mask."""

NORMALIZATIONS = ("minmax", "evidence")
"""Names of the ways from scores to maps."""


class Place(NamedTuple):
    """A place in a kernel's window: rows down and columns right of the centre, and its weight."""

    down: int
    right: int
    level: float


@dataclass(frozen=True)
class Masking:
    """What is kept for each patch, and where the network is cut.

    Attributes:
        kernel: Name in `KERNELS`.
        class_token: False also masks the prefix tokens (the paper's ablation, Table 3).
        layer: "norm1" masks the LayerNorm's output and leaves the skip path untouched; "block"
            masks the output of the previous block, so that both the skip path and the LayerNorm see
            it (Table 4); "pool", for heads that pool all tokens, masks what they pool, which is not
            the paper's method.
        depth: Number of blocks, the last ones, in which the readout tokens see the masked tokens; 1
            is the paper's method. More than 1 needs the layer "norm1".
    """

    kernel: str = "gaussian"
    class_token: bool = True
    layer: str = "norm1"
    depth: int = 1

    def __post_init__(self) -> None:
        """Refuse a kernel, layer or depth that does not exist, or that do not go together."""
        check_choice("kernel", self.kernel, KERNELS)
        check_choice("layer", self.layer, LAYERS)
        depth: Any = self.depth
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            raise InputError(
                "depth must be a whole number of blocks, 1 (the paper's method) or more; got "
                f"{self.depth!r}"
            )
        if self.depth > 1 and self.layer != "norm1":
            raise InputError(
                f"depth={self.depth} masks what the readout tokens read after each block's first "
                f"LayerNorm, so it goes with layer='norm1', not {self.layer!r}; layer='block' and "
                "'pool' have depth=1"
            )


def read_maskings(
    masking: Masking, normalize: str, fuse: Sequence[Mapping[str, Any]]
) -> tuple[Masking, ...]:
    """Return the maskings of `fuse=`, or the one that the other settings say.

    Raises:
        InputError: If a setting does not exist, is given twice, or does not go with the others.
    """
    check_choice("normalize", normalize, NORMALIZATIONS)
    if not fuse:
        return (masking,)
    if normalize != "evidence":
        raise InputError("fuse sums evidence: pass normalize='evidence' with it")
    if masking != Masking(layer=masking.layer):
        raise InputError("fuse says kernel, class_token and depth: leave these out beside it")
    keys = {"kernel", "class_token", "depth"}
    if not all(isinstance(one, Mapping) and one.keys() <= keys for one in fuse):
        raise InputError(
            f"fuse must be a list of settings, each with some of {', '.join(sorted(keys))}; "
            f"got {fuse!r}"
        )
    maskings = tuple(Masking(layer=masking.layer, **one) for one in fuse)
    if len(set(maskings)) < len(maskings):
        raise InputError(f"fuse has a setting twice: {list(fuse)!r}")
    return maskings


def describe_maskings(maskings: Sequence[Masking]) -> dict[str, Any]:
    """Return the settings of one masking, or of several that are fused, as JSON values."""
    if len(maskings) == 1:
        return dataclasses.asdict(maskings[0])
    fused = [
        {"kernel": one.kernel, "class_token": one.class_token, "depth": one.depth}
        for one in maskings
    ]
    return {"fuse": fused, "layer": maskings[0].layer}


@functools.cache
def kernel_window(kernel: str) -> tuple[Place, ...]:
    """Return the places at which a kernel's weight is not zero, row by row."""
    weights = KERNELS[kernel]
    middle_row, middle_column = weights.shape[0] // 2, weights.shape[1] // 2
    return tuple(
        Place(int(row) - middle_row, int(column) - middle_column, float(weights[row, column]))
        for row, column in np.argwhere(weights)
    )


@functools.lru_cache(maxsize=16)
def window_sizes(grid: tuple[int, int], kernel: str) -> np.ndarray:
    """Return the number of patches (h, w) that each mask keeps, fewer at the border of the grid."""
    height, width = grid
    kept = np.zeros(grid)
    for down, right, _ in kernel_window(kernel):
        rows = slice(max(0, -down), max(0, height - max(0, down)))
        columns = slice(max(0, -right), max(0, width - max(0, right)))
        kept[rows, columns] += 1
    kept.flags.writeable = False
    return kept


def mask_matrix(
    grid: tuple[int, int],
    masking: Masking,
    *,
    prefix_tokens: int = 1,
    patches: range | None = None,
    null: bool = False,
) -> np.ndarray:
    """Return the masks M of the paper, (N, T) float64 with N = h·w and T = prefix + N.

    Row n holds the kernel centred on patch n, cropped at the border and not renormalised; the
    prefix columns are 1, or 0 with the class token off. If `patches` is given, only the rows of
    these patches are returned. If `null`, the all-null mask, which keeps no patch, comes first.
    Layer and depth make no difference here.
    """
    height, width = grid
    rows = range(height * width) if patches is None else patches
    masks = np.zeros((null + len(rows), height, width))
    for mask, patch in zip(masks[null:], rows, strict=True):
        for place in kernel_window(masking.kernel):
            row, column = patch // width + place.down, patch % width + place.right
            if 0 <= row < height and 0 <= column < width:
                mask[row, column] = place.level
    prefix = np.full((len(masks), prefix_tokens), float(masking.class_token))
    return np.concatenate([prefix, masks.reshape(len(masks), height * width)], axis=1)
