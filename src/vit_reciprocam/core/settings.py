"""Settings written as text: a pair KEY=VALUE, or a name with pairs, NAME:KEY=VALUE,KEY=VALUE."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from vit_reciprocam.errors import InputError, check_choice

__all__ = ["parse_settings", "read_value", "split_pair", "write_value"]


def parse_settings(
    what: str, text: str, *, names: Iterable[str], expected: str
) -> tuple[str, dict[str, str]]:
    """Return the name and the settings of "NAME" or "NAME:KEY=VALUE,KEY=VALUE", values as text.

    Errors begin with `what` the text stands for, and show the `expected` form. `InputError` is
    raised if there is no such name, or a pair lacks its key, its "=" or its value.
    """
    name, _, rest = text.partition(":")
    check_choice(what, name, names)
    pairs = [split_pair(pair) for pair in rest.split(",") if pair]
    if not all(key and value for key, value in pairs):
        raise InputError(f"{what} {text!r}: expected {expected}")
    return name, dict(pairs)


def split_pair(text: str) -> tuple[str, str]:
    """Return key and value of "KEY=VALUE", stripped; the key is "" if text is not such a pair."""
    key, equals, value = text.partition("=")
    return (key.strip() if equals else ""), value.strip()


def read_value(text: str) -> Any:
    """Return the value that a text stands for: JSON, True or False, or a number, else the text.

    "3" is an integer, ".5" and "0.5" are numbers, "true" and "True" are true, "[96, 160]" is a
    list and "dirac" stays a text.
    """
    readers: tuple[Callable[[str], Any], ...] = (json.loads, float)
    for read in readers:
        try:
            return read(text.lower() if text.lower() in ("true", "false") else text)
        except ValueError:
            continue
    return text


def write_value(value: Any) -> str:
    """Return the text from which `read_value` reads a value back."""
    if isinstance(value, str) and read_value(value) == value:
        return value
    return json.dumps(value)
