"""Join a PyTorch model and its explanation into one module, and trace it into an ONNX graph."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vit_reciprocam.core.closed_form import closed_form_rows
from vit_reciprocam.core.direct import under_masks
from vit_reciprocam.core.masks import Masking
from vit_reciprocam.core.scores import fuse_evidence, scale_evidence
from vit_reciprocam.errors import ModelError
from vit_reciprocam.libraries.dispatch import split_model
from vit_reciprocam.onnx.export.attention import CONVOLUTION

__all__ = ["ModelWithMaps", "trace"]


class ModelWithMaps(nn.Module):
    """A model that gives logits (B, C), saliency and scores (B, K, h, w), and classes (B, K).

    The exporter cannot trace a loop over the masks through a user's modules. So on the direct path
    the module also takes `masks`, one chunk of them (M, T), and `rows`, the logits of all chunks
    (N, B, C), and has one more output: the logits of this chunk (M, B, C). Afterwards
    `edit.loop_over_masks` connects the two.
    """

    def __init__(
        self,
        model: nn.Module,
        maskings: Sequence[Masking],
        *,
        normalize: str,
        top: int | None,
        raw: bool,
    ) -> None:
        """Join a model and the settings of its explanation, which are those of `ReciproCAM`.

        `top` is the number of most probable classes to explain; None stands for all classes, or
        those in the input `targets`. If `raw`, saliency is left out.
        """
        super().__init__()
        self.training = model.training
        self.model = model
        self.maskings = maskings
        self.with_evidence = normalize == "evidence"
        self.depth = max(masking.depth for masking in maskings)
        self.top = top
        self.raw = raw

    def forward(
        self,
        images: Float[Tensor, "B 3 H W"],
        targets: Int[Tensor, "B K"] | None = None,
        masks: Float[Tensor, "M T"] | None = None,
        rows: Float[Tensor, "N B C"] | None = None,
    ) -> tuple[Tensor, ...]:
        """Return the outputs that were asked for, in the order in which the class names them."""
        layer = self.maskings[0].layer
        split = split_model(self.model, pool=layer == "pool", depth=self.depth)
        cut = split.cut(images)
        chunk: tuple[Tensor, ...] = ()
        if masks is not None and rows is not None:
            logits = cut.rest(cut.norm(cut.x), cut.x)
            chunk = (under_masks(cut, layer)(masks),)
        else:
            compute = closed_form_rows(
                cut,
                split.prefix_tokens,
                self.maskings,
                null=self.with_evidence,
                attend=CONVOLUTION,
            )
            size = self.with_evidence + cut.grid[0] * cut.grid[1]
            all_rows = compute(0, 1 + len(self.maskings) * size)
            logits, rows = all_rows[0], all_rows[1:]
        classes = targets if self.top is None else logits.topk(self.top, dim=-1).indices
        rows = rows.log_softmax(dim=-1) if self.with_evidence else rows.softmax(dim=-1)
        if classes is not None:
            rows = rows.gather(-1, classes.expand(rows.shape[0], -1, -1))
        scores = rows.permute(1, 2, 0)  # (B, K, rows)
        if self.with_evidence:
            scores = scores.unflatten(2, (len(self.maskings), size)).movedim(2, 0)
            scores = (scores[..., 1:] - scores[..., :1]).unflatten(3, cut.grid)
            scores = fuse_evidence(scores) if len(self.maskings) > 1 else scores[0]
        else:
            # In one step, ONNX Runtime moves the transposition behind the minima and slows them.
            scores = scores.flatten(2).unflatten(2, cut.grid)
        scale = scale_evidence if self.with_evidence else _scale
        maps = () if self.raw else (scale(scores),)
        return (logits, *maps, scores, *(() if self.top is None else (classes,)), *chunk)


def _scale(scores: Float[Tensor, "B K h w"]) -> Float[Tensor, "B K h w"]:
    """Scale each map to [0, 1], as `core.maps.min_max` does in NumPy."""
    low, high = scores.amin(dim=(2, 3), keepdim=True), scores.amax(dim=(2, 3), keepdim=True)
    flat = high - low <= 4 * torch.finfo(torch.float32).eps * high
    return (scores - low) / torch.where(flat, torch.inf, high - low)


def trace(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping[int, Any]],
    opset: int,
) -> ir.Model:
    """Return a module as an ONNX model, or refuse it with the exporter's reason.

    There is an example of each of its `inputs`. The free dimensions of an input are `dynamic`, each
    as a `torch.export.Dim` or a multiple.
    """
    try:
        with _silence_exporter(), torch.no_grad():
            captured = torch.export.export(
                module,
                (),
                dict(inputs),
                dynamic_shapes={name: dict(dynamic.get(name, {})) for name in inputs},
                strict=False,
            )
            program = torch.onnx.export(
                captured,
                dynamo=True,
                opset_version=opset,
                input_names=list(inputs),
                output_names=list(outputs),
                verbose=False,
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the exporter raises many kinds, which share no base
        raise ModelError(
            f"PyTorch's exporter cannot write this model: {_root_cause(error)}"
        ) from error
    assert program is not None
    model: ir.Model = program.model
    if model.opset_imports.get("") != opset:
        raise ModelError(
            f"PyTorch's exporter wrote operators of opset {model.opset_imports.get('')} and cannot "
            f"convert this model to opset {opset}: leave out opset, or choose another"
        )
    return model


def _root_cause(error: BaseException) -> str:
    """Return the message of an error's root cause, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    if "Constraints violated" in str(error):
        return "its code runs for one batch or image size only, the one that it was traced with"
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return " ".join(lines[:3])[:500] or type(error).__name__


@contextlib.contextmanager
def _silence_exporter() -> Iterator[None]:
    """Hide the warnings and log messages in which the exporter reports on its own work."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx", "torch")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
