"""What is known about the model libraries: one folder with one record per library."""

from __future__ import annotations

import importlib
import pkgutil

from vit_reciprocam.libraries.library import Library

__all__ = ["LIBRARIES", "find_libraries", "library_of"]


def find_libraries() -> dict[str, Library]:
    """Return prefix -> record for every folder that has one, those of the extra "torch" first."""
    found = []
    for entry in pkgutil.iter_modules(__path__):
        if entry.ispkg:
            folder = importlib.import_module(f"{__name__}.{entry.name}")
            found += [folder.LIBRARY] if hasattr(folder, "LIBRARY") else []
    found.sort(key=lambda library: library.extra != "torch")
    return {library.prefix: library for library in found}


LIBRARIES = find_libraries()
"""Prefix -> record of every supported library."""


def library_of(model: object) -> Library | None:
    """Return the library that a model's class comes from or is derived from, or None."""
    by_module = {library.module: library for library in LIBRARIES.values()}
    modules = (cls.__module__.partition(".")[0] for cls in type(model).__mro__)
    return next((by_module[module] for module in modules if module in by_module), None)
