"""Named evaluation protocols: what the metrics leave open, written down, so that figures compare.

Published implementations disagree on all of it; METHOD, "Metrics", has the table. A score is
reported with its protocol's name.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vit_reciprocam.core.maps import MODES
from vit_reciprocam.errors import InputError, check_choice
from vit_reciprocam.evaluate.metrics import adcc as metrics
from vit_reciprocam.evaluate.metrics.arrays import check_columns, check_pairs
from vit_reciprocam.evaluate.metrics.perturbation import (
    BASELINES,
    UNITS,
    baseline_images,
    deletion,
    insertion,
)
from vit_reciprocam.pictures.preprocess import Preprocess

__all__ = ["AGGREGATES", "PROTOCOLS", "Protocol", "get_protocol"]

AGGREGATES = ("means", "mean")
"""ADCC of a data set: of the set's mean coherency, complexity and drop; or the images' mean."""

_ORDER = ("insertion", "deletion")
_LOCATION = ("pointing_game", "energy_in_box", "mass_accuracy")


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
        return metrics.masked_images(images, maps, self.upsampling)

    def score_images(
        self,
        images: np.ndarray,
        maps: np.ndarray,
        masked_maps: np.ndarray,
        p: np.ndarray,
        o: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """Each picture's row as columns (B,), in fractions.

        p, o, drop, increase, coherency, complexity and adcc, the picture's own.

        Args:
            images: Normalised (B, 3, H, W).
            maps: A, (B, h, w) in [0, 1].
            masked_maps: A', the maps of the same classes on the masked pictures.
            p: Probability of the target on the pictures, (B,).
            o: The same on the masked pictures.

        Raises:
            InputError: If shapes do not fit, or something is NaN or outside [0, 1].
        """
        images, maps = check_pairs(images, maps)
        size = images.shape[-2:] if self.compared_at == "image" else None
        coherency = metrics.coherency(maps, masked_maps, size=size, mode=self.upsampling)
        complexity = metrics.complexity(maps, size=size, mode=self.upsampling)
        drop, increase = metrics.average_drop(p, o), metrics.average_increase(p, o)
        return {
            "p": np.asarray(p, np.float64),
            "o": np.asarray(o, np.float64),
            "drop": drop,
            "increase": increase,
            "coherency": coherency,
            "complexity": complexity,
            "adcc": metrics.adcc(coherency, complexity, drop),
        }

    def score_order(
        self,
        predict: Callable[[np.ndarray], np.ndarray],
        images: np.ndarray,
        maps: np.ndarray,
        targets: np.ndarray,
        preprocess: Preprocess,
    ) -> dict[str, np.ndarray]:
        """Insertion and deletion of each picture, two columns (B,), in fractions.

        Args:
            predict: Images (B, 3, H, W) -> probabilities (B, C); called 2 · (steps + 1) times.
            images: Normalised (B, 3, H, W).
            maps: (B, h, w) in [0, 1].
            targets: Class indices (B,).
            preprocess: What the images went through, for its mean and standard deviation.

        Raises:
            InputError: As `perturbation.insertion`.
        """
        mean, std = preprocess.mean, preprocess.std
        baseline = baseline_images(images, self.baseline, mean=mean, std=std)
        given = (predict, images, baseline, maps, targets)
        steps, unit, mode = self.steps, self.unit, self.upsampling
        return {
            "insertion": insertion(*given, steps=steps, unit=unit, mode=mode),
            "deletion": deletion(*given, steps=steps, unit=unit, mode=mode),
        }

    def summary(self, columns: Mapping[str, np.ndarray]) -> dict[str, float]:
        """A data set's row from its pictures' columns (images,), in percent.

        drop, increase, coherency, complexity and adcc, by this protocol's `adcc`; then insertion,
        deletion, insertion_minus_deletion, pointing_game, energy_in_box and mass_accuracy, where
        their columns are given. The last three may be NaN where a picture's objects are not known:
        they are the mean over the others, and left out where there is none.

        Args:
            columns: At least p, o, coherency and complexity, in fractions; unknown ones are
                ignored.

        Raises:
            InputError: If a column is missing, empty, of another length, NaN or outside [0, 1].
        """
        missing = [c for c in ("p", "o", "coherency", "complexity") if c not in columns]
        if missing:
            raise InputError(f"a summary needs column {', '.join(missing)}; got {list(columns)}")
        p, o = columns["p"], columns["o"]
        terms = {
            "coherency": np.asarray(columns["coherency"], np.float64),
            "complexity": np.asarray(columns["complexity"], np.float64),
            "drop": metrics.average_drop(p, o),
        }
        of_images = metrics.adcc(**terms)  # also checks the terms
        means = {name: term.mean() for name, term in terms.items()}
        row = {
            "drop": means["drop"],
            "increase": metrics.average_increase(p, o).mean(),
            "coherency": means["coherency"],
            "complexity": means["complexity"],
            "adcc": metrics.adcc(**means) if self.adcc == "means" else of_images.mean(),
        }
        for name in _ORDER:
            if name in columns:
                check_columns(p=p, **{name: columns[name]})
                row[name] = np.mean(columns[name])
        if "insertion" in row and "deletion" in row:
            row["insertion_minus_deletion"] = row["insertion"] - row["deletion"]
        for name in _LOCATION:
            values = np.asarray(columns.get(name, []), np.float64)
            known = values[~np.isnan(values)]
            if known.size:
                check_columns(**{name: known})
                row[name] = known.mean()
        return {name: 100 * float(value) for name, value in row.items()}

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
