"""Load timm's models by name, with their preprocessing and class names, and list them."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from torch import Tensor, nn

from vit_reciprocam.errors import ModelError, WeightsError
from vit_reciprocam.libraries.common.loading import (
    RANDOM,
    Architecture,
    NoValues,
    is_named_transformer,
    no_such_model,
    not_fetched,
    quiet,
    read_weights,
)
from vit_reciprocam.libraries.timm.families import FAMILIES
from vit_reciprocam.libraries.timm.split import split
from vit_reciprocam.pictures.preprocess import Preprocess

__all__ = ["architectures", "load_timm"]


def load_timm(
    name: str, *, weights: str | os.PathLike[str] | None, options: dict[str, Any]
) -> tuple[nn.Module, Preprocess, tuple[str, ...] | None]:
    """Load a timm model, with options for `timm.create_model`, such as `img_size=384`."""
    if not timm.is_model(name):
        raise no_such_model(timm, name, timm.list_models())
    if weights == RANDOM:
        split(_outline(name, options))
        model: nn.Module = timm.create_model(name, **options)
    elif weights is not None:
        model = _create_from_file(name, Path(weights), options)
    else:
        model = _download(name, options)
    return model.eval(), _preprocess(model), _class_names(model)


def _outline(name: str, options: dict[str, Any]) -> nn.Module:
    """Create a model on the meta device, without weights or memory, to look at its structure."""
    try:
        with NoValues():
            model: nn.Module = timm.create_model(name, **options, device="meta")
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        raise ModelError(f"timm cannot create {name!r} with options {options}: {error}") from error
    return model.eval()


def _download(name: str, options: dict[str, Any]) -> nn.Module:
    """Create a model with its published weights; refuse one that cannot be explained."""
    split(_outline(name, options))  # refuse what cannot be explained before fetching it
    if not timm.is_model_pretrained(name):
        raise ModelError(f"timm has no published weights for {name!r}: pass a file with weights=")
    try:
        with quiet("huggingface_hub"):
            model: nn.Module = timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # hub clients raise errors of many unrelated kinds
        raise not_fetched(
            f"the weights of {name!r}",
            error,
            "a local file: --weights model.safetensors on the command line, weights= in Python",
        ) from error
    return model


def _create_from_file(name: str, path: Path, options: dict[str, Any]) -> nn.Module:
    """Create a model with the weights and the number of classes of a file."""
    state = read_weights(path)
    published: Any = _outline(name, options)
    classifier = published.pretrained_cfg.get("classifier")
    first = classifier if isinstance(classifier, str) or not classifier else classifier[0]
    head = state.get(f"{first}.weight")
    if "num_classes" not in options and head is not None and head.ndim:
        options = {**options, "num_classes": len(head)}  # fine-tuned for other classes
    split(_outline(name, options))
    model: nn.Module = timm.create_model(name, **options)
    have, want = set(state), set(model.state_dict())
    # the position embedding for another image size has another shape, and is resampled
    resampled = {"pos_embed"} if "img_size" in options else set()
    shapes = [
        f"{key} is {tuple(state[key].shape)}, not {tuple(value.shape)}"
        for key, value in model.state_dict().items()
        if key in have - resampled and state[key].shape != value.shape
    ]
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
        for what, keys in (
            ("missing", sorted(want - have)),
            ("unknown", sorted(have - want)),
            ("of another shape", shapes),
        )
        if keys
    ]
    if problems:
        raise WeightsError(
            f"{path} does not fit {name!r}: keys {'; '.join(problems)}. Is it another variant?"
        )
    if resampled:
        return _fit_to_size(name, state, {**options, "num_classes": model.num_classes})
    model.load_state_dict(state)
    return model


def _fit_to_size(name: str, state: dict[str, Tensor], options: dict[str, Any]) -> nn.Module:
    """Load weights into a model for another image size, with the position embedding resampled."""
    # timm resamples it if it is given the weights as if they were the published ones
    overlay = {"state_dict": state, "num_classes": options["num_classes"]}
    model: nn.Module = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, **options
    )
    config: Any = model.pretrained_cfg
    del config["state_dict"]  # the weights are in the model now
    return model


def _preprocess(model: nn.Module) -> Preprocess:
    """Return the preprocessing of timm's evaluation transform."""
    config = resolve_model_data_config(model)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if config["crop_mode"] not in ("center", "squash"):
        raise ModelError(f"preprocessing with crop mode {config['crop_mode']!r} is not supported")
    return Preprocess(
        size=tuple(size or config["input_size"][1:]),
        resize="squash" if config["crop_mode"] == "squash" else "shortest",
        crop_pct=config["crop_pct"],
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def _class_names(model: nn.Module) -> tuple[str, ...] | None:
    subset = infer_imagenet_subset(model)
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(index) for index in range(info.num_classes()))


def architectures() -> Iterator[Architecture]:
    """Yield every model, module by module."""
    for module in timm.list_modules():
        listed = _is_listed(module)
        for name in timm.list_models(module=module):
            yield Architecture(f"timm:{name}", functools.partial(_outline, name, {}), listed=listed)


def _is_listed(module: str) -> bool:
    """Return whether a module of timm is named as a transformer or uses a supported class."""
    supported = {*FAMILIES, "VisionTransformer", "Beit", "Cait", "Eva"}
    held = vars(importlib.import_module(f"timm.models.{module}"))
    return is_named_transformer(module) or not supported.isdisjoint(held)
