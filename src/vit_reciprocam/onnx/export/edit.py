"""Edit and save a graph of PyTorch's exporter: remove notes, add a loop, narrow weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

import onnx
from vit_reciprocam.core.masks import Masking, mask_matrix
from vit_reciprocam.errors import ModelError

__all__ = ["chunk_size", "loop_over_masks", "save", "store_as_half", "strip_notes"]

_LARGEST_CHUNK = 8  # masks in one step of the loop
_SMALL = 1024  # smaller constants are not worth a conversion or a place in a file of weights


def strip_notes(model: ir.Model) -> None:
    """Remove the exporter's notes, which hold paths of its machine; refuse custom operators."""
    custom = {f"{node.domain}::{node.op_type}" for node in model.graph.all_nodes() if node.domain}
    if custom or model.functions:
        named = ", ".join(sorted(custom) or map(str, model.functions))
        raise ModelError(f"the model needs operators that are not ONNX's standard ones: {named}")
    if model.opset_imports[""] < 18:
        # Split has num_outputs since opset 18; the exporter's conversion to 17 does not remove it.
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


def chunk_size(masks: int) -> int:
    """Return how many masks one step of the loop runs: the largest divisor of `masks` up to 8."""
    # it has to divide their number, since an ONNX Loop only stacks results of one shape
    return next(size for size in range(min(_LARGEST_CHUNK, masks), 0, -1) if masks % size == 0)


def loop_over_masks(
    model: ir.Model, grid: tuple[int, int], masking: Masking, *, prefix_tokens: int, classes: int
) -> None:
    """Change the graph of a `ModelWithMaps`, in place, to hold its masks and run them by chunks.

    As traced by the exporter, the graph runs one chunk of masks and takes the result of all chunks
    from outside, so it has two inputs and one output that no user should see:

        images ──> nodes before the cut ──┐
        masks (one chunk) ────────────────┴─> nodes after the cut ──> chunk's logits
        rows (all chunks' logits) ──> softmax … ──> scores

    All nodes that depend on `masks` become the body of an ONNX Loop with one step per chunk. Each
    step picks its masks from a constant. The stacked results of all steps replace `rows`:

        images ──> nodes before the cut ──┐
        Loop: all_masks[chunk] ───────────┴─> nodes after the cut ──> rows ──> softmax … ──> scores
    """
    graph = model.graph
    masks, rows = (next(i for i in graph.inputs if i.name == name) for name in ("masks", "rows"))
    chunk_logits = graph.outputs[-1]
    per_chunk = _find_dependents(graph, masks)
    graph.inputs.remove(masks)
    graph.inputs.remove(rows)
    graph.outputs.pop()
    graph.remove(per_chunk)

    count = grid[0] * grid[1]
    all_masks = mask_matrix(grid, masking, prefix_tokens=prefix_tokens).astype(np.float32)
    all_masks = all_masks.reshape(-1, chunk_size(count), all_masks.shape[1])  # (chunks, M, T)
    body = _loop_body(_add_constant(graph, "all_masks", all_masks), masks, per_chunk, chunk_logits)
    steps = _add_constant(graph, "chunks", np.array(len(all_masks)))
    start = _add_constant(graph, "from_the_start", np.array(True))
    loop = ir.node("Loop", [steps, start], {"body": body}, name="under_all_masks")
    shape = _add_constant(graph, "rows_shape", np.array([count, -1, classes]))
    joined = ir.node("Reshape", [loop.outputs[0], shape], name="rows")  # (chunks M, B, C)
    loop.outputs[0].name, joined.outputs[0].name = "logits_of_chunks", "logits_of_masks"
    ir.convenience.replace_all_uses_with(rows, joined.outputs[0])
    graph.extend([loop, joined])
    graph.sort()


def _find_dependents(graph: ir.Graph, value: ir.Value) -> list[ir.Node]:
    """Return the nodes that depend on a value, in the order of the graph."""
    values, nodes = {value}, []
    for node in graph:
        if values.intersection(taken for taken in node.inputs if taken is not None):
            values.update(node.outputs)
            nodes.append(node)
    return nodes


def _loop_body(
    all_masks: ir.Value, masks: ir.Value, nodes: list[ir.Node], logits: ir.Value
) -> ir.Graph:
    """Return the graph that a Loop runs in each step, with `masks` picked from `all_masks`.

    ONNX prescribes its inputs, the number of the step and whether to go on, and its outputs,
    whether to go on and what the Loop stacks.
    """
    number = ir.Value(
        name="chunk_number", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64)
    )
    go_on = ir.Value(name="go_on", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
    pick = ir.node("Gather", [all_masks, number], {"axis": 0})
    keep = ir.node("Identity", [go_on])  # an input of a graph cannot also be its output
    pick.outputs[0].name, keep.outputs[0].name = "masks_of_chunk", "still_go_on"
    keep.outputs[0].shape, keep.outputs[0].type = go_on.shape, go_on.type
    ir.convenience.replace_all_uses_with(masks, pick.outputs[0])
    return ir.Graph(
        [number, go_on], [keep.outputs[0], logits], nodes=[pick, keep, *nodes], name="under_masks"
    )


def _add_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Add an initializer to a graph and return its value."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def store_as_half(model: ir.Model) -> None:
    """Store float32 constants as float16 if that loses nothing; a Cast widens them again."""
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        constant = value.const_value
        if constant is None or constant.dtype != ir.DataType.FLOAT or constant.size < _SMALL:
            continue
        wide = constant.numpy()
        with np.errstate(over="ignore"):
            narrow = wide.astype(np.float16)
        if not np.array_equal(narrow.astype(np.float32), wide):
            continue
        half = _add_constant(graph, f"{name}_half", narrow)
        cast = ir.node("Cast", [half], {"to": int(ir.DataType.FLOAT)}, name=f"{name}_widened")
        cast.outputs[0].name = f"{name}_float"
        cast.outputs[0].type, cast.outputs[0].shape = value.type, value.shape
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        del graph.initializers[name]
        graph.append(cast)
    graph.sort()


def save(model: ir.Model, file: Path, *, external_data: bool) -> None:
    """Write a graph, with its weights in a file beside it if wanted, and check what was written."""
    data = f"{file.name}.data" if external_data else None
    ir.save(model, file, external_data=data, size_threshold_bytes=_SMALL)
    try:
        onnx.checker.check_model(file, full_check=True)
    except Exception as error:  # the checker and its shape inference share no base
        raise ModelError(f"ONNX's checker refuses the exported graph: {error}") from error
