"""What every library needs to load models by name: quiet downloads and helpful errors."""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Iterator, Sequence
from types import ModuleType

from vit_reciprocam.errors import DownloadError, ModelError, first_line

__all__ = ["first_sentence", "no_such_model", "not_fetched", "quiet"]


@contextlib.contextmanager
def quiet(*loggers: str, level: int = logging.ERROR) -> Iterator[None]:
    """Mute loggers (by name, "" is the root) below a level, as long as the context lasts.

    They would repeat for each retry what the error says at the end.
    """
    found = [logging.getLogger(name) for name in loggers]
    before = [logger.level for logger in found]
    for logger in found:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, old in zip(found, before, strict=True):
            logger.setLevel(old)


def first_sentence(error: Exception) -> str:
    """Return the first sentence of an error's message, without the advice that hub clients add."""
    return first_line(error).partition(". ")[0] or type(error).__name__


def not_fetched(what: str, reason: str, instead: str) -> DownloadError:
    """Return the error for something that could not be fetched, and what to pass instead."""
    return DownloadError(f"{what} could not be fetched: {reason}. Without network, pass {instead}")


def no_such_model(library: ModuleType, name: str, names: Sequence[str]) -> ModelError:
    """Return the error for a name that a library does not have, with the most similar names."""
    close = difflib.get_close_matches(name, names, n=3)
    hint = f". Closest: {', '.join(close)}" if close else ""
    return ModelError(f"{library.__name__} {library.__version__} has no model {name!r}{hint}")
