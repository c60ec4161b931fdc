"""Load transformers' models from the hub or a folder, and list their classes."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
)

from vit_reciprocam.errors import InputError, ModelError, WeightsError
from vit_reciprocam.libraries.common.loading import (
    RANDOM,
    Architecture,
    NoValues,
    first_sentence,
    not_fetched,
    quiet,
    with_prompts,
)
from vit_reciprocam.libraries.common.zero_shot import check_prompts
from vit_reciprocam.libraries.transformers.families import FAMILIES, image_tower
from vit_reciprocam.libraries.transformers.split import check_class, split, split_tower, zero_shot
from vit_reciprocam.pictures.preprocess import Preprocess

__all__ = ["architectures", "build", "load_transformers"]

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def load_transformers(
    name: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    prompts: Sequence[str] | None = None,
    templates: Sequence[str] = ("{}",),
    options: dict[str, Any],
) -> tuple[nn.Module, Preprocess, tuple[str, ...] | None]:
    """Load a model by its name on the hub, or from a folder that `save_pretrained` wrote.

    The options are those of `from_pretrained`, such as `revision` or `attn_implementation`. Weights
    are loaded in float32 unless `dtype` says otherwise; random ones are in float32.
    """
    if weights not in (None, RANDOM):
        raise InputError("for local weights of a hub model give their folder: hf:FOLDER")
    if prompts is not None:
        check_prompts(prompts, templates)
    hub_options = {key: options[key] for key in _HUB_OPTIONS if key in options}
    config = _fetch(name, transformers.AutoConfig, options)
    kind = _model_class(name, config)
    _refuse_early(name, kind, config, prompts)
    preprocess = _preprocess(name, _fetch(name, transformers.AutoImageProcessor, hub_options))
    model = kind(config).eval() if weights == RANDOM else _fetch_model(name, kind, options)
    if prompts is None:
        return model, preprocess, _class_names(config)
    tokenizer = _fetch(name, transformers.AutoTokenizer, hub_options)
    return zero_shot(model, tokenizer, prompts, templates), preprocess, tuple(prompts)


def _fetch_model(name: str, kind: Any, options: dict[str, Any]) -> Any:
    """Return a model with its weights; refuse it if transformers would draw some at random."""
    loaded = _fetch(name, kind, {"dtype": torch.float32, **options, "output_loading_info": True})
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise WeightsError(
            f"{name} has no weights for {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}"
            f" of a {kind.__name__}, so its predictions would be random: was its head trained?"
        )
    return loaded[0].eval()


def _refuse_early(name: str, kind: Any, config: Any, prompts: Sequence[str] | None) -> None:
    """Refuse a model that cannot be explained, before its weights are fetched."""
    with_texts = hasattr(kind, "get_text_features")
    if with_texts and prompts is None:
        raise ModelError(
            f"{name} compares images with texts and has no classes of its own: pass prompts"
        )
    if not with_texts:
        check_class(kind)
        if prompts is not None:
            raise ModelError(
                f"{name} is a {kind.__name__}, which takes no prompts: they are for models that "
                "compare images with texts, such as CLIP"
            )
    with torch.device("meta"):
        outline = kind(config)
    (split_tower if with_texts else split)(outline)


def _fetch(name: str, kind: Any, options: dict[str, Any]) -> Any:
    """Call `kind.from_pretrained`, and turn its errors into one sentence that tells what to do."""
    what = kind.__name__.removeprefix("Auto")
    local = Path(name).is_dir()
    if not local and (Path(name).is_absolute() or name.startswith(".")):
        raise WeightsError(f"no such folder: {name}")
    try:
        with quiet("huggingface_hub", "transformers"):
            return kind.from_pretrained(name, **options)
    except Exception as error:  # hub clients and file formats raise errors of many unrelated kinds
        folder = "folder that save_pretrained of the model and of its processor wrote"
        if local:
            raise WeightsError(
                f"the {what} cannot be read from folder {name}: {first_sentence(error)}. Pass a "
                + folder
            ) from error
        raise not_fetched(f"the {what} of {name!r}", error, f"a local {folder}") from error


def _model_class(name: str, config: Any) -> Any:
    """Return the class of the saved model; any other class would give it a random head."""
    saved_as = (config.architectures or [""])[0]
    kind = getattr(transformers, saved_as, None)
    if kind is None:
        raise ModelError(
            f"{name} was saved as {saved_as or 'no class'}, which transformers "
            f"{transformers.__version__} does not have: pass a model of its own classes"
        )
    return kind


def _class_names(config: Any) -> tuple[str, ...] | None:
    """Return the class names of a configuration, None if they are transformers' placeholders."""
    names = tuple(str(config.id2label[index]) for index in range(config.num_labels))
    placeholders = tuple(f"LABEL_{index}" for index in range(config.num_labels))
    return None if names == placeholders else names


