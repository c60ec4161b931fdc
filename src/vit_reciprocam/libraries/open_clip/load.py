"""Load open_clip's models by name, with prompts as classes, and list them."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import _build_vision_tower
from torch import nn

from vit_reciprocam.errors import InputError, ModelError, WeightsError
from vit_reciprocam.libraries.common.loading import (
    RANDOM,
    Architecture,
    NoValues,
    no_such_model,
    not_fetched,
    quiet,
    with_prompts,
)
from vit_reciprocam.libraries.common.zero_shot import ZeroShot, check_prompts
from vit_reciprocam.libraries.open_clip.split import split_tower, zero_shot
from vit_reciprocam.pictures.preprocess import Preprocess

__all__ = ["architectures", "build", "build_tower", "load_open_clip"]

_Weights = str | os.PathLike[str] | None


def load_open_clip(
    name: str,
    *,
    weights: _Weights = None,
    prompts: Sequence[str] | None = None,
    templates: Sequence[str] = ("{}",),
    options: dict[str, Any],
) -> tuple[ZeroShot, Preprocess, tuple[str, ...]]:
    """Load an open_clip model, with options for `create_model`, such as `force_image_size=336`.

    The name is "NAME/TAG". With local weights, the tag tells how they were trained: with which
    preprocessing and activation. A name with a prefix, "hf-hub:" or "local-dir:", has no tag,
    because its weights come from there.
    """
    if prompts is None:
        raise InputError(
            f"open_clip:{name} compares pictures with texts: give its classes with prompts=["
            "'a photo of a dog', …], on the command line --prompt, once per class"
        )
    check_prompts(prompts, templates)
    name, _, tag = (name, "", "") if ":" in name else name.partition("/")
    trained = _training(name, tag, weights)
    with _fetching(f"the configuration of {name!r}"):
        config = open_clip.get_model_config(name)
    with torch.device("meta"):
        split_tower(build_tower(config))  # refuse what cannot be explained before fetching it
    with _fetching(f"the tokenizer of {name!r}"):
        tokenizer = open_clip.get_tokenizer(name)
    with _fetching(f"the weights of {name!r}"):
        model = _create(name, tag, weights, trained, options)
    preprocess = _preprocess(model.visual.preprocess_cfg)
    return zero_shot(model.eval(), tokenizer, prompts, templates), preprocess, tuple(prompts)


def _training(name: str, tag: str, weights: _Weights) -> dict[str, Any]:
    """Return open_clip's record of how a tag's weights were trained, empty if there is none."""
    if name.startswith(("hf-hub:", "local-dir:")):
        if weights not in (None, RANDOM):
            raise ModelError(f"{name!r} has weights of its own: leave weights= out")
        return {}
    if name not in open_clip.list_models():
        raise no_such_model(open_clip, name, open_clip.list_models())
    trained: dict[str, Any] = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    if not trained and (tag or weights is None):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        what = f"has no weights {tag!r} for {name!r}" if tag else f"needs a tag for {name!r}"
        raise ModelError(f"open_clip {what}: it publishes {tags}. For a local file pass weights=")
    return trained


def _create(
    name: str, tag: str, weights: _Weights, trained: dict[str, Any], options: dict[str, Any]
) -> Any:
    """Create a model with the published weights, those of a file, or random ones."""
    settings = {"force_quick_gelu": bool(trained.get("quick_gelu")), **options}
    if weights is not None:
        keys = {"mean", "std", "interpolation", "resize_mode"} & trained.keys()
        settings["force_preprocess_cfg"] = {key: trained[key] for key in keys}
    source: dict[str, Any] = {"load_weights": False}
    if weights == RANDOM:
        settings.setdefault("pretrained_text", False)
    else:
        source = {"pretrained": str(weights or tag) or None, "require_pretrained": True}
        if weights is not None and not Path(weights).is_file():
            raise WeightsError(f"no such weights file: {weights}")
    try:
        return open_clip.create_model(name, **source, **settings)
    except (TypeError, AssertionError) as error:
        raise ModelError(
            f"open_clip cannot create {name!r} with options {options}: {error}"
        ) from error
    except Exception as error:  # hub clients, safetensors, pickle and zip errors share no base
        if weights in (None, RANDOM):
            raise
        reason = textwrap.shorten(str(error), 300, placeholder=" …")
        raise WeightsError(f"{weights} does not fit {name!r}: {reason}") from error


@contextlib.contextmanager
def _fetching(what: str) -> Iterator[None]:
    """Mute open_clip, and turn an error of others into one that says what was not fetched."""
    try:
        # open_clip logs through the root logger, and what it calls logs too, errors included
        with quiet("", "huggingface_hub", "timm", "transformers", level=logging.CRITICAL):
            yield
    except ModelError:
        raise
    except Exception as error:  # hub clients raise errors of many unrelated kinds
        raise not_fetched(
            what,
            error,
            "a local file (--weights model.safetensors on the command line, weights= in Python) of "
            "a model whose tokenizer comes with open_clip, such as ViT-B-32",
        ) from error


def _preprocess(config: dict[str, Any]) -> Preprocess:
    """Return the preprocessing of open_clip's evaluation transform."""
    height, width = _expand(config["size"], 2)
    resize, interpolation = config["resize_mode"], config["interpolation"]
    if resize not in ("shortest", "squash"):
        raise ModelError(f"preprocessing with resize mode {resize!r} is not supported")
    if interpolation != "bilinear" or (resize == "shortest" and height != width):
        interpolation = "bicubic"  # for oblong sizes open_clip does not pass its setting on
    return Preprocess(
        size=(height, width),
        resize=resize,
        crop_pct=1.0,
        interpolation=interpolation,
        mean=_expand(config["mean"], 3),
        std=_expand(config["std"], 3),
    )


def _expand(value: Any, count: int) -> tuple[Any, ...]:
    """Return the values of a list as they are, and a single value `count` times."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * count


def architectures() -> Iterator[Architecture]:
    """Yield every model."""
    for name in open_clip.list_models():
        yield Architecture(f"open_clip:{name}", functools.partial(build, name))


def build(name: str) -> nn.Module:
    """Return a model's image tower on the meta device, with random prompts as classes."""
    config: Any = open_clip.get_model_config(name)
    with torch.device("meta"), NoValues():
        return with_prompts(build_tower(config), config["embed_dim"])


def build_tower(config: Any, **changes: Any) -> Any:
    """Build the image tower of a configuration, with changes to its "vision_cfg"."""
    vision = {**config["vision_cfg"], "timm_model_pretrained": False, **changes}
    tower = _build_vision_tower(config["embed_dim"], vision)
    if getattr(tower, "output_tokens", False):
        tower.output_tokens = False
    return tower
