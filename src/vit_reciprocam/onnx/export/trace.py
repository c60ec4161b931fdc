"""A PyTorch model and its explanation as one ONNX graph, by PyTorch's exporter.

The direct path needs a loop over the masks, which the exporter cannot trace through a user's
modules. So a few masks are traced as one chunk, with the masks and the loop's result as inputs;
then all nodes that follow from the masks become the body of an ONNX Loop.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from vit_reciprocam.core.closed_form import closed_form_rows
from vit_reciprocam.core.direct import under_masks
from vit_reciprocam.core.masks import Masking, mask_matrix
from vit_reciprocam.errors import ModelError
from vit_reciprocam.libraries.dispatch import split_model
from vit_reciprocam.onnx.export.attention import attend

__all__ = ["Explained", "clean", "insert_loop", "masks_at_once", "store_as_half", "trace"]

_MOST_AT_ONCE = 8  # masks in one step of the loop
_SMALL = 1024  # numbers that are not worth a conversion


class Explained(nn.Module):
    """Images -> logits (B, C), saliency (B, K, h, w) in [0, 1], scores and classes (B, K).

    On the direct path it takes `masks`, one chunk of them (M, T), and as `rows` what all chunks
    give (N, B, C), and has one output more: the logits of this chunk, (M, B, C).
    """

    def __init__(
        self, model: nn.Module, masking: Masking, *, direct: bool, top: int | None, raw: bool
    ) -> None:
        """Join a model with how it is to be explained; `top` classes of each image, None = all."""
        super().__init__()
        self.training = model.training
        self.model = model
        self.masking = masking
        self.direct = direct
        self.top = top
        self.raw = raw

    def forward(
        self,
        images: Tensor,
        targets: Tensor | None = None,
        masks: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """The outputs in the order above, as far as they are asked for."""
        split = split_model(self.model, pool=self.masking.layer == "pool")
        cut = split.cut(images)
        chunk: tuple[Tensor, ...] = ()
        if masks is not None and rows is not None:
            logits = cut.rest(cut.norm(cut.x), cut.x)
            chunk = (under_masks(cut, self.masking)(masks),)
        else:
            every = closed_form_rows(cut, split.prefix_tokens, self.masking, attend=attend)
            both = every(0, 1 + cut.grid[0] * cut.grid[1])
            logits, rows = both[0], both[1:]
        scores = rows.unflatten(0, cut.grid).softmax(dim=-1)  # (h, w, B, C)
        classes = targets if self.top is None else logits.topk(self.top, dim=-1).indices
        if classes is not None:
            scores = scores.gather(-1, classes.expand(*cut.grid, -1, -1))
        scores = scores.permute(2, 3, 0, 1)
        # Without this, ONNX Runtime moves the transposition behind the minima, which then are slow.
        scores = scores.flatten(2).unflatten(2, cut.grid)
        maps = () if self.raw else (_min_max(scores),)
        return (logits, *maps, scores, *(() if self.top is None else (classes,)), *chunk)


def _min_max(scores: Tensor) -> Tensor:
    """As `maps.min_max`."""
    low, high = scores.amin(dim=(2, 3), keepdim=True), scores.amax(dim=(2, 3), keepdim=True)
    flat = high - low <= 4 * torch.finfo(torch.float32).eps * high
    return (scores - low) / torch.where(flat, torch.inf, high - low)


def trace(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    outputs: list[str],
    dynamic: Mapping[str, Mapping[int, Any]],
    opset: int,
) -> ir.Model:
    """A module as an ONNX model.

    Args:
        module: What takes the inputs by name.
        inputs: Examples.
        outputs: Their names.
        dynamic: Input -> its dimensions that are free, each a `torch.export.Dim`.
        opset: Of ONNX's standard operators.

    Raises:
        ModelError: If the exporter cannot, with its reason.
    """
    try:
        with _quiet(), torch.no_grad():
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
                output_names=outputs,
                verbose=False,
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # it has many kinds, and none in common
        raise ModelError(f"PyTorch's exporter cannot write this model: {_reason(error)}") from error
    assert program is not None
    model: ir.Model = program.model
    if model.opset_imports.get("") != opset:
        raise ModelError(
            f"PyTorch's exporter wrote operators of opset {model.opset_imports.get('')} and cannot "
            f"convert this model to opset {opset}: leave out opset, or choose another"
        )
    return model


def _reason(error: BaseException) -> str:
    """The innermost message of the exporter's, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    if "Constraints violated" in str(error):
        return "its code runs for one batch or image size only, that which it was traced with"
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return " ".join(lines[:3])[:500] or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within, nothing that the exporter tells of its own work is seen."""
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


def clean(model: ir.Model) -> None:
    """Take out the exporter's notes, which hold paths of the machine it ran on.

    Raises:
        ModelError: If operators are left that are not ONNX's standard ones.
    """
    foreign = {f"{node.domain}::{node.op_type}" for node in model.graph.all_nodes() if node.domain}
    if foreign or model.functions:
        named = ", ".join(sorted(foreign) or map(str, model.functions))
        raise ModelError(f"the model needs operators that are not ONNX's standard ones: {named}")
    if model.opset_imports[""] < 18:  # the converter forgets to take it out
        for node in model.graph.all_nodes():
            if node.op_type == "Split":
                node.attributes.pop("num_outputs", None)
    for domain in [domain for domain in model.opset_imports if domain]:
        del model.opset_imports[domain]
    values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    model.doc_string = model.graph.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        values.extend(node.outputs)
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None


def masks_at_once(count: int) -> int:
    """How many of `count` masks one step of the loop takes: a divisor of it."""
    return next(size for size in range(min(_MOST_AT_ONCE, count), 0, -1) if count % size == 0)


def insert_loop(
    model: ir.Model, grid: tuple[int, int], masking: Masking, *, prefix_tokens: int, classes: int
) -> None:
    """Put a Loop over all masks where the graph takes one chunk of them and gives its logits."""
    graph = model.graph
    masks, rows = (next(i for i in graph.inputs if i.name == name) for name in ("masks", "rows"))
    chunk = graph.outputs[-1]
    follows, body = {masks}, []
    for node in graph:
        if follows.intersection(value for value in node.inputs if value is not None):
            follows.update(node.outputs)
            body.append(node)
    graph.inputs.remove(masks)
    graph.inputs.remove(rows)
    graph.outputs.pop()
    graph.remove(body)

    count = grid[0] * grid[1]
    every = mask_matrix(grid, masking, prefix_tokens=prefix_tokens).astype(np.float32)
    every = every.reshape(-1, masks_at_once(count), every.shape[1])
    number = ir.Value(
        name="chunk_number", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64)
    )
    go_on = ir.Value(name="go_on", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
    take = ir.node("Gather", [_constant(graph, "all_masks", every), number], {"axis": 0})
    keep = ir.node("Identity", [go_on])
    take.outputs[0].name, keep.outputs[0].name = "masks_of_chunk", "still_go_on"
    keep.outputs[0].shape, keep.outputs[0].type = go_on.shape, go_on.type
    ir.convenience.replace_all_uses_with(masks, take.outputs[0])
    inside = ir.Graph(
        [number, go_on], [keep.outputs[0], chunk], nodes=[take, keep, *body], name="under_masks"
    )
    steps = _constant(graph, "chunks", np.array(len(every)))
    start = _constant(graph, "from_the_start", np.array(True))
    loop = ir.node("Loop", [steps, start], {"body": inside}, name="under_all_masks")
    shape = _constant(graph, "rows_shape", np.array([count, -1, classes]))
    flat = ir.node("Reshape", [loop.outputs[0], shape], name="rows")
    loop.outputs[0].name, flat.outputs[0].name = "logits_of_chunks", "logits_of_masks"
    ir.convenience.replace_all_uses_with(rows, flat.outputs[0])
    graph.extend([loop, flat])
    graph.sort()


def _constant(graph: ir.Graph, name: str, value: np.ndarray) -> ir.Value:
    tensor = ir.tensor(value, name=name)
    made = ir.Value(
        name=name,
        shape=ir.Shape(value.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(made)
    return made


def store_as_half(model: ir.Model) -> None:
    """Store float32 constants as float16 where that loses nothing; a Cast widens them."""
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        held = value.const_value
        if held is None or held.dtype != ir.DataType.FLOAT or held.size < _SMALL:
            continue
        wide = held.numpy()
        with np.errstate(over="ignore"):
            narrow = wide.astype(np.float16)
        if not np.array_equal(narrow.astype(np.float32), wide):
            continue
        cast = ir.Node(
            "",
            "Cast",
            [_constant(graph, f"{name}_half", narrow)],
            {"to": ir.AttrInt64("to", ir.DataType.FLOAT)},
            name=f"{name}_widened",
        )
        cast.outputs[0].name = f"{name}_float"
        cast.outputs[0].type, cast.outputs[0].shape = value.type, value.shape
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        del graph.initializers[name]
        graph.append(cast)
    graph.sort()
