"""A classifier: a model with its preprocessing, class names and a backend that runs it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vit_reciprocam.core.batch import Batch
from vit_reciprocam.pictures.preprocess import Preprocess
from vit_reciprocam.results.explanation import Explanation

__all__ = ["Backend", "Classifier", "Explainer"]


class Explainer(Protocol):
    """Explains preprocessed images by one method with fixed settings."""

    def __call__(self, images: np.ndarray | Batch, targets: Any = None) -> Explanation:
        """Explain images (B, 3, H, W) float32, or a `Batch`; targets are those of `ReciproCAM`."""


class Backend(Protocol):
    """Runs a model in PyTorch or in a runtime of ONNX files: NumPy in, NumPy out."""

    @property
    def model(self) -> Any:
        """The PyTorch module, or the `OnnxExplainer` of an ONNX file."""

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""

    @property
    def device(self) -> str:
        """Device that computes."""

    def batch(self, images: np.ndarray) -> Batch:
        """Return preprocessed images (B, 3, H, W) float32 for explainers to share."""

    def predict(self, images: np.ndarray | Batch) -> np.ndarray:
        """Return the logits (B, C) float32 of preprocessed images."""

    def make_explainer(
        self, *, method: str = "reciprocam", check: bool = True, **settings: Any
    ) -> Explainer:
        """Return a method of `METHODS` with its settings.

        A model that cannot be explained is refused here, or by the first call if `check` is false.
        """

    def digest(self) -> str:
        """Return the SHA-256 of the weights."""


@dataclass(frozen=True)
class Classifier:
    """A model with everything that is needed to explain a picture.

    Attributes:
        name: Spec by which the model was loaded.
        backend: Backend that runs the model.
        preprocess: Preprocessing that turns a picture into the model's input.
        class_names: Names of the classes; None if not known.
    """

    name: str
    backend: Backend = dataclasses.field(repr=False)
    preprocess: Preprocess
    class_names: tuple[str, ...] | None = dataclasses.field(repr=False)

    @property
    def model(self) -> Any:
        """The PyTorch module, or the `OnnxExplainer` of an ONNX file."""
        return self.backend.model

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return self.backend.num_classes

    @property
    def device(self) -> str:
        """Device that computes."""
        return self.backend.device
