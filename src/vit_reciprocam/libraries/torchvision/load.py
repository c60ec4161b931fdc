"""Load torchvision's models by name, with their preprocessing and class names, and list them."""

from __future__ import annotations

import functools
import math
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models import get_model, get_model_builder, get_model_weights, list_models
from torchvision.transforms._presets import ImageClassification

from vit_reciprocam.errors import ModelError, WeightsError
from vit_reciprocam.libraries.common.loading import (
    RANDOM,
    Architecture,
    NoValues,
    is_named_transformer,
    no_such_model,
    not_fetched,
    read_weights,
)
from vit_reciprocam.libraries.torchvision.split import split, unsupported
from vit_reciprocam.pictures.preprocess import Preprocess

__all__ = ["architectures", "build", "load_torchvision"]

_FAMILIES = ("torchvision.models.vision_transformer", "torchvision.models.swin_transformer")


def load_torchvision(
    name: str, *, weights: str | os.PathLike[str] | None, options: dict[str, Any]
) -> tuple[nn.Module, Preprocess, tuple[str, ...] | None]:
    """Load a torchvision model, with options for its builder, such as `image_size=384`.

    `weights` may also be the name of published ones, such as "IMAGENET1K_SWAG_E2E_V1". A file under
    the name by which it is published gets the preprocessing of those weights, any other file that
    of the default ones.
    """
    if name not in list_models():
        raise no_such_model(torchvision, name, list_models())
    if get_model_builder(name).__module__ not in _FAMILIES:
        raise unsupported(name)
    outline = build(name, **options)
    split(outline)  # refuse what cannot be explained before fetching it
    published: Any = get_model_weights(name)
    model: Any
    if weights == RANDOM:
        chosen, model = published.DEFAULT, _create(name, options)
    elif weights is None or weights in published.__members__:
        chosen = published.DEFAULT if weights is None else published[weights]
        model = _download(name, chosen, options)
    else:
        path = Path(weights)
        chosen = next((w for w in published if Path(w.url).name == path.name), published.DEFAULT)
        model = _create_from_file(name, path, options, outline)
    names = tuple(chosen.meta["categories"])
    size = getattr(model, "image_size", None)
    return (
        model.eval(),
        _preprocess(chosen.transforms(), size),
        names if len(names) == model.num_classes else None,
    )


def _create(name: str, options: dict[str, Any]) -> Any:
    """Create a model with random weights."""
    try:
        return get_model(name, weights=None, **options)
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        raise ModelError(
            f"torchvision cannot create {name!r} with options {options}: {error}"
        ) from error


def _download(name: str, weights: Any, options: dict[str, Any]) -> nn.Module:
    """Create a model with published weights."""
    try:
        model: nn.Module = get_model(name, weights=weights, **options)
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"the published weights of {name!r} do not go with options {options}: {error}"
        ) from error
    except Exception as error:  # network errors and hash mismatches share no base
        raise not_fetched(
            f"the weights of {name!r}",
            getattr(error, "reason", error),
            "a local file: --weights model.pth on the command line, weights= in Python",
        ) from error
    return model


def _create_from_file(name: str, path: Path, options: dict[str, Any], outline: Any) -> nn.Module:
    """Create a model with the weights, the number of classes and the image size of a file."""
    state = read_weights(path)
    found: dict[str, Any] = {}
    head = state.get("heads.head.weight", state.get("head.weight"))
    if head is not None and head.ndim:
        found["num_classes"] = len(head)  # fine-tuned for other classes
    positions = state.get("encoder.pos_embedding")
    if positions is not None and positions.ndim == 3:  # or for another size
        found["image_size"] = math.isqrt(positions.shape[1] - 1) * outline.patch_size
    model: nn.Module = _create(name, found | options)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        problems = textwrap.shorten(str(error).partition(":")[2], 300, placeholder=" …")
        raise WeightsError(
            f"{path} does not fit {name!r}: {problems} Is it another variant?"
        ) from error
    return model


def _preprocess(transform: Any, image_size: int | None) -> Preprocess:
    """Return the preprocessing of a transform, to the image size of the model if that is fixed."""
    if (
        type(transform) is not ImageClassification
        or transform.interpolation.value not in ("nearest", "bilinear", "bicubic", "lanczos")
        or transform.resize_size[0] < transform.crop_size[0]
    ):
        raise ModelError(f"torchvision's preprocessing {transform} is not supported")
    crop, resize = transform.crop_size[0], transform.resize_size[0]
    share = crop / resize
    if math.floor(crop / share) < resize:  # division rounds, and this size must come out again
        share = math.nextafter(share, 0)
    return Preprocess(
        size=(image_size or crop,) * 2,
        crop_pct=share,
        interpolation=transform.interpolation.value,
        mean=tuple(transform.mean),
        std=tuple(transform.std),
    )


def architectures() -> Iterator[Architecture]:
    """Yield every model that classifies images or is named as a transformer."""
    classify = list_models(module=torchvision.models)
    for name in list_models():
        listed = is_named_transformer(get_model_builder(name).__module__)
        if listed or name in classify:
            yield Architecture(f"torchvision:{name}", functools.partial(build, name), listed=listed)


def build(name: str, **options: Any) -> nn.Module:
    """Build a transformer on the meta device; refuse others, since some of them need memory."""
    if not is_named_transformer(get_model_builder(name).__module__):
        raise unsupported(name)
    with torch.device("meta"), NoValues():
        model: nn.Module = _create(name, options)
    return model.eval()
