"""PyTorch as a `Backend`, with every method: NumPy in, NumPy out."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np
import torch
from torch import nn

from vit_reciprocam.classifier.classifier import Explainer
from vit_reciprocam.core.batch import Batch
from vit_reciprocam.core.scores import to_numpy
from vit_reciprocam.core.split import logits_of
from vit_reciprocam.core.targets import resolve_targets
from vit_reciprocam.errors import InputError, first_line
from vit_reciprocam.methods import METHODS, PRESETS, SIGNED, baselines, check_settings
from vit_reciprocam.reciprocam import ReciproCAM
from vit_reciprocam.results.explanation import Explanation, softmax

__all__ = ["TorchBackend"]


class TorchBackend:
    """Predicts and explains preprocessed images with a PyTorch classifier in evaluation mode."""

    def __init__(self, name: str, model: nn.Module, *, device: str, size: tuple[int, int]) -> None:
        """Move a classifier to a device, and refuse a device that it cannot go to.

        A model that does not say how many classes it has is run on an empty picture of that size.
        """
        try:
            self.model: Any = model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(
                f"the model cannot go to device {device!r}: {first_line(error)}"
            ) from error
        self.name = name
        self._like = next(model.parameters())
        self.device = str(self._like.device)
        said = getattr(model, "num_labels", getattr(model, "num_classes", None))
        self.num_classes: int = said or self.predict(np.zeros((1, 3, *size), np.float32)).shape[1]

    def batch(self, images: np.ndarray) -> Batch:
        """Return preprocessed images (B, 3, H, W) on the device, for explainers to share."""
        return Batch(torch.from_numpy(images).to(self._like))

    @torch.no_grad()
    def predict(self, images: np.ndarray | Batch) -> np.ndarray:
        """Return the logits (B, C) float32 of preprocessed images."""
        batch = images if isinstance(images, Batch) else self.batch(images)
        if batch.logits is None:
            batch.logits = logits_of(self.model(batch.images)).float().cpu().numpy()
        return batch.logits

    def digest(self) -> str:
        """Return the SHA-256 of the weights."""
        summary = hashlib.sha256()
        for key, value in self.model.state_dict().items():
            summary.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            flat = value.cpu().contiguous().flatten()
            summary.update(flat.view(torch.uint8).numpy().tobytes())
        return summary.hexdigest()

    def make_explainer(
        self, *, method: str = "reciprocam", check: bool = True, **settings: Any
    ) -> Explainer:
        """Return a method of `METHODS` with its settings, as `Backend` describes it."""
        check_settings(method, settings)
        ours = method == "reciprocam" or method in PRESETS
        if ours:
            chosen = {**PRESETS.get(method, {}), **settings}
            reciprocam = ReciproCAM(self.model, check=check, **chosen)

        def explain(images: np.ndarray | Batch, targets: Any = None) -> Explanation:
            batch = images if isinstance(images, Batch) else self.batch(images)
            if ours:
                explanation = reciprocam(batch, targets)
                named = {**explanation.settings, "method": method}
                return dataclasses.replace(explanation, settings=named)
            logits = self.predict(batch)
            chosen = resolve_targets(targets, logits)
            signed = None
            if method in SIGNED:
                signed_values = getattr(baselines, method)
                scores = signed = to_numpy(
                    signed_values(self.model, batch.images, chosen, **settings)
                )
            else:
                scores = to_numpy(METHODS[method](self.model, batch.images, chosen, **settings))
            return Explanation(
                scores=scores,
                evidence=signed,
                scores_are_maps=True,
                logits=logits,
                probs=softmax(logits),
                targets=chosen,
                path="",
                settings={"method": method, "model": self.name, **settings},
            )

        return explain
