"""Named evaluation protocols: what the metrics leave open, written down, so that figures compare.

Published implementations disagree on all of it; METHOD, "Metrics", has the table. A score is
reported with its protocol's name.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vit_reciprocam.core.maps import MODES
from vit_reciprocam.errors import InputError, check_choice
from vit_reciprocam.evaluate.metrics.adcc import masked_images
from vit_reciprocam.evaluate.metrics.perturbation import BASELINES, UNITS
from vit_reciprocam.pictures.preprocess import Preprocess

__all__ = ["AGGREGATES", "PROTOCOLS", "Protocol", "get_protocol"]

AGGREGATES = ("means", "mean")
"""ADCC of a data set: of the set's mean coherency, complexity and drop; or the images' mean."""


@dataclass(frozen=True)
class Protocol:
    """How a data set is scored. What is left out is as in `byun2023`.

    Attributes:
        name: Reported with every score.
        target: The class that is explained: "label", the true one, or "top1", the model's.
        upsampling: How a map is brought to the picture's size, "bicubic" or "bilinear".
        compared_at: Where coherency and complexity are measured: "grid", on the map's cells, or
            "image", on the upsampled map.
        adcc: "means" is the harmonic mean of the data set's means, "mean" the images' mean ADCC.
        resize: Of the preprocessing: "squash" or "shortest", as in `images.Preprocess`.
        crop_pct: Likewise; 0.875 is 256 pixels for a crop of 224.
        interpolation: Likewise.
        steps: Of insertion and deletion.
        unit: "patch" or "pixel", what they take at a time.
        baseline: "blur", "mean" or "black", what they start from and end at.
    """

    name: str
    target: str = "label"
    upsampling: str = "bicubic"
    compared_at: str = "grid"
    adcc: str = "means"
    resize: str = "squash"
    crop_pct: float = 0.875
    interpolation: str = "bilinear"
    steps: int = 14
    unit: str = "patch"
    baseline: str = "blur"

    def __post_init__(self) -> None:
        """Check the choices.

        Raises:
            InputError: If one does not exist.
        """
        if not isinstance(self.name, str) or not self.name.strip():
            raise InputError(f"a protocol needs a name; got {self.name!r}")
        check_choice("target", self.target, ("label", "top1"))
        check_choice("upsampling", self.upsampling, MODES)
        check_choice("compared_at", self.compared_at, ("grid", "image"))
        check_choice("adcc", self.adcc, AGGREGATES)
        check_choice("unit", self.unit, UNITS)
        check_choice("baseline", self.baseline, BASELINES)
        if type(self.steps) is not int or self.steps < 1:
            raise InputError(f"steps must be a whole number, 1 or more; got {self.steps!r}")
        if type(self.crop_pct) not in (int, float) or not 0 < self.crop_pct <= 1:
            raise InputError(f"crop_pct must be a share above 0, at most 1; got {self.crop_pct!r}")
        self.preprocess(Preprocess((1, 1)))  # checks resize and interpolation

    def preprocess(self, base: Preprocess) -> Preprocess:
        """The model's size, mean and std with this protocol's resize, crop and interpolation."""
        return dataclasses.replace(
            base, resize=self.resize, crop_pct=self.crop_pct, interpolation=self.interpolation
        )

    def targets(self, probs: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
        """The class that is explained, (B,), of probabilities (B, C) and true labels (B,).

        Raises:
            InputError: If it is the label and there is not one for each picture.
        """
        if self.target == "top1":
            return np.asarray(np.argmax(probs, axis=-1))
        if labels is None or np.shape(labels) != np.shape(probs)[:-1]:
            got = "none" if labels is None else f"labels {np.shape(labels)}"
            raise InputError(
                f"protocol {self.name!r} explains the true class, so each picture needs a label; "
                f"got {got} for probabilities {np.shape(probs)}"
            )
        return np.asarray(labels)

    def masked_images(self, images: np.ndarray, maps: np.ndarray) -> np.ndarray:
        """E of `metrics.masked_images`: images (B, 3, H, W) and maps (B, h, w) -> (B, 3, H, W)."""
        return masked_images(images, maps, self.upsampling)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Protocol:
        """From what `to_dict` gave, or a part of it with the name.

        Raises:
            InputError: If a field does not exist, the name is missing, or a value is none of its
                choices.
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            check_choice("a protocol's field", key, fields)
        if "name" not in values:
            raise InputError("a protocol needs a name: add the field name")
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> Protocol:
        """One's own protocol from a .toml or .json file of fields, such as `steps = 28`.

        The name is by default the file's, without its ending.

        Raises:
            InputError: If the file cannot be read, is not TOML or JSON, has a field that does not
                exist, or takes a name of `PROTOCOLS` for something else.
        """
        path = Path(path)
        read = {".toml": tomllib.loads, ".json": json.loads}.get(path.suffix.lower())
        if read is None:
            raise InputError(f"a protocol's file must end in .toml or .json; got {path}")
        try:
            values = read(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"cannot read protocol {path}: {error.strerror}") from error
        except ValueError as error:
            raise InputError(f"{path} is not valid {path.suffix[1:].upper()}: {error}") from error
        if not isinstance(values, dict):
            raise InputError(f"{path} must hold a protocol's fields, got a {type(values).__name__}")
        try:
            protocol = cls.from_dict({"name": path.stem, **values})
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        if PROTOCOLS.get(protocol.name, protocol) != protocol:
            raise InputError(
                f"{path} changes the protocol {protocol.name!r}: give yours another name"
            )
        return protocol


PROTOCOLS: dict[str, Protocol] = {
    "byun2023": Protocol("byun2023"),
    "poppi2021": Protocol(
        "poppi2021",
        target="top1",
        upsampling="bilinear",
        compared_at="image",
        adcc="mean",
        resize="shortest",
    ),
}
"""Name -> protocol: Byun & Lee 2023 (ViT-ReciproCAM) and Poppi et al. 2021 (ADCC's authors)."""


def get_protocol(name: str | Path) -> Protocol:
    """A protocol by its name in `PROTOCOLS`, or from a .toml or .json file.

    Raises:
        InputError: If there is none, or the file is not one.
    """
    if str(name) in PROTOCOLS:
        return PROTOCOLS[str(name)]
    if Path(name).suffix.lower() in (".toml", ".json"):
        return Protocol.from_file(name)
    raise InputError(
        f"protocol must be one of {', '.join(map(repr, PROTOCOLS))}, or a .toml or .json file with "
        f"one of your own; got {str(name)!r}"
    )
