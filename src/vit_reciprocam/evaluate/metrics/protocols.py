"""Named evaluation protocols: settings that the metrics leave open.

Published implementations disagree on them (docs/evaluation.md, "Protocols"), so figures are
reported with their protocol's name.
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

__all__ = ["PROTOCOLS", "Protocol", "get_protocol"]


@dataclass(frozen=True)
class Protocol:
    """How methods are measured on a data set. Defaults are those of `byun2023`.

    Attributes:
        name: Name that is reported with every figure.
        target: Class c that is explained: "label", the true one, or "top1", the model's.
        upsampling: Way to bring a map to the picture's size, "bicubic" or "bilinear".
        compared_at: Size at which coherency and complexity are measured: "grid", on the map's
            cells, or "image", on the upsampled map.
        adcc: Way to compute a data set's ADCC: "means", from its mean coherency, complexity and
            drop, or "mean", the mean of the pictures' own.
        resize: Resizing of the preprocessing, "squash" or "shortest"; see `Preprocess`.
        crop_pct: Share of the resized picture that the crop keeps along each side; 0.875 is 256
            pixels for a crop of 224.
        interpolation: Interpolation of the preprocessing, see `Preprocess`.
        steps: Number of steps of insertion and deletion.
        unit: Unit that appears or vanishes in turn, "patch" or "pixel".
        baseline: Picture that insertion starts from and deletion ends at, "blur", "mean" or
            "black".
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
        """Refuse a choice that does not exist."""
        if not isinstance(self.name, str) or not self.name.strip():
            raise InputError(f"a protocol needs a name; got {self.name!r}")
        check_choice("target", self.target, ("label", "top1"))
        check_choice("upsampling", self.upsampling, MODES)
        check_choice("compared_at", self.compared_at, ("grid", "image"))
        check_choice("adcc", self.adcc, ("means", "mean"))
        check_choice("unit", self.unit, UNITS)
        check_choice("baseline", self.baseline, BASELINES)
        if type(self.steps) is not int or self.steps < 1:
            raise InputError(f"steps must be a whole number, 1 or more; got {self.steps!r}")
        if type(self.crop_pct) not in (int, float) or not 0 < self.crop_pct <= 1:
            raise InputError(f"crop_pct must be a share above 0, at most 1; got {self.crop_pct!r}")
        self.preprocess(Preprocess((1, 1)))  # checks resize and interpolation

    def preprocess(self, base: Preprocess) -> Preprocess:
        """Return a model's preprocessing with this protocol's resize, crop and interpolation."""
        return dataclasses.replace(
            base, resize=self.resize, crop_pct=self.crop_pct, interpolation=self.interpolation
        )

    def targets(self, probs: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
        """Return the class c that is explained, (B,), from probabilities or logits (B, C).

        If c is the label and there is not one per picture, `InputError` is raised.
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
        """Return E of `adcc.masked_images`, (B, 3, H, W), with this protocol's upsampling."""
        return masked_images(images, maps, self.upsampling)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values, which `from_dict` reads."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Protocol:
        """Return the protocol that `to_dict` described; all fields but the name may be missing."""
        fields = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            check_choice("a protocol's field", key, fields)
        if "name" not in values:
            raise InputError("a protocol needs a name: add the field name")
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> Protocol:
        """Read your own protocol from a .toml or .json file of fields, such as `steps = 28`.

        If the field `name` is missing, the file's name without its ending is taken. A file that
        changes a protocol of `PROTOCOLS` must give it another name.
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
"""Name -> protocol: Byun & Lee 2023 (ViT-ReciproCAM) and Poppi et al. 2021 (ADCC)."""


def get_protocol(name: str | Path) -> Protocol:
    """Return a protocol by its name in `PROTOCOLS`, or from a .toml or .json file."""
    if str(name) in PROTOCOLS:
        return PROTOCOLS[str(name)]
    if Path(name).suffix.lower() in (".toml", ".json"):
        return Protocol.from_file(name)
    raise InputError(
        f"protocol must be one of {', '.join(map(repr, PROTOCOLS))}, or a .toml or .json file with "
        f"one of your own; got {str(name)!r}"
    )
