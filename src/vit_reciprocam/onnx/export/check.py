"""Compare what ONNX Runtime computes from an exported file with PyTorch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vit_reciprocam.core.maps import min_max
from vit_reciprocam.errors import ModelError
from vit_reciprocam.onnx.contract import Metadata
from vit_reciprocam.onnx.run.sessions import open_onnxruntime
from vit_reciprocam.reciprocam import ReciproCAM

__all__ = ["compare"]

_TOLERANCE = 1e-4


def compare(file: Path, model: nn.Module, metadata: Metadata, shape: tuple[int, ...]) -> float:
    """Run a file and the model it was exported from on random images (B, 3, H, W) of a shape.

    The result is the largest difference of an output, relative to its largest value. If it is more
    than 1e-4, or the file cannot be run, the file is refused.
    """
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = ReciproCAM(model, **dataclasses.asdict(metadata.masking))(images, "all")
    classes = expected.logits.shape[1]
    feeds: dict[str, np.ndarray] = {"images": images.numpy()}
    if metadata.targets == "input":
        feeds["targets"] = np.tile(np.array([[classes - 1, 0, 0]]), (shape[0], 1))
    try:
        session: Any = open_onnxruntime(file, threads=torch.get_num_threads())
        names = [output.name for output in session.get_outputs()]
        got = dict(zip(names, session.run(None, feeds), strict=True))
    except Exception as error:  # ONNX Runtime's own exceptions share no public base
        raise ModelError(f"ONNX Runtime cannot run the exported graph: {error}") from error
    chosen = got.get("classes", feeds.get("targets"))
    scores = expected.scores
    if chosen is not None:
        if chosen.min() < 0 or chosen.max() >= classes:
            raise ModelError("the exported file names classes that do not exist")
        scores = np.take_along_axis(scores, chosen[:, :, None, None], axis=1)
    wanted = {"logits": expected.logits, "scores": scores}
    if "saliency" in got:
        # The maps have to be those of the file's own scores, not of PyTorch's, because scaling
        # nearly flat scores to [0, 1] magnifies their rounding.
        wanted["saliency"] = min_max(got["scores"])[0]
    if "classes" in got:
        ranked = np.sort(got["logits"], axis=1)[:, ::-1][:, : got["classes"].shape[1]]
        named = np.take_along_axis(got["logits"], got["classes"], axis=1)
        if not np.array_equal(named, ranked):
            raise ModelError("the exported file's classes are not those of its largest logits")
    worst = 0.0
    for name, values in wanted.items():
        if got[name].shape != values.shape:
            raise ModelError(
                f"the exported file gives {name} {got[name].shape}, PyTorch {values.shape}"
            )
        largest = float(np.abs(values).max()) or 1.0
        difference = float(np.abs(got[name] - values).max()) / largest
        if not difference <= _TOLERANCE:
            raise ModelError(
                f"the exported file's {name} differ from PyTorch's by {difference:.1e} of the "
                f"largest, more than {_TOLERANCE:.0e}, on random images"
            )
        worst = max(worst, difference)
    return worst
