"""A PyTorch classifier with the same face as an explained ONNX file: NumPy in, NumPy out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vit_reciprocam.core.targets import resolve_targets
from vit_reciprocam.errors import InputError
from vit_reciprocam.libraries.common.by_target import logits_of
from vit_reciprocam.methods import METHODS, check_settings
from vit_reciprocam.reciprocam import ReciproCAM
from vit_reciprocam.results.explanation import Explanation, softmax

__all__ = ["TorchModel"]

Known = dict[Any, Any]


class TorchModel:
    """Predicts and explains preprocessed batches, float32 (B, 3, H, W), with any method.

    Attributes:
        name: What it is called.
        model: The module.
        num_classes: C.
        device: Where it computes.
    """

    def __init__(self, name: str, model: nn.Module, *, device: str) -> None:
        """Move a classifier to a device.

        Raises:
            InputError: If it cannot go there.
        """
        try:
            self.model: Any = model.to(device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise InputError(f"the model cannot go to device {device!r}: {reason}") from error
        self.name = name
        classes = "num_labels" if hasattr(model, "num_labels") else "num_classes"
        self.num_classes: int = getattr(self.model, classes)
        self.device = str(next(model.parameters()).device)

    @torch.no_grad()
    def predict(self, images: np.ndarray) -> np.ndarray:
        """Logits (B, C) float32 of a preprocessed batch."""
        logits: np.ndarray = logits_of(self.model(self._tensor(images))).float().cpu().numpy()
        return logits

    def digest(self) -> str:
        """SHA-256 of the weights."""
        summary = hashlib.sha256()
        for key, value in self.model.state_dict().items():
            summary.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            flat = value.cpu().contiguous().flatten()
            summary.update(flat.view(torch.uint8).numpy().tobytes())
        return summary.hexdigest()

    def make_explainer(
        self, *, method: str = "reciprocam", **settings: Any
    ) -> Callable[..., Explanation]:
        """A method of `METHODS` with its settings, as an `Explainer`.

        Raises:
            InputError: If there is no such method or setting.
            ModelError: If ReciproCAM does not support the model.
        """
        check_settings(method, settings)
        if method == "reciprocam":
            return self._reciprocam(ReciproCAM(self.model, **settings))

        def explain(images: np.ndarray, targets: Any, known: Known | None = None) -> Explanation:
            known = {} if known is None else known
            if "logits" not in known:
                known["logits"] = self.predict(images)
            logits = known["logits"]
            chosen = resolve_targets(targets, logits)
            maps = METHODS[method](self.model, self._tensor(images), chosen, **settings)
            return Explanation(
                scores=maps.cpu().numpy(),
                logits=logits,
                probs=softmax(logits),
                targets=chosen,
                path="",
                settings={"method": method, "model": self.name, **settings},
            )

        return explain

    def _reciprocam(self, explainer: ReciproCAM) -> Callable[..., Explanation]:
        def explain(images: np.ndarray, targets: Any, known: Known | None = None) -> Explanation:
            known = {} if known is None else known
            batch = self._tensor(images)
            if explainer.place not in known:
                known[explainer.place] = explainer.cut(batch)
            return explainer(batch, targets, cut=known[explainer.place])

        return explain

    def _tensor(self, images: np.ndarray) -> Tensor:
        return torch.from_numpy(images).to(next(self.model.parameters()))
