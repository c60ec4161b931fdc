"""A classifier: a model with its preprocessing, class names and ways to be run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vit_reciprocam.pictures.preprocess import Preprocess
from vit_reciprocam.results.explanation import Explanation

__all__ = ["Classifier", "Explainer"]

Explainer = Callable[..., Explanation]
"""Explains a preprocessed batch, float32 (B, 3, H, W), for targets as `ReciproCAM` takes them.

A third argument, `known`, is a dict that explainers of one model share for one batch: what one has
computed, the others need not. Those that call `predict` keep its "logits", (B, C), there.
"""


@dataclass(frozen=True)
class Classifier:
    """A model with what stands around it.

    Attributes:
        name: The spec that it was loaded by.
        model: The PyTorch module, or of an ONNX file its `OnnxExplainer`.
        preprocess: From a picture to the model's input.
        num_classes: C.
        class_names: One a class, or None where not known.
        make_explainer: `method`, a name of `METHODS`, and its settings -> a function that explains
            a preprocessed batch.
        predict: Logits (B, C) of a preprocessed batch.
        digest: SHA-256 of the weights, once called.
        device: Where it computes.
    """

    name: str
    model: Any = dataclasses.field(repr=False)
    preprocess: Preprocess
    num_classes: int
    class_names: tuple[str, ...] | None = dataclasses.field(repr=False)
    make_explainer: Callable[..., Explainer] = dataclasses.field(repr=False)
    predict: Callable[[np.ndarray], np.ndarray] = dataclasses.field(repr=False)
    digest: Callable[[], str] = dataclasses.field(repr=False)
    device: str = dataclasses.field(default="cpu", repr=False)
