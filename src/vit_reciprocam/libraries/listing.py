"""The models that the installed libraries can build: what `vit-reciprocam models` goes through.

Nothing is fetched: each is built with random weights, or on the meta device, without memory.
"""

from __future__ import annotations

import fnmatch
import importlib
import importlib.util
from collections.abc import Iterator
from importlib.metadata import version

from vit_reciprocam.errors import InputError, ReciproCAMError
from vit_reciprocam.libraries.common.building import Architecture, short_reason
from vit_reciprocam.libraries.dispatch import split_model

__all__ = ["Architecture", "architectures", "describe", "nothing_fits", "short_reason"]

_LIBRARIES = {
    "timm": "timm",
    "torchvision": "torchvision",
    "open_clip": "open_clip",
    "hf": "transformers",
}
_EXTRAS = {"open_clip": "open-clip", "transformers": "transformers"}
_PACKAGES = {"open_clip": "open_clip_torch"}


def architectures(pattern: str = "*") -> Iterator[Architecture]:
    """Those of the installed libraries that fit a pattern, such as "deit*" or "torchvision:*"."""
    for library in _searched(pattern):
        if _is_installed(library):
            listing = importlib.import_module(f"vit_reciprocam.libraries.{library}.listing")
            for one in listing.architectures():
                name = one.spec if ":" in pattern else one.spec.partition(":")[2]
                if fnmatch.fnmatchcase(name, pattern):
                    yield one


def nothing_fits(pattern: str) -> InputError:
    """The error of a pattern that fits no model: where it was looked for, and what is like it."""
    searched = _searched(pattern)
    if not searched:
        return InputError(
            f"no model fits {pattern!r}: before the colon stands one of {', '.join(_LIBRARIES)}"
        )
    there = [f"{one} {version(_PACKAGES.get(one, one))}" for one in searched if _is_installed(one)]
    words = [f"no model fits {pattern!r}. Searched: {', '.join(there) or 'no library'}"]
    words += [
        f"not installed: {one}, pip install 'vit-reciprocam[{_EXTRAS.get(one, 'torch')}]'"
        for one in searched
        if not _is_installed(one)
    ]
    prefix, colon, name = pattern.rpartition(":")
    wider = f"{prefix}{colon}*{name.strip('*')}*"
    if like := list(architectures(wider)):
        words.append(f"{wider!r} fits {len(like)}, such as {like[0].spec}")
    return InputError("; ".join(words))


def _searched(pattern: str) -> list[str]:
    """The libraries that a pattern means, all without a prefix."""
    prefix, colon, _ = pattern.partition(":")
    shorts = [short for short in _LIBRARIES if not colon or fnmatch.fnmatchcase(short, prefix)]
    return [_LIBRARIES[short] for short in shorts]


def _is_installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def describe(architecture: Architecture) -> tuple[str, str]:
    """By which path it is explained, "-" if by none, and why not by the closed form."""
    try:
        model, _ = architecture.whole()
        because = split_model(model).direct_because
    except ReciproCAMError as error:
        return "-", short_reason(str(error))
    return ("direct", because) if because else ("closed-form", "")
