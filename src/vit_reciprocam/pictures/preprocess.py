"""Prepare pictures for a model exactly as its training library does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from PIL import Image

from vit_reciprocam.core.settings import parse_settings
from vit_reciprocam.errors import ImageError, InputError, check_choice

__all__ = ["PRESETS", "Preprocess"]

_MOST_PIXELS = 100_000_000  # in a resized picture
_INTERPOLATIONS = {
    name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic", "lanczos")
}

PRESETS: dict[str, dict[str, Any]] = {
    "imagenet": {},
    "inception": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    "clip": {
        "crop_pct": 1.0,
        "mean": (0.48145466, 0.4578275, 0.40821073),
        "std": (0.26862954, 0.26130258, 0.27577711),
    },
}
"""Name -> the fields of `Preprocess` that differ from its defaults.

"imagenet" is for models of timm and torchvision trained on ImageNet, "inception" for models that
take values from -1 to 1, and "clip" for those of CLIP.
"""


@dataclass(frozen=True)
class Preprocess:
    """Resize, crop the centre, scale to [0, 1] and normalise, as most image classifiers expect.

    This gives the same numbers as timm's evaluation transform, and so torchvision's, without
    PyTorch.

    Attributes:
        size: (height, width) in pixels that the model takes.
        resize: "shortest" scales so that the crop fits, and keeps the aspect ratio; "squash" scales
            both sides independently.
        crop_pct: Share of the resized picture's side that the crop keeps.
        interpolation: Filter of the resizing: nearest, bilinear, bicubic or lanczos.
        mean: Mean of each channel, for values in [0, 1].
        std: Standard deviation of each channel, for values in [0, 1].
        half: Rounding of the left and top margins of the crop if they end on half a pixel: to the
            "even" neighbour, as timm and torchvision do, or "down", as transformers does.
    """

    size: tuple[int, int]
    resize: str = "shortest"
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    half: str = "even"

    def __post_init__(self) -> None:
        """Refuse choices that do not exist."""
        check_choice("resize", self.resize, ("shortest", "squash"))
        check_choice("interpolation", self.interpolation, _INTERPOLATIONS)
        check_choice("half", self.half, ("even", "down"))

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Return the model's input for an RGB picture: float32 (3, height, width)."""
        pixels = np.asarray(self.view(image), dtype=np.float32) / np.float32(255)
        normalised = (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(normalised.transpose(2, 0, 1))

    def view(self, image: Image.Image) -> Image.Image:
        """Return the picture of `size` that the model sees, before normalisation."""
        width, height = self._resized(image)
        resized = image.resize((width, height), _INTERPOLATIONS[self.interpolation])
        top, left = self._corner(width, height)
        return resized.crop((left, top, left + self.size[1], top + self.size[0]))

    def region(self, image: Image.Image) -> Image.Image:
        """Return the part of the picture that the model sees, at the picture's own resolution."""
        return image.crop(self.box(image))

    def box(self, image: Image.Image) -> tuple[int, int, int, int]:
        """Return where `region` lies: (left, top, right, bottom) in the picture's pixels."""
        width, height = self._resized(image)
        top, left = self._corner(width, height)
        across, down = image.width / width, image.height / height
        x0, y0 = round(left * across), round(top * down)
        x1, y1 = round((left + self.size[1]) * across), round((top + self.size[0]) * down)
        return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values, which `from_dict` reads back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """Return the preprocessing that `to_dict` described, with lists of JSON as tuples again."""
        loaded: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**loaded)

    @classmethod
    def parse(cls, text: str, *, size: tuple[int, int] | None = None) -> Preprocess:
        """Return the preprocessing that "NAME" or "NAME:KEY=VALUE,KEY=VALUE" describes.

        Args:
            text: A name of `PRESETS`, and fields that differ from it, such as
                "inception:size=384x512,resize=squash". A size is one number, or height x width
                such as 384x512; mean and std are one number, or three such as 0.5/0.4/0.3.
            size: (height, width) in pixels to use if the text has none.

        Raises:
            InputError: If the text is not of this form, or there is no size.
        """
        name, texts = parse_settings(
            "preprocess",
            text,
            names=PRESETS,
            expected="NAME or NAME:KEY=VALUE,KEY=VALUE, such as imagenet:size=224,crop_pct=0.9",
        )
        known = sorted(field.name for field in fields(cls))
        settings: dict[str, Any] = {"size": size, **PRESETS[name]}
        for key, value in texts.items():
            check_choice("a setting of preprocess", key, known)
            try:
                settings[key] = _read_field(key, value)
            except ValueError as error:
                raise InputError(f"preprocess {text!r}: {key} cannot be {value!r}") from error
        if settings["size"] is None:
            raise InputError(
                f"preprocess {text!r} has no size, and the file takes any: write {name}:size=224"
            )
        return cls(**settings)

    def _resized(self, image: Image.Image) -> tuple[int, int]:
        """Return width and height after the resize, as timm and torchvision compute them."""
        want_h, want_w = (math.floor(side / self.crop_pct) for side in self.size)
        if self.resize == "squash":
            return want_w, want_h
        if want_h == want_w:
            short, long = sorted(image.size)
            scaled = int(want_h * long / short)
            width, height = (want_w, scaled) if image.width <= image.height else (scaled, want_h)
        else:
            ratio = min(image.height / want_h, image.width / want_w)
            width, height = round(image.width / ratio), round(image.height / ratio)
        if width * height > _MOST_PIXELS:
            raise ImageError(
                f"a picture of {image.width}x{image.height} pixels is too long and thin: resized "
                f"for this model it would be {width}x{height}; crop it"
            )
        return width, height

    def _corner(self, width: int, height: int) -> tuple[int, int]:
        """Return the top and left of the centre crop."""
        rounded = round if self.half == "even" else math.floor
        return rounded((height - self.size[0]) / 2), rounded((width - self.size[1]) / 2)


def _read_field(key: str, text: str) -> Any:
    """Return the value of a field of `Preprocess` from its text; a bad one raises `ValueError`."""
    if key == "size":
        height, _, width = text.partition("x")
        size = int(height), int(width or height)
        if min(size) < 1:
            raise ValueError
        return size
    if key in ("mean", "std"):
        numbers = tuple(map(float, text.split("/")))
        if len(numbers) not in (1, 3):
            raise ValueError
        return numbers * (3 // len(numbers))
    if key == "crop_pct":
        share = float(text)
        if not 0 < share <= 1:
            raise ValueError
        return share
    return text
