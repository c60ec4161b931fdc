"""A foreign ONNX graph read as a Vision Transformer: where F stands, the grid, what the head reads.

Exporters and optimizers write the same model in many ways. So the graph's structure is asked only
for what cannot vary, the last attention and the value that its queries, keys and values come from;
the rest is found by running parts of the graph and changing what goes in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from vit_reciprocam.errors import ModelError
from vit_reciprocam.onnx.foreign.attention import SelfAttention, read_attention
from vit_reciprocam.onnx.foreign.finding import Found, find_attention, find_normed
from vit_reciprocam.onnx.foreign.graph import Graph
from vit_reciprocam.onnx.foreign.tail import Tail, read_tail

__all__ = ["Reading", "find_images", "read"]


@dataclass(frozen=True)
class Reading:
    """What is needed of a graph to explain it.

    Attributes:
        images: The input that takes pictures, and the shape it was run with.
        logits: The output that holds the prediction.
        batch: How many pictures at a time, where the graph fixes that.
        classes: C.
        is_softmax: Whether that output holds probabilities already.
        normed: F.
        token_axes: F's token axis, or the two of its grid.
        grid: (h, w).
        prefix_tokens: P.
        attention: The last attention; None where it could not be taken apart.
        tail: None where the closed form does not hold.
        direct_because: Why it does not; empty where it does.
        values: Of one run with random images: all that stands or enters below F.
    """

    images: str
    logits: str
    batch: int | None
    classes: int
    is_softmax: bool
    normed: str
    token_axes: tuple[int, ...]
    grid: tuple[int, int]
    prefix_tokens: int
    attention: SelfAttention | None
    tail: Tail | None
    direct_because: str
    values: Mapping[str, np.ndarray]

    @property
    def tolerance(self) -> float:
        """How far float32, or float16, may be off, relative to the largest."""
        return 0.02 if self.values[self.normed].dtype == np.float16 else 1e-4


def read(
    graph: Graph,
    *,
    grid: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
    target_node: str | None = None,
) -> Reading:
    """Read a graph.

    Args:
        graph: A classifier's, images in, logits or probabilities out; `without_rounding`.
        grid: Patch grid (h, w), where it is not found.
        size: Height and width of the pictures, where the graph leaves them open.
        target_node: The value to mask, or the node that makes it; by default the LayerNorm's output
            before the last attention.

    Raises:
        ModelError: If it is none that can be explained; names the node where reading stopped.
    """
    images, logits = find_images(graph), _logits(graph)
    pixels = graph.varying(images.name)
    if logits not in pixels:
        raise ModelError(f"output {logits!r} does not depend on input {images.name!r}")
    found = _last_attention(graph, pixels, logits, required=target_node is None)
    if target_node is None and found is not None:
        normed = find_normed(graph, found, pixels)
    else:
        normed = _named(graph, target_node or "", pixels)
    wanted = [normed, logits]
    below = graph.between([normed], [logits])
    wanted += graph.entering(below)
    wanted += [name for number in below for name in graph.nodes[number].output if name]
    convolutions = [
        node.output[0]
        for node in (graph.nodes[number] for number in graph.above([normed]))
        if node.op_type in _CONVOLUTIONS and node.output[0] in pixels
    ]
    pictures, values = _first_run(graph, images, size, [*dict.fromkeys(wanted), *convolutions])
    batch = len(pictures)
    if values[logits].ndim != 2 or len(values[logits]) != batch:
        raise ModelError(
            f"output {logits!r} is {values[logits].shape}, not (batch, classes): no classifier?"
        )
    shapes = [values[name].shape for name in convolutions]
    if not np.issubdtype(values[normed].dtype, np.floating):
        raise ModelError(
            f"{graph.describe(normed)} gives integers, which a mask would not scale: insert into "
            "the file before it is quantised, or quantise in the QDQ format"
        )
    token_axes, grid, prefix = _grid(values[normed].shape, batch, shapes, grid)
    early = _before_attention(graph, pixels, {images.name: pictures}, values[normed])
    _check_order(graph, images.name, pictures, early or normed, token_axes, grid, prefix)
    attention, tail, because = None, None, ""
    try:
        if found is None or found.number not in below:
            raise ModelError("no attention was found below the value to mask")
        attention = read_attention(graph, found, values, batch, pixels)
        tail = read_tail(graph, attention, logits, values, prefix, grid, token_axes, pixels)
    except ModelError as error:
        because = str(error)
    last = graph.nodes[graph.maker[logits]]
    return Reading(
        images=images.name,
        logits=logits,
        batch=_dims(images)[0],
        classes=values[logits].shape[1],
        is_softmax=last.op_type == "Softmax",
        normed=normed,
        token_axes=token_axes,
        grid=grid,
        prefix_tokens=prefix,
        attention=attention,
        tail=tail,
        direct_because=because,
        values={images.name: pictures, **values},
    )


def _dims(value: onnx.ValueInfoProto) -> list[int | None]:
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]


_CONVOLUTIONS = frozenset({"Conv", "FusedConv", "QLinearConv", "ConvInteger"})
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)


def find_images(graph: Graph) -> onnx.ValueInfoProto:
    """The input that takes pictures.

    Raises:
        ModelError: If there is none, or the model takes more than that.
    """
    found = [
        value
        for value in graph.inputs
        if value.type.tensor_type.elem_type in _FLOATS and len(_dims(value)) == 4
    ]
    if len(found) != 1 or _dims(found[0])[1] not in (3, None):
        have = ", ".join(f"{value.name} {_dims(value)}" for value in graph.inputs) or "none"
        raise ModelError(
            f"no single input of images (batch, 3, height, width) was found; the inputs are: {have}"
        )
    if len(graph.inputs) > 1:
        others = [value.name for value in graph.inputs if value.name != found[0].name]
        raise ModelError(f"the model takes more than images: {', '.join(others)}")
    return found[0]


def _logits(graph: Graph) -> str:
    outputs = list(graph.model.graph.output)
    for value in outputs:
        if value.name in ("saliency", "scores"):
            raise ModelError(f"the model has an output {value.name!r} already: it is explained")
    named = [value for value in outputs if value.name in ("logits", "logits_per_image")]
    flat = named or [value for value in outputs if len(_dims(value)) == 2]
    if len(flat) != 1 and len(outputs) != 1:
        have = ", ".join(f"{value.name} {_dims(value)}" for value in outputs)
        raise ModelError(f"which output holds the classes' logits is not clear; there are: {have}")
    return str((flat or outputs)[0].name)


def _last_attention(graph: Graph, pixels: set[str], logits: str, *, required: bool) -> Found | None:
    used = set(graph.above([logits]))
    for found in find_attention(graph, pixels):
        if found.number in used:
            return found
    if required:
        kinds = {graph.nodes[number].op_type for number in used}
        seems = "; it looks like a CNN" if "Conv" in kinds and "Softmax" not in kinds else ""
        raise ModelError(
            f"no self-attention was found in the graph{seems}; target_node= (--target-node) names "
            "the value to mask in any graph"
        )
    return None


def _named(graph: Graph, target: str, pixels: set[str]) -> str:
    made: list[str] = [node.output[0] for node in graph.nodes if node.name == target]
    for name in (target, *made):
        if name in graph.maker and name in pixels:
            return name
    raise ModelError(f"the graph has no node or value {target!r} that depends on the images")


def _first_run(
    graph: Graph, images: onnx.ValueInfoProto, size: tuple[int, int] | None, wanted: Sequence[str]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Random images, two where the batch is open, and the values that they give."""
    batch, _, height, width = _dims(images)
    if (height is None or width is None) and size is None:
        raise ModelError(
            "the graph leaves the pictures' size open: size= (--size) says for which to explain"
        )
    if size is not None:
        if (height or size[0], width or size[1]) != size:
            raise ModelError(f"the graph takes pictures of {height}x{width}, not of {size}")
        height, width = size
    kind = onnx.helper.tensor_dtype_to_np_dtype(images.type.tensor_type.elem_type)
    draw = np.random.default_rng(0)
    shape = (batch or 2, 3, height or 0, width or 0)
    pictures = draw.standard_normal(shape).astype(kind)
    try:
        return pictures, graph.run({images.name: pictures}, wanted)
    except Exception as error:  # ONNX Runtime's own exceptions share no public base
        if batch is not None:
            raise ModelError(f"the graph does not run: {error}") from error
    try:
        return pictures[:1], graph.run({images.name: pictures[:1]}, wanted)
    except Exception as error:
        raise ModelError(f"the graph does not run: {error}") from error


