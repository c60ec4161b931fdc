"""What an exported file says of itself, in ONNX's metadata properties."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

from vit_reciprocam.errors import ModelError
from vit_reciprocam.images import Preprocess
from vit_reciprocam.masks import Masking

__all__ = ["Metadata"]

_KEY = "vit_reciprocam"
_SCHEMA = 1


@dataclass(frozen=True)
class Metadata:
    """Name, classes, preprocessing and method of an exported model.

    Attributes:
        name: What the model is called.
        class_names: One a class.
        preprocess: What stands before the model.
        masking: What the maps in the graph keep, and where they cut.
        version: Of this package, which wrote the file.
    """

    name: str
    class_names: tuple[str, ...]
    preprocess: Preprocess
    masking: Masking
    version: str

    def to_properties(self) -> dict[str, str]:
        """As ONNX metadata properties."""
        values = {
            "schema": _SCHEMA,
            "name": self.name,
            "class_names": list(self.class_names),
            "preprocess": self.preprocess.to_dict(),
            "masking": dataclasses.asdict(self.masking),
            "version": self.version,
        }
        return {_KEY: json.dumps(values)}

    @classmethod
    def from_properties(cls, properties: Mapping[str, str], *, file: str) -> Metadata:
        """From a file's metadata properties.

        Raises:
            ModelError: If this package did not write the file, or a later one did.
        """
        if _KEY not in properties:
            raise ModelError(f"{file} holds no explanation: it was not written by vit-reciprocam")
        values = json.loads(properties[_KEY])
        if values["schema"] != _SCHEMA:
            raise ModelError(
                f"{file} was written by vit-reciprocam {values['version']}, in a layout that this "
                "version does not know: upgrade with pip install --upgrade vit-reciprocam"
            )
        return cls(
            name=values["name"],
            class_names=tuple(values["class_names"]),
            preprocess=Preprocess.from_dict(values["preprocess"]),
            masking=Masking(**values["masking"]),
            version=values["version"],
        )
