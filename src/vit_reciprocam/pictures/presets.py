"""Preprocessing written as text, for ONNX files that do not say what stands before them."""

from __future__ import annotations

import dataclasses
from typing import Any

from vit_reciprocam.errors import InputError, check_choice
from vit_reciprocam.pictures.preprocess import Preprocess

__all__ = ["PRESETS", "parse_preprocess"]

PRESETS: dict[str, dict[str, Any]] = {
    "imagenet": {},
    "inception": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    "clip": {
        "crop_pct": 1.0,
        "mean": (0.48145466, 0.4578275, 0.40821073),
        "std": (0.26862954, 0.26130258, 0.27577711),
    },
}
"""What differs from the defaults of `Preprocess`: of timm's and torchvision's models trained on
ImageNet, of those that take values from -1 to 1, and of CLIP's."""

_FORM = "NAME or NAME:KEY=VALUE,KEY=VALUE, such as imagenet:size=224,crop_pct=0.9"


def parse_preprocess(text: str, *, size: tuple[int, int] | None = None) -> Preprocess:
    """From "NAME" or "NAME:KEY=VALUE,KEY=VALUE", such as "inception:size=384x512,resize=squash".

    Args:
        text: A name of `PRESETS`, and fields of `Preprocess`. A size is 224, or height x width as
            384x512; mean and std are one number or three with slashes between, 0.5/0.5/0.5.
        size: (height, width) where the text has none, as a graph says it.

    Raises:
        InputError: If it is not of this form, or there is no size.
    """
    name, _, rest = text.partition(":")
    check_choice("preprocess", name, PRESETS)
    known = {field.name for field in dataclasses.fields(Preprocess)}
    settings: dict[str, Any] = {"size": size, **PRESETS[name]}
    for part in filter(None, rest.split(",")):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals or not value:
            raise InputError(f"preprocess {text!r}: expected {_FORM}")
        check_choice("a setting of preprocess", key, sorted(known))
        try:
            settings[key] = _value(key, value)
        except ValueError as error:
            raise InputError(f"preprocess {text!r}: {key} cannot be {value!r}") from error
    if settings["size"] is None:
        raise InputError(
            f"preprocess {text!r} has no size, and the file takes any: write {name}:size=224"
        )
    return Preprocess(**settings)


def _value(key: str, value: str) -> Any:
    if key == "size":
        height, _, width = value.partition("x")
        size = int(height), int(width or height)
        if min(size) < 1:
            raise ValueError
        return size
    if key in ("mean", "std"):
        numbers = tuple(map(float, value.split("/")))
        if len(numbers) not in (1, 3):
            raise ValueError
        return numbers * (3 // len(numbers))
    if key == "crop_pct":
        share = float(value)
        if not 0 < share <= 1:
            raise ValueError
        return share
    return value
