"""The models that the installed libraries can build: what `vit-reciprocam models` goes through.

Nothing is fetched: each is built with random weights, or on the meta device, without memory.
"""

from __future__ import annotations

import fnmatch
import importlib
import importlib.util
from collections.abc import Iterator

from vit_reciprocam.adapters import split_model
from vit_reciprocam.catalogue.parts import Architecture, short_reason
from vit_reciprocam.errors import ReciproCAMError

__all__ = ["Architecture", "architectures", "describe", "short_reason"]

_LIBRARIES = {
    "timm": "timm",
    "torchvision": "torchvision",
    "open_clip": "open_clip",
    "hf": "transformers",
}


def architectures(pattern: str = "*") -> Iterator[Architecture]:
    """Those of the installed libraries that fit a pattern, such as "deit*" or "torchvision:*"."""
    prefix, colon, _ = pattern.partition(":")
    for short, library in _LIBRARIES.items():
        wanted = not colon or fnmatch.fnmatchcase(short, prefix)
        if wanted and importlib.util.find_spec(library) is not None:
            for one in importlib.import_module(f"{__name__}.{library}").architectures():
                name = one.spec if colon else one.spec.partition(":")[2]
                if fnmatch.fnmatchcase(name, pattern):
                    yield one


def describe(architecture: Architecture) -> tuple[str, str]:
    """By which path it is explained, "-" if by none, and why not by the closed form."""
    try:
        model, _ = architecture.whole()
        because = split_model(model).direct_because
    except ReciproCAMError as error:
        return "-", short_reason(str(error))
    return ("direct", because) if because else ("closed-form", "")
