"""A batch of images, and what the methods of one model share of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Batch"]


@dataclass(eq=False)
class Batch:
    """Preprocessed images, with what has been computed of them so far.

    Explainers of one model take a batch instead of images; what one of them has computed, the
    others need not.

    Attributes:
        images: (B, ch, H, W): a tensor on the model's device, or an array for an ONNX file.
        logits: (B, C) float32 of the unmasked images, once a method has asked for them.
        cuts: The `Cut` of these images for each model and function that splits it.
    """

    images: Any
    logits: np.ndarray | None = None
    cuts: dict[Any, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return B, the number of images."""
        return len(self.images)
