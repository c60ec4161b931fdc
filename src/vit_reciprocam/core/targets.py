"""The classes to explain: from what a user may write to one array of class indices."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np

from vit_reciprocam.errors import InputError, UnknownClassError

__all__ = ["find_class", "resolve_targets", "softmax", "top_classes"]

_FORMS = "None (top-1), 'all', an int, (B,) one class per image, (B, K), or (1, K) for all images"


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities over the last axis, float32."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: np.ndarray = powers / powers.sum(axis=-1, keepdims=True)
    return probabilities.astype(np.float32)


def top_classes(logits: np.ndarray, count: int) -> np.ndarray:
    """Return the `count` classes of the highest logits, best first: (B, C) -> (B, count) int64."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    return order.astype(np.int64)


def resolve_targets(targets: Any, logits: np.ndarray) -> np.ndarray:
    """Return class indices (B, K) int64 for targets in any form that `ReciproCAM` takes.

    Lists, arrays and tensors of integers will do. The logits (B, C) are those of the unmasked
    images.

    Raises:
        InputError: If the shape or type does not fit.
        UnknownClassError: If an index is outside the model's classes.
    """
    images, classes = logits.shape
    if callable(targets):
        targets = targets(logits)
    if targets is None:
        return top_classes(logits, 1)
    if isinstance(targets, str):
        if targets != "all":
            raise InputError(f"targets must be {_FORMS}; got {targets!r}")
        return np.broadcast_to(np.arange(classes, dtype=np.int64), (images, classes)).copy()
    if hasattr(targets, "detach"):
        targets = targets.detach().cpu()
    try:
        array = np.asarray(targets)
    except (ValueError, TypeError) as error:
        raise InputError(f"targets must be {_FORMS}; got {targets!r}") from error
    if not array.size:
        raise InputError(f"targets must be {_FORMS}; got none")
    if array.dtype.kind not in "iu":
        raise InputError(f"targets must be integers; got {array.dtype} ({_FORMS})")
    if array.ndim == 0:
        array = np.full((images, 1), array)
    elif array.ndim == 1 and len(array) == images:
        array = array[:, None]
    elif array.ndim != 2 or array.shape[0] not in (1, images) or array.shape[1] == 0:
        raise InputError(
            f"targets of shape {array.shape} do not fit {images} image(s): expected {_FORMS}"
            + (f". For several classes of one image pass [{array.tolist()}]" * (array.ndim == 1))
        )
    outside = array[(array < 0) | (array >= classes)]
    if outside.size:
        raise UnknownClassError(
            f"class {outside[0]} does not exist: the model has {classes} classes, 0 to "
            f"{classes - 1}"
        )
    return np.broadcast_to(array, (images, array.shape[1])).astype(np.int64)


def find_class(wanted: str | SupportsIndex, names: Sequence[str] | int) -> int:
    """Return the index of a class that a user names by its index or its name.

    A name fits a class if it equals the class's whole name or one of its comma-separated synonyms,
    whatever the case. If it fits none, the error offers classes whose names have it as a whole
    word before those that are spelt like it. An index may be a number or text. `names` is the
    number of classes if their names are not known.

    Raises:
        UnknownClassError: If nothing or more than one class fits; the message offers the closest.
    """
    count = names if isinstance(names, int) else len(names)
    if not isinstance(wanted, str) or re.fullmatch(r"\s*[+-]?\d+\s*", wanted):
        try:
            index = int(wanted) if isinstance(wanted, str) else operator.index(wanted)
        except TypeError as error:
            raise UnknownClassError(
                f"a class is a name or an index, got {type(wanted).__name__} {wanted!r}"
            ) from error
        if not 0 <= index < count:
            raise UnknownClassError(
                f"class {index} does not exist: the model has {count} classes, 0 to {count - 1}"
            )
        return index
    if not wanted.strip():
        raise UnknownClassError("a class is a name or an index, got an empty text")
    if isinstance(names, int):
        raise UnknownClassError(f"the model has no class names, so {wanted!r} must be an index")
    indices: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        for synonym in {name, *name.split(",")}:
            indices.setdefault(synonym.strip().casefold(), []).append(index)
    found = indices.get(wanted.strip().casefold(), [])
    if len(found) == 1:
        return found[0]
    if found:
        choices = "; ".join(f"{index} ({names[index]})" for index in found)
        raise UnknownClassError(f"{wanted!r} names several classes: {choices}. Pass the index")
    word = re.compile(rf"\b{re.escape(wanted.strip().casefold())}\b")
    close = [name for name in indices if word.search(name)]
    close += difflib.get_close_matches(wanted.casefold(), indices, n=3, cutoff=0.5)
    close += [name for name in indices if wanted.casefold() in name]
    offered = dict.fromkeys(index for name in close for index in indices[name])
    hint = "; ".join(f"{index} ({names[index]})" for index in list(offered)[:5])
    hint += "; …" if len(offered) > 5 else ""
    raise UnknownClassError(
        f"no class is called {wanted!r}"
        + (f". Closest: {hint}" if hint else ", and none is close to it")
    )
