"""Every exception of the package.

    ReciproCAMError
    ├── InputError (ValueError)          images, targets or settings that cannot be used
    │   ├── ImageError                   a picture that cannot be read
    │   └── UnknownClassError            a class that the model does not have
    ├── ModelError (ValueError)          a model that cannot be explained or loaded
    │   ├── WeightsError                 weights that do not fit the model
    │   ├── ClosedFormError              the closed form was asked for but does not hold
    │   └── DownloadError                weights that could not be fetched
    └── MissingDependencyError (ImportError)

Catch `ReciproCAMError` for all of them. A message says what was wrong, what was expected and what
to do.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "ClosedFormError",
    "DownloadError",
    "ImageError",
    "InputError",
    "MissingDependencyError",
    "ModelError",
    "ReciproCAMError",
    "UnknownClassError",
    "WeightsError",
    "check_choice",
    "first_line",
]


class ReciproCAMError(Exception):
    """Base of every exception that this package raises on purpose."""


class InputError(ReciproCAMError, ValueError):
    """Images, targets or settings that cannot be used."""


class ImageError(InputError):
    """A picture that cannot be read."""


class UnknownClassError(InputError):
    """A class that the model does not have."""


class ModelError(ReciproCAMError, ValueError):
    """A model that cannot be explained or loaded."""


class WeightsError(ModelError):
    """Weights that do not fit the model."""


class ClosedFormError(ModelError):
    """The closed form was asked for but does not hold; the message has the reason."""


class DownloadError(ModelError):
    """Weights that could not be fetched."""


class MissingDependencyError(ReciproCAMError, ImportError):
    """An optional dependency is not installed; the message has the install command."""

    def __init__(self, what: str, extra: str) -> None:
        """Say that `what` needs `extra`, an optional dependency group of this package."""
        super().__init__(
            f"{what} needs packages that are not installed. "
            f"Install them with: pip install 'vit-reciprocam[{extra}]', in a clone: pip install "
            f"'.[{extra}]'"
        )


def check_choice(what: str, value: object, choices: Iterable[str]) -> None:
    """Raise an `InputError` that lists the choices if a setting is not one of them."""
    listed = list(choices)
    if value not in listed:
        raise InputError(f"{what} must be one of {', '.join(map(repr, listed))}; got {value!r}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if there is none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
