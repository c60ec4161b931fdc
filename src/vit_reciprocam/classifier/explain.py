"""Explain pictures: read them, prepare them, and pass them to a classifier's backend."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vit_reciprocam.classifier.classifier import Classifier, Explainer
from vit_reciprocam.core.targets import find_class, top_classes
from vit_reciprocam.errors import InputError
from vit_reciprocam.pictures.read import ImageSource, read_image
from vit_reciprocam.results.explanation import Explanation

__all__ = ["explain", "explain_with", "parse_targets"]

_TOP = re.compile(r"\s*top\s*(\d+)\s*", re.IGNORECASE)


def explain(
    images: ImageSource | Sequence[ImageSource],
    classifier: Classifier,
    *,
    top: int | None = None,
    targets: str | int | Sequence[str | int] | None = None,
    **settings: Any,
) -> Explanation:
    """Explain pictures; the result keeps them, to draw its maps on.

    The model sees, and the result shows, what preprocessing leaves of a picture, usually the centre
    crop.

    Args:
        images: Files, PIL images or uint8 arrays (H, W, 3): one, or several in one batch.
        classifier: Classifier that `load` returned.
        top: Number of each picture's most probable classes to explain; by default 1.
        targets: Classes to explain, instead of `top`: one by name or index, "top3" for the three
            most probable, a list of these, or "all". Classes that are named come first, and "top3"
            then means three others.
        settings: Settings of the method; the one called `method` is its name in `METHODS`, by
            default "reciprocam".

    Raises:
        ImageError: If a picture cannot be read.
        UnknownClassError: If there is no such class; the message offers the closest.
        InputError: If a setting does not fit.
    """
    if isinstance(settings.get("target"), (str, int)):
        raise InputError(f"classes are named by targets=: pass targets={settings['target']!r}")
    if not isinstance(classifier, Classifier):
        raise InputError(
            f"classifier must be what vit_reciprocam.load returns, such as load('demo'), got "
            f"{type(classifier).__name__}. A PyTorch model of your own goes to ReciproCAM(model)"
        )
    explainer = classifier.backend.make_explainer(check=False, **settings)
    return explain_with(explainer, images, classifier, top=top, targets=targets)


def explain_with(
    explainer: Explainer,
    images: ImageSource | Sequence[ImageSource],
    classifier: Classifier,
    *,
    top: int | None = None,
    targets: str | int | Sequence[str | int] | None = None,
) -> Explanation:
    """Explain pictures as `explain` does, with an explainer that the classifier's backend made.

    Other arguments and errors are those of `explain`.
    """
    many = isinstance(images, (list, tuple))
    sources: Sequence[ImageSource] = images if many else [images]  # type: ignore[assignment, list-item]
    if not sources:
        raise InputError("images is empty: pass at least one picture")
    pictures = [read_image(source) for source in sources]
    batch = np.stack([classifier.preprocess(picture) for picture in pictures])
    result = explainer(batch, parse_targets(classifier, top=top, targets=targets))
    return dataclasses.replace(
        result,
        settings={**result.settings, "model": classifier.name},
        class_names=classifier.class_names,
        pictures=tuple(classifier.preprocess.region(picture) for picture in pictures),
        sources=tuple(_source_name(source, number) for number, source in enumerate(sources)),
        preprocess=classifier.preprocess,
    )


def parse_targets(classifier: Classifier, *, top: int | None = None, targets: Any = None) -> Any:
    """Return the targets as an explainer takes them, from `top` or `targets` of `explain`."""
    if targets is None:
        return _named_and_top(classifier, [], 1 if top is None else top)
    if top is not None:
        raise InputError("pass top or targets, not both")
    if hasattr(targets, "tolist"):  # NumPy and torch
        targets = targets.tolist()
    wanted = list(targets) if isinstance(targets, (list, tuple)) else [targets]
    if not wanted:
        raise InputError("targets is empty: pass a class, several, or 'all'")
    if wanted == ["all"]:
        return "all"
    if "all" in wanted:
        raise InputError("target 'all' stands alone: it has every other class already")
    tops = [_TOP.fullmatch(target) if isinstance(target, str) else None for target in wanted]
    names = classifier.class_names or classifier.num_classes
    pairs = zip(wanted, tops, strict=True)
    found = (find_class(target, names) for target, top_n in pairs if not top_n)
    named = list(dict.fromkeys(found))  # each once, in their order
    counts = [int(top_n[1]) for top_n in tops if top_n]
    return _named_and_top(classifier, named, max(counts)) if counts else [named]


def _named_and_top(classifier: Classifier, named: list[int], top: int) -> Any:
    """Return a function of the logits that picks the named classes, then the `top` best others."""
    if not 1 <= top <= classifier.num_classes:
        raise InputError(
            f"top must be between 1 and the number of classes, {classifier.num_classes}; got {top}"
        )

    def choose(logits: np.ndarray) -> np.ndarray:
        ranked = top_classes(logits, classifier.num_classes)
        return np.array([named + [c for c in row if c not in named][:top] for row in ranked])

    return choose


def _source_name(source: ImageSource, number: int) -> str:
    """Return the file name of a picture, or one made from its number if it has none."""
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "") or f"image-{number}")
    return f"image-{number}" if isinstance(source, np.ndarray) else str(source)