def _preprocess(name: str, processor: Any) -> Preprocess:
    """Return a processor as a `Preprocess`; refuse it if it does anything else.

    Processors that resize with torchvision round differently, by less than the eye sees.
    """
    size = dict(getattr(processor, "size", None) or {})
    cropped = getattr(processor, "do_center_crop", None)
    crop = dict(processor.crop_size) if cropped else size
    if set(size) == {"height", "width"}:
        resize, scaled = "squash", (size["height"], size["width"])
    elif set(size) == {"shortest_edge"} and cropped and crop["height"] == crop["width"]:
        resize, scaled = "shortest", (size["shortest_edge"],) * 2
    else:
        kept = crop if cropped else "nothing"
        raise _unsupported(name, processor, f"resizes to {size} and crops to {kept}")
    resample: Any = getattr(processor, "resample", None)
    interpolation = _INTERPOLATIONS.get(resample)
    if interpolation is None:
        raise _unsupported(name, processor, "resizes by another filter than Pillow's usual four")
    target = crop["height"], crop["width"]
    crop_pct = target[0] / scaled[0]
    # `Preprocess` divides the crop by this share and rounds down, which must give the side again.
    # Where floating-point error prevents that, half a pixel more is enough.
    if math.floor(target[0] / crop_pct) != scaled[0]:
        crop_pct = target[0] / (scaled[0] + 0.5)
    if crop_pct > 1 or tuple(math.floor(side / crop_pct) for side in target) != scaled:
        raise _unsupported(name, processor, f"resizes to {scaled} and crops to {target}")
    normalise = processor.do_normalize
    preprocess = Preprocess(
        size=target,
        resize=resize,
        crop_pct=crop_pct,
        interpolation=interpolation,
        mean=tuple(processor.image_mean) if normalise else (0.0, 0.0, 0.0),
        std=tuple(processor.image_std) if normalise else (1.0, 1.0, 1.0),
        half="down",
    )
    if not _agree(processor, preprocess):
        raise _unsupported(name, processor, "does more than resize, crop and normalise")
    return preprocess


def _agree(processor: Any, preprocess: Preprocess) -> bool:
    """Return whether both give the same values for a test picture, except for rounding."""
    down, right = np.mgrid[0:1:240j, 0:1:400j]
    colours = np.stack([255 * right, 255 * down, 127 * (right - down) + 127], axis=-1)
    picture = Image.fromarray(colours.astype(np.uint8))
    theirs = processor(images=picture, return_tensors="pt")["pixel_values"][0].numpy()
    ours = preprocess(picture)
    if theirs.shape != ours.shape:
        return False
    # in levels from 0 to 255: rounding makes a mean difference below 2, any other step a larger one
    levels = np.abs(theirs - ours) * 255 * np.array(preprocess.std)[:, None, None]
    return bool(levels.mean() < 2)


def _unsupported(name: str, processor: Any, what: str) -> ModelError:
    return ModelError(
        f"the preprocessing of {name}, a {type(processor).__name__}, is not supported: it {what}. "
        "Run the processor yourself and pass its pixel_values to ReciproCAM"
    )


_SETTINGS = {
    "BeitForImageClassification": "(use_mean_pooling=False)",
    "Data2VecVisionForImageClassification": "(use_mean_pooling=False)",
}
"""Class -> a setting that makes it another kind of model, which is listed too."""

_WITH_TEXTS = ("CLIPModel", "MetaClip2Model", "SiglipModel")
_TOKENS = {"bos_token_id": 0, "eos_token_id": 1}
"""SigLIP's default tokens are outside its default vocabulary, and transformers warns about that."""


def architectures() -> Iterator[Architecture]:
    """Yield the supported classes, then the others that classify images."""
    supported = []
    for name in FAMILIES:
        supported += [name, name + _SETTINGS[name]] if name in _SETTINGS else [name]
    entries = [[one] if isinstance(one, str) else one for one in CLASSIFIERS.values()]
    others = {name for names in entries for name in names} - {*supported, *_WITH_TEXTS}
    for name in [*supported, *_WITH_TEXTS, *sorted(others)]:
        yield Architecture(f"hf:{name}", functools.partial(_outline, name))


def _outline(name: str) -> nn.Module:
    with torch.device("meta"), NoValues():
        return build(name)


def build(name: str, **config: Any) -> nn.Module:
    """Build a model from a class's name, to which a setting may be added in brackets.

    If the model compares images with texts, build its image tower with random prompts as classes.
    """
    kind, _, setting = name.rstrip(")").partition("(")
    cls: Any = getattr(transformers, kind)
    if setting:
        config[setting.partition("=")[0]] = setting.endswith("True")
    if kind not in _WITH_TEXTS:
        check_class(cls)
    if "text_config" in cls.config_class.sub_configs:
        config.setdefault("text_config", _TOKENS)
    model: nn.Module = cls(cls.config_class(**config)).eval()
    if kind in _WITH_TEXTS:
        sizes: Any = model.config
        width = getattr(sizes, "projection_dim", sizes.vision_config.hidden_size)
        return with_prompts(image_tower(model), width)
    return model