def _grid(
    shape: tuple[int, ...],
    batch: int,
    maps: Sequence[tuple[int, ...]],
    given: tuple[int, int] | None,
) -> tuple[tuple[int, ...], tuple[int, int], int]:
    """F's token axes, the patch grid and how many prefix tokens stand before it."""
    if len(shape) == 4:  # (B, h, w, D)
        found = (shape[1], shape[2])
        if given not in (None, found):
            raise ModelError(f"the tokens lie on a grid of {found}, not {given}")
        return (1, 2), found, 0
    if len(shape) != 3 or batch not in shape[:2]:
        raise ModelError(
            f"the tokens' layout {shape} is not known: expected (batch, tokens, width)"
        )
    axis = 0 if shape[1] == batch and shape[0] != batch else 1
    tokens = shape[axis]
    if given is None:
        grids = [each[2:] for each in maps if len(each) == 4]
        fitting = [each for each in grids if 0 <= tokens - each[0] * each[1] <= 32]
        if not fitting:
            raise ModelError(
                f"the patch grid of {tokens} tokens was not found: grid= (--grid) gives its rows "
                "and columns"
            )
        given = (int(fitting[-1][0]), int(fitting[-1][1]))
    prefix = tokens - given[0] * given[1]
    if prefix < 0:
        raise ModelError(f"a grid of {given} has more patches than there are tokens, {tokens}")
    return (axis,), given, prefix


