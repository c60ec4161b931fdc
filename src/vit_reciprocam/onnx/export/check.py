"""Compare what ONNX Runtime computes from an exported file with PyTorch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vit_reciprocam.core.maps import min_max, positive_part
from vit_reciprocam.core.masks import describe_maskings
from vit_reciprocam.errors import ModelError
from vit_reciprocam.onnx.contract import Metadata
from vit_reciprocam.onnx.run.sessions import open_onnxruntime
from vit_reciprocam.reciprocam import ReciproCAM

__all__ = ["compare"]

_TOLERANCE = 1e-4
_ROUNDING = 2e-5  # largest error of evidence in float32, in nats


def compare(file: Path, model: nn.Module, metadata: Metadata, shape: tuple[int, ...]) -> float:
    """Run a file and the model it was exported from on random images (B, 3, H, W) of a shape.

    The result is the largest difference of an output, relative to its largest value. If it is more
    than 1e-4, or the file cannot be run, the file is refused.
    """
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    settings = describe_maskings(metadata.maskings) | {"normalize": metadata.normalize}
    expected = ReciproCAM(model, **settings)(images, "all")
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
    with_evidence = expected.evidence is not None
    scores = expected.scores if expected.evidence is None else expected.evidence
    room = _room_for_rounding(model, metadata, images)
    if chosen is not None:
        if chosen.min() < 0 or chosen.max() >= classes:
            raise ModelError("the exported file names classes that do not exist")
        scores = np.take_along_axis(scores, chosen[:, :, None, None], axis=1)
        room = np.take_along_axis(
            np.broadcast_to(room, expected.scores.shape), chosen[:, :, None, None], axis=1
        )
    wanted = {"logits": expected.logits, "scores": scores}
    if "saliency" in got:
        # The maps have to be those of the file's own scores, not of PyTorch's, because scaling
        # nearly flat scores to [0, 1] magnifies their rounding.
        scale = positive_part if with_evidence else min_max
        wanted["saliency"] = scale(got["scores"])[0]
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
        apart = np.abs(got[name] - values)
        if name == "scores":
            apart = (apart - room).clip(0)
        difference = float(apart.max()) / largest
        if not difference <= _TOLERANCE:
            raise ModelError(
                f"the exported file's {name} differ from PyTorch's by {difference:.1e} of the "
                f"largest, more than {_TOLERANCE:.0e}, on random images"
            )
        worst = max(worst, difference)
    return worst


def _room_for_rounding(model: nn.Module, metadata: Metadata, images: torch.Tensor) -> np.ndarray:
    """Return by how much fused evidence may differ because of rounding, (B, K, h, w).

    The evidence e of each setting is divided by its largest value s. If both are wrong by δ, the
    quotient is wrong by up to δ (1 + |e| / s) / s, which is much where s hardly says anything.
    """
    room = np.zeros((1, 1, 1, 1))
    for masking in metadata.fuse:
        single = ReciproCAM(model, normalize="evidence", **dataclasses.asdict(masking))
        evidence = single(images, "all").ranking
        size, largest = np.abs(evidence), evidence.max(axis=(2, 3), keepdims=True)
        scale = np.where(largest > 0, largest, size.max(axis=(2, 3), keepdims=True))
        room = room + _ROUNDING * (1 + size / scale) / scale
    return room
