"""The models that the installed libraries can build, for `vit-reciprocam models`.

Nothing is fetched: each is built on the meta device, without weights or memory.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from importlib.metadata import version

from vit_reciprocam.errors import InputError, ReciproCAMError
from vit_reciprocam.libraries import LIBRARIES
from vit_reciprocam.libraries.common.loading import Architecture
from vit_reciprocam.libraries.dispatch import split_model
from vit_reciprocam.libraries.library import Library

__all__ = ["Architecture", "architectures", "describe", "nothing_fits", "short_reason"]


def architectures(pattern: str = "*") -> Iterator[Architecture]:
    """Find models of the installed libraries by a pattern, such as "deit*" or "torchvision:*"."""
    for library in _libraries_meant(pattern):
        for one in library.listing() if library.is_installed() else ():
            name = one.spec if ":" in pattern else one.spec.partition(":")[2]
            if fnmatch.fnmatchcase(name, pattern):
                yield one


def describe(architecture: Architecture) -> tuple[str, str]:
    """Return a model's path, "-" if it is refused, and the reason if it is not the closed form."""
    try:
        because = split_model(architecture.build()).direct_because
    except ReciproCAMError as error:
        return "-", short_reason(str(error))
    return ("direct", because) if because else ("closed-form", "")


def short_reason(refusal: str) -> str:
    """Return the reason in a refusal, without the model's name and the list of supported models."""
    return re.sub("^.{,80}? is not supported: ", "", refusal).partition(". Supported are")[0]


def nothing_fits(pattern: str) -> InputError:
    """Return the error for a pattern that fits no model: what was searched, and a near match."""
    searched = _libraries_meant(pattern)
    if not searched:
        return InputError(
            f"no model fits {pattern!r}: before the colon stands one of {', '.join(LIBRARIES)}"
        )
    installed = [f"{one.module} {version(one.package)}" for one in searched if one.is_installed()]
    clauses = [f"no model fits {pattern!r}. Searched: {', '.join(installed) or 'no library'}"]
    clauses += [
        f"not installed: {one.module}, pip install 'vit-reciprocam[{one.extra}]'"
        for one in searched
        if not one.is_installed()
    ]
    prefix, colon, name = pattern.rpartition(":")
    wider = f"{prefix}{colon}*{name.strip('*')}*"
    if similar := list(architectures(wider)):
        clauses.append(f"{wider!r} fits {len(similar)}, such as {similar[0].spec}")
    return InputError("; ".join(clauses))


def _libraries_meant(pattern: str) -> list[Library]:
    """Return the libraries whose prefix fits that of a pattern, all of them if it has none."""
    prefix, colon, _ = pattern.partition(":")
    return [
        library
        for short, library in LIBRARIES.items()
        if not colon or fnmatch.fnmatchcase(short, prefix)
    ]
