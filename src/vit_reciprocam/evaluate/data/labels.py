"""Find a model's class by its label in a data set."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vit_reciprocam.core.targets import find_class
from vit_reciprocam.errors import InputError, UnknownClassError

__all__ = ["Labels"]

_SYNSET = re.compile(r"n\d{8}")
_IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Labels:
    """The classes of a model, whose names may be unknown, to be found by a data set's labels."""

    num_classes: int
    class_names: Sequence[str] | None = None

    def find(self, label: Any, where: str) -> int:
        """Return the class index of a label, which is an index, a WordNet synset or a class name.

        Raises:
            UnknownClassError: If the model has no such class; it names the label's place, `where`.
        """
        if isinstance(label, str) and _SYNSET.fullmatch(label.strip()):
            if label.strip() in self._synsets:
                return self._synsets[label.strip()]
            raise UnknownClassError(
                f"{where}: synset {label.strip()} is not among the model's {self.num_classes} "
                "classes; synsets are known for models of ImageNet-1k's 1000 classes"
            )
        try:
            return find_class(label, self.class_names or self.num_classes)
        except InputError as error:
            raise UnknownClassError(f"{where}: {error}") from error

    @cached_property
    def _synsets(self) -> dict[str, int]:
        if self.num_classes != _IMAGENET_CLASSES:
            return {}
        try:
            from timm.data import ImageNetInfo
        except ModuleNotFoundError:
            return {}
        return {synset: index for index, synset in enumerate(ImageNetInfo().label_names())}
