"""Explanations from an exported file through ONNX Runtime: NumPy in, NumPy out, no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.explanation import Explanation, softmax
from vit_reciprocam.masks import Masking
from vit_reciprocam.onnx.metadata import Metadata
from vit_reciprocam.targets import resolve_targets

__all__ = ["OnnxExplainer", "open_session"]


def open_session(
    path: str | os.PathLike[str], *, threads: int | None = None
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU.

    Args:
        path: An ONNX file.
        threads: Inside an operator; None leaves it to ONNX Runtime.

    Raises:
        ModelError: If the file is missing or is not a valid ONNX file.
    """
    if not Path(path).is_file():
        raise ModelError(f"no such model file: {path}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions share no public base
        raise ModelError(f"{path} cannot be loaded by ONNX Runtime: {error}") from error


class OnnxExplainer:
    """Explains with an exported file; the maps' settings lie in its graph."""

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None = None) -> None:
        """Open a file that this package exported.

        Raises:
            ModelError: If it cannot be loaded or holds no explanation.
        """
        self.session = open_session(path, threads=threads)
        properties = self.session.get_modelmeta().custom_metadata_map
        self.metadata = Metadata.from_properties(properties, file=str(path))

    def check_settings(self, masking: Masking, score: str) -> None:
        """Refuse settings other than those in the graph.

        Raises:
            InputError: If one differs.
        """
        have = self.metadata.masking
        if masking != have or score != "probability":
            raise InputError(
                f"the maps of model {self.metadata.name!r} were fixed when it was exported: "
                f"kernel={have.kernel!r}, class_token={have.class_token}, layer={have.layer!r}, "
                "score='probability'. For other settings explain the PyTorch model, for example "
                "--model timm:NAME"
            )

    def __call__(self, images: np.ndarray, targets: Any = None) -> Explanation:
        """Explain a batch: float32 (B, 3, H, W), preprocessed; targets as in `ReciproCAM`.

        Raises:
            InputError: If the images or targets do not fit the model.
        """
        size = self.metadata.preprocess.size
        if images.ndim != 4 or images.shape[1:] != (3, *size) or not len(images):
            raise InputError(f"images must be (B, 3, {size[0]}, {size[1]}), got {images.shape}")
        if not np.isfinite(images).all():
            raise InputError("images hold NaN or infinity")
        logits, scores = self.session.run(
            ["logits", "scores"], {"images": images.astype(np.float32)}
        )
        chosen = resolve_targets(targets, logits)
        return Explanation(
            scores=np.take_along_axis(scores, chosen[:, :, None, None], axis=1),
            logits=logits,
            probs=softmax(logits),
            targets=chosen,
            path="closed-form",
            settings={
                "method": "reciprocam",
                "model": self.metadata.name,
                "kernel": self.metadata.masking.kernel,
                "class_token": self.metadata.masking.class_token,
                "layer": self.metadata.masking.layer,
                "score": "probability",
            },
        )
