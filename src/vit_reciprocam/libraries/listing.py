"""The models that the installed libraries can build: what `vit-reciprocam models` goes through.

Nothing is fetched: each is built with random weights on the meta device, without memory.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from importlib.metadata import version

from vit_reciprocam.errors import InputError, ReciproCAMError
from vit_reciprocam.libraries import LIBRARIES
from vit_reciprocam.libraries.common.building import Architecture, short_reason
from vit_reciprocam.libraries.dispatch import split_model
from vit_reciprocam.libraries.library import Library

__all__ = ["Architecture", "architectures", "describe", "nothing_fits", "short_reason"]


def architectures(pattern: str = "*") -> Iterator[Architecture]:
    """Find models of the installed libraries by a pattern, such as "deit*" or "torchvision:*"."""
    for library in _searched(pattern):
        for one in library.listing() if library.is_installed() else ():
            name = one.spec if ":" in pattern else one.spec.partition(":")[2]
            if fnmatch.fnmatchcase(name, pattern):
                yield one


def describe(architecture: Architecture) -> tuple[str, str]:
    """Return by which path a model is explained, "-" if by none, and why not by the closed form."""
    try:
        because = split_model(architecture.build()).direct_because
    except ReciproCAMError as error:
        return "-", short_reason(str(error))
    return ("direct", because) if because else ("closed-form", "")


def nothing_fits(pattern: str) -> InputError:
    """Return the error of a pattern that fits no model: what was searched, and what is like it."""
    searched = _searched(pattern)
    if not searched:
        return InputError(
            f"no model fits {pattern!r}: before the colon stands one of {', '.join(LIBRARIES)}"
        )
    there = [f"{one.module} {version(one.package)}" for one in searched if one.is_installed()]
    words = [f"no model fits {pattern!r}. Searched: {', '.join(there) or 'no library'}"]
    words += [
        f"not installed: {one.module}, pip install 'vit-reciprocam[{one.extra}]'"
        for one in searched
        if not one.is_installed()
    ]
    prefix, colon, name = pattern.rpartition(":")
    wider = f"{prefix}{colon}*{name.strip('*')}*"
    if like := list(architectures(wider)):
        words.append(f"{wider!r} fits {len(like)}, such as {like[0].spec}")
    return InputError("; ".join(words))


def _searched(pattern: str) -> list[Library]:
    """Return the libraries that a pattern means, all of them where it has no prefix."""
    prefix, colon, _ = pattern.partition(":")
    return [
        library
        for short, library in LIBRARIES.items()
        if not colon or fnmatch.fnmatchcase(short, prefix)
    ]
