"""Pick the targets of an explanation that are drawn, or that somebody asks for."""

from __future__ import annotations

import re

import numpy as np

from vit_reciprocam.core.targets import find_class
from vit_reciprocam.errors import InputError

__all__ = ["MOST_DRAWN", "file_name", "find_target", "first_synonym", "pick_targets"]

MOST_DRAWN = 12
"""Largest number of targets that are drawn and listed; if there are more, the most probable are."""


def pick_targets(probabilities: np.ndarray) -> list[int]:
    """Return the positions of the targets to draw: all in their order, or the most probable."""
    if len(probabilities) <= MOST_DRAWN:
        return list(range(len(probabilities)))
    best = np.argsort(-probabilities, kind="stable")[:MOST_DRAWN]
    return [int(position) for position in best]


def find_target(
    target: int | str,
    explained: np.ndarray,
    names: tuple[str, ...],
    classes: tuple[str, ...] | int,
) -> int:
    """Return the position of a target, given by position or class name, among those of its image.

    Args:
        target: Position or class name.
        explained: Class indices (K,) of the image's targets.
        names: Their K names.
        classes: Names of all classes, or their number if names are not known.

    Raises:
        InputError: If there is no such target.
    """
    if isinstance(target, str):
        found = np.flatnonzero(explained == find_class(target, classes))
        if not len(found):
            raise InputError(
                f"{target!r} was not explained for this image, but: {', '.join(names[:MOST_DRAWN])}"
            )
        return int(found[0])
    if not isinstance(target, (int, np.integer)) or not 0 <= target < len(explained):
        raise InputError(
            f"target must be a class name or a position, 0 to {len(explained) - 1}; got {target!r}"
        )
    return int(target)


def first_synonym(name: str) -> str:
    """Return the first of a class's comma-separated synonyms."""
    return name.split(",")[0].strip()


def file_name(name: str) -> str:
    """Return the first synonym of a class as part of a file name."""
    return re.sub(r"[^\w.-]+", "-", first_synonym(name))[:60].strip("-.") or "unnamed"