def _check_order(
    graph: Graph,
    images: str,
    pictures: np.ndarray,
    tokens: str,
    axes: tuple[int, ...],
    grid: tuple[int, int],
    prefix: int,
) -> None:
    """Refuse tokens that do not lie row by row after the prefix: change patches, see which answer.

    Args:
        graph: The graph.
        images: Its input.
        pictures: What goes in.
        tokens: The value that has the tokens.
        axes: Its token axes.
        grid: Supposed grid (h, w).
        prefix: Supposed number of tokens before.

    Raises:
        ModelError: If they do not.
    """
    height, width = pictures.shape[2] / grid[0], pictures.shape[3] / grid[1]
    draw = np.random.default_rng(1)
    cells = [tuple(int(draw.integers(side)) for side in grid) for _ in range(6)]
    cells += [(0, 0), (grid[0] - 1, grid[1] - 1)]
    run = graph.part({images: pictures}, [tokens])
    base = run({images: pictures})[tokens].astype(np.float64)
    others = tuple(axis for axis in range(base.ndim) if axis not in axes)
    right = 0
    for y, x in cells:
        changed = pictures.copy()
        rows = slice(round(y * height), round((y + 1) * height))
        changed[:, :, rows, round(x * width) : round((x + 1) * width)] *= -1
        moved = np.abs(run({images: changed})[tokens] - base).sum(axis=others).reshape(-1)
        right += int(moved[prefix:].argmax()) == y * grid[1] + x
    if right < len(cells) / 2:
        raise ModelError(
            f"the tokens do not lie as {prefix} prefix tokens and a grid of {grid}, row by row: "
            f"of {len(cells)} patches changed, {right} moved their own token most; grid= (--grid) "
            "gives other rows and columns"
        )


def _before_attention(
    graph: Graph, pixels: set[str], given: Mapping[str, np.ndarray], normed: np.ndarray
) -> str | None:
    """The first value of F's shape that no attention has mixed yet, if there is one."""
    values = []
    for node in graph.nodes:
        if "Softmax" in node.op_type or "Attention" in node.op_type:
            break
        values += [name for name in node.output if name in pixels]
    found = graph.run(given, values)
    return next((name for name in values if found[name].shape == normed.shape), None)
