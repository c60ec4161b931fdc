"""A batch of images, with results that explainers of one model share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Batch"]


@dataclass(eq=False)
class Batch:
    """Preprocessed images, with what has been computed from them so far.

    Explainers of one model take a batch instead of images. What one of them has computed, the
    others find here and do not compute again.

    Attributes:
        images: Images (B, ch, H, W): a tensor on the model's device, or an array for an ONNX file.
        logits: Logits (B, C) float32 of the unmasked images; None until a method has asked for
            them.
        cuts: (model, function that splits it) -> `Cut` of these images.
    """

    images: Any
    logits: np.ndarray | None = None
    cuts: dict[Any, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return B, the number of images."""
        return len(self.images)
