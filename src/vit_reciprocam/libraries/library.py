"""A model library as a record: what its folder offers to the rest of the package."""

from __future__ import annotations

import importlib.util
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Library", "import_on_call"]


@dataclass(frozen=True)
class Library:
    """A model library: its names, and the functions that know its models.

    Reading a record imports neither PyTorch nor the library: each function is imported when it is
    called. For a model that cannot be explained they raise a `ModelError` that says why.

    Attributes:
        spec: The form of its models' names, such as "open_clip:NAME/TAG". The part before the colon
            is the prefix.
        module: The name by which Python imports it; its models' classes are defined in it.
        package: The name by which it is installed.
        extra: The optional dependency group of this package that installs it.
        split: (model, block=, pool=, depth=) -> the `Split` of a classifier. The arguments are
            those of `libraries.dispatch.split_model`.
        load: (name, weights=, options=) -> (model in evaluation mode, its `Preprocess`, its class
            names or None). With `takes_prompts`, prompts= and templates= are passed if given.
            Raises `WeightsError` if local weights do not fit the model, and `DownloadError` if
            published ones cannot be fetched.
        listing: () -> an iterator over an `Architecture` for each of its models.
        split_tower: (tower, block=, pool=, depth=) -> the `Split` of an image tower, which gives
            features instead of logits. None if the library has no towers.
        encoder: (model) -> its `Encoder`, for methods that read the attention of every layer. None
            if none of its models can be described so.
        encodes: The models that `encoder` takes, in words, such as "ViT and DeiT".
        own_hooks: The Python module of hooks that the library itself leaves on its models, and that
            change nothing; they are not a user's.
        takes_prompts: Whether some of its models take texts as classes.
    """

    spec: str
    module: str
    package: str
    extra: str
    split: Callable[..., Any]
    load: Callable[..., Any]
    listing: Callable[..., Any]
    split_tower: Callable[..., Any] | None = None
    encoder: Callable[..., Any] | None = None
    encodes: str = ""
    own_hooks: str = ""
    takes_prompts: bool = False

    @property
    def prefix(self) -> str:
        """The part before the colon of its models' names, such as "hf"."""
        return self.spec.partition(":")[0]

    def is_installed(self) -> bool:
        """Return whether the library can be imported, without importing it."""
        return importlib.util.find_spec(self.module) is not None


def import_on_call(name: str) -> Callable[..., Any]:
    """Return a function that imports and calls the one of this name, "package.module:function"."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return pkgutil.resolve_name(name)(*args, **kwargs)

    return call
