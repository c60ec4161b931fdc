"""Say how far a map's values lie apart, since its colours do not.

A map is scaled on its own, so a hair's breadth of probability gets the same colours as the whole
way from 0 to 1. These functions find the range that a map was scaled from, tell whether rounding
alone could have made it, and write it in words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

__all__ = [
    "are_beyond_rounding",
    "find_ranges",
    "name_with_range",
    "write_caption",
    "write_range",
    "write_remark",
]

_EVIDENCE_UNITS = ("nats", None)
"""Units of signed values: evidence is in nats; fused evidence and other methods' have no unit."""

_ROUNDINGS = 10 * float(np.finfo(np.float32).eps)
_MOST_DIGITS = 5  # after the point; small numbers that need more are written with an exponent


def find_ranges(values: np.ndarray) -> np.ndarray:
    """Return the lowest and highest value of each map: (..., h, w) -> (..., 2)."""
    return np.stack([values.min(axis=(-2, -1)), values.max(axis=(-2, -1))], axis=-1)


def are_beyond_rounding(ranges: np.ndarray, logits: np.ndarray, unit: str | None) -> np.ndarray:
    """Return whether each range is wider than ten roundings of the logits behind it.

    A logit of size s is rounded by about s times eps, the precision of float32, and so is the
    logarithm of a probability that is computed from it. The width of a range, in nats, is therefore
    compared with 10 * eps * max(1, largest absolute logit of the image). The width of a range of
    probabilities is the logarithm of the highest over the lowest.

    Args:
        ranges: Ranges (B, K, 2), as `find_ranges` returns them.
        logits: Logits (B, C) of the unmasked images.
        unit: What the ranges count: "probability", or else what is a difference of logits or of
            logarithms already.
    """
    ends = ranges.astype(np.float64)
    if unit == "probability":
        with np.errstate(divide="ignore"):
            ends = np.log(ends)
    with np.errstate(invalid="ignore"):  # probabilities that are all 0 give NaN, which is not above
        width = ends[..., 1] - ends[..., 0]
    size = np.abs(logits).max(axis=-1, keepdims=True).clip(min=1)
    beyond: np.ndarray = width > _ROUNDINGS * size
    return beyond


def write_range(target: Mapping[str, Any]) -> str:
    """Write a map's range, such as "from 90.3% to 90.5%" or "from -0.07 to +0.09 nats".

    There are as many digits as it takes to tell the two ends apart. Evidence has its sign; with
    unit None it is fused, or of another method. The range is read from a target's record ("lowest",
    "highest", "unit"); if another method had scaled the map already, the text is empty.
    """
    if "unit" not in target:
        return ""
    lowest, highest, unit = target["lowest"], target["highest"], target["unit"]
    if unit == "probability":
        low, high = _tell_apart(100 * lowest, 100 * highest, lambda x, form: f"{x:{form}}%", 1)
    elif unit in _EVIDENCE_UNITS:
        low, high = _tell_apart(lowest, highest, lambda x, form: f"{x:{'+' if x else ''}{form}}", 2)
    else:
        low, high = _tell_apart(lowest, highest, lambda x, form: f"{x:{form}}", 2)
    after = " nats" if unit == "nats" else ""
    return f"{low}{after} everywhere" if low == high else f"from {low} to {high}{after}"


def write_remark(target: Mapping[str, Any]) -> str:
    """Return what a reader of a map must know, from its target's record; "" if nothing.

    It is "no evidence" or "no preference" if the map is degenerate, and "within rounding" if it is
    not reliable.
    """
    if target["degenerate"]:
        evidence = "unit" in target and target["unit"] in _EVIDENCE_UNITS
        return "no evidence" if evidence else "no preference"
    return "" if target["reliable"] else "within rounding"


def write_caption(target: Mapping[str, Any], name: str) -> str:
    """Return the caption of a map: probability and name, range, and remark, one per line."""
    return "\n".join([f"{target['probability']:.1%} {name}", *_describe_map(target)])


def name_with_range(target: Mapping[str, Any]) -> str:
    """Return a target's name, and in brackets the range of its map and what to know of it."""
    words = ", ".join(_describe_map(target))
    return f"{target['name']} ({words})" if words else str(target["name"])


def _describe_map(target: Mapping[str, Any]) -> list[str]:
    span, remark = write_range(target), write_remark(target)
    return [*([f"map {span}"] if span else []), *([remark] if remark else [])]


def _tell_apart(
    lowest: float, highest: float, write: Callable[[float, str], str], digits: int
) -> tuple[str, str]:
    """Return two numbers as texts, with at least so many digits after the point.

    The last digit is worth no more than their difference, so that rounding neither hides nor
    exaggerates it.
    """
    if lowest == highest:
        return (write(lowest, f".{digits}f"),) * 2
    place = math.ceil(-math.log10(highest - lowest))
    size = max(abs(lowest), abs(highest))
    if place > _MOST_DIGITS and size < 0.01:
        form = f".{max(1, math.floor(math.log10(size)) + place)}e"
    else:
        form = f".{max(digits, place)}f"
    # what is rounded to zero is written without a sign
    low, high = (write(x if float(f"{x:{form}}") else 0.0, form) for x in (lowest, highest))
    return low, high
