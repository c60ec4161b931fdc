"""Read an ONNX graph as a Vision Transformer: find F, the patch grid, and what the head reads.

Exporters and optimizers write the same model in many ways. So only the last attention and what its
queries, keys and values come from are read from the structure of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

import onnx
from vit_reciprocam.core.masks import Masking, mask_matrix
from vit_reciprocam.errors import ModelError
from vit_reciprocam.onnx.insert.attention import SelfAttention, read_attention
from vit_reciprocam.onnx.insert.find import (
    CONVOLUTIONS,
    FoundAttention,
    find_attention,
    find_normed,
    has_head,
    refuse_other_attention,
)
from vit_reciprocam.onnx.insert.graph import Graph, node_inputs
from vit_reciprocam.onnx.insert.layout import Layout, check_layout, find_layout

__all__ = ["Reading", "read"]

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)


class SingleTokenRead(NamedTuple):
    """A value after the last attention that depends on one token."""

    token: int
    source: str  # name of the value with all tokens, from which the token is picked
    axis: int  # token axis of `source`
    shape: tuple[int, ...]  # shape of the value with one token


class HeadReads(NamedTuple):
    """How the head reads prefix tokens."""

    # The values with all tokens that are used beside the attention's output, such as the skip path:
    # name -> token axis.
    sides: Mapping[str, int]
    # The values that depend on one token each: name -> which token, and where it is picked. The
    # logits depend on tokens only through these values.
    reads: Mapping[str, SingleTokenRead]


@dataclass(frozen=True)
class Reading:
    """What has to be known about a graph to explain it."""

    images: str  # name of the input for pictures
    logits: str  # name of the output that holds the prediction
    batch: int | None  # number of pictures per run; None if the graph leaves it open
    classes: int
    is_softmax: bool  # whether the prediction consists of probabilities instead of logits
    normed: str  # name of F
    layout: Layout  # places of F's tokens
    attention: SelfAttention | None  # the last one; None if it could not be read
    head: HeadReads | None  # what the head reads; None if the closed form does not hold
    direct_because: str  # why the closed form does not hold; empty if it does
    # The values of one run: its random pictures, F, the logits, and all that the nodes between F
    # and the logits use and compute.
    values: Mapping[str, np.ndarray]

    @property
    def is_half(self) -> bool:
        """Whether F is float16."""
        return self.values[self.normed].dtype == np.float16

    @property
    def tolerance(self) -> float:
        """How much results may differ, relative to the largest."""
        return 0.01 if self.is_half else 1e-4

    def masks(self, masking: Masking, *, null: bool = False) -> np.ndarray:
        """Return all masks (N, ...), each of a shape and type that F can be multiplied with.

        If `null`, the all-null mask comes first.
        """
        normed, layout = self.values[self.normed], self.layout
        masks = mask_matrix(layout.grid, masking, prefix_tokens=layout.prefix, null=null)
        shape = [size if axis in layout.axes else 1 for axis, size in enumerate(normed.shape)]
        return masks.reshape(-1, *shape).astype(normed.dtype)


def read(
    graph: Graph,
    *,
    grid: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
    target_node: str | None = None,
) -> Reading:
    """Read a classifier's graph without rounding; the options are those of `insert`."""
    images, logits = _find_images(graph), _find_logits(graph)
    if logits not in graph.image_values:
        raise ModelError(f"output {logits!r} does not depend on input {images.name!r}")
    found, normed = _find_cut(graph, logits, target_node)
    below = graph.nodes_between([normed], [logits])
    wanted = [normed, logits, *graph.values_entering(below)]
    wanted += [name for number in below for name in graph.nodes[number].output if name]
    above = [graph.nodes[number] for number in graph.nodes_above([normed])]
    outputs = [node.output[0] for node in above if node.op_type in CONVOLUTIONS]
    convolutions = [name for name in outputs if name in graph.image_values]
    pictures, values = _run_once(graph, images, size, [*dict.fromkeys(wanted + convolutions)])
    is_softmax = _check_logits(graph, logits, values[logits], len(pictures))
    if not np.issubdtype(values[normed].dtype, np.floating):
        raise ModelError(
            f"{graph.describe(normed)} gives integers, which a mask would not scale: insert into "
            "the file before it is quantised, or quantise in the QDQ format"
        )
    shapes = [values[name].shape for name in convolutions]
    layout = find_layout(values[normed].shape, len(pictures), shapes, grid)
    check_layout(graph, images.name, pictures, normed, values[normed].shape, layout)
    attention, head, because = None, None, ""
    try:
        if found is None or found.number not in below:
            raise ModelError("no attention was found below the value to mask")
        attention = read_attention(graph, found, values, len(pictures))
        head = _read_head(graph, attention, logits, values, layout)
    except ModelError as error:
        because = str(error)
    return Reading(
        images=images.name,
        logits=logits,
        batch=_dims(images)[0],
        classes=values[logits].shape[1],
        is_softmax=is_softmax,
        normed=normed,
        layout=layout,
        attention=attention,
        head=head,
        direct_because=because,
        values={images.name: pictures, **values},
    )


def _find_images(graph: Graph) -> onnx.ValueInfoProto:
    """Return the input for images, and refuse a model that has none, or others besides."""
    found = [
        value
        for value in graph.inputs.values()
        if value.type.tensor_type.elem_type in _FLOATS and len(_dims(value)) == 4
    ]
    if len(found) != 1 or _dims(found[0])[1] not in (3, None):
        have = _list_values(graph.inputs.values())
        raise ModelError(
            f"no single input of images (batch, 3, height, width) was found; the inputs are: {have}"
        )
    if len(graph.inputs) > 1:
        others = [name for name in graph.inputs if name != found[0].name]
        raise ModelError(f"the model takes more than images: {', '.join(others)}")
    return found[0]


def _find_logits(graph: Graph) -> str:
    """Return the output that holds the classes' logits."""
    outputs = list(graph.model.graph.output)
    for value in outputs:
        if value.name in ("saliency", "scores"):
            raise ModelError(f"the model has an output {value.name!r} already: it is explained")
    named = [value for value in outputs if value.name in ("logits", "logits_per_image")]
    flat = named or [value for value in outputs if len(_dims(value)) == 2]
    if len(flat) != 1 and len(outputs) != 1:
        have = _list_values(outputs)
        raise ModelError(f"which output holds the classes' logits is not clear; there are: {have}")
    return str((flat or outputs)[0].name)


def _list_values(values: Iterable[onnx.ValueInfoProto]) -> str:
    return ", ".join(f"{value.name} {_dims(value)}" for value in values) or "none"


def _dims(value: onnx.ValueInfoProto) -> list[int | None]:
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]


def _find_cut(
    graph: Graph, logits: str, target_node: str | None
) -> tuple[FoundAttention | None, str]:
    """Return the last attention, which only a target node can replace, and the name of F."""
    used = set(graph.nodes_above([logits]))
    found = next((each for each in find_attention(graph) if each.number in used), None)
    if target_node is not None:
        outputs = [node.output[0] for node in graph.nodes if node.name == target_node]
        for name in (target_node, *outputs):
            if name in graph.number_of and name in graph.image_values:
                return found, name
        raise ModelError(
            f"the graph has no node or value {target_node!r} that depends on the images"
        )
    if found is None:
        kinds = {graph.nodes[number].op_type for number in used}
        seems = "; it looks like a CNN" if "Conv" in kinds and "Softmax" not in kinds else ""
        raise ModelError(
            f"no self-attention was found in the graph{seems}; target_node= (--target-node) names "
            "the value to mask in any graph"
        )
    normed = find_normed(graph, found)
    refuse_other_attention(graph, found, normed, logits)
    return found, normed


def _run_once(
    graph: Graph, images: onnx.ValueInfoProto, size: tuple[int, int] | None, wanted: Sequence[str]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return random images, two if the batch is open, and the values computed from them."""
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
    while True:
        try:
            return pictures, graph.run({images.name: pictures}, wanted)
        except ModelError as error:
            if batch is not None or len(pictures) == 1:
                raise ModelError(f"the graph does not run: {error}") from error
        # Some exporters leave the batch open in the input's shape but fix it to 1 inside.
        pictures = pictures[:1]


def _check_logits(graph: Graph, name: str, logits: np.ndarray, batch: int) -> bool:
    """Tell whether an output holds probabilities; refuse one that holds no logits either."""
    if logits.ndim != 2 or len(logits) != batch:
        raise ModelError(f"output {name!r} is {logits.shape}, not (batch, classes): no classifier?")
    if not has_head(graph, name):
        raise ModelError(
            f"output {name!r} comes from a LayerNorm with no projection after it: it has "
            "features, not classes"
        )
    if not np.isfinite(logits).all():
        raise ModelError(f"output {name!r} holds NaN or infinity for random images")
    through = {"Identity", "Cast", "QuantizeLinear", "DequantizeLinear", "Relu"}
    ends = [graph.producer(end) for end in graph.walk_up(name, through)]
    kinds = {node.op_type for node in ends if node is not None}
    if "Sigmoid" in kinds:
        raise ModelError(
            f"output {name!r} is a sigmoid's: classes that do not exclude each other have no "
            "softmax score, which is what the method reads"
        )
    sums = logits.astype(np.float64).sum(axis=1)
    return bool((logits >= 0).all() and np.abs(sums - 1).max() < 1e-2) and "Softmax" in kinds


def _read_head(
    graph: Graph,
    attention: SelfAttention,
    logits: str,
    values: Mapping[str, np.ndarray],
    layout: Layout,
) -> HeadReads:
    """Return how the head reads prefix tokens; refuse one for which the closed form fails.

    It holds if single prefix tokens reach the logits, each picked from a value with all tokens.
    Exporters write that in many ways (Gather, Slice, Split and others). So the kinds of nodes do
    not count, only which values change when a token is changed.
    """
    output = attention.output.name
    prefix, count = layout.prefix, layout.prefix + layout.grid[0] * layout.grid[1]
    if prefix == 0 or len(layout.axes) != 1:
        raise ModelError("the model has no prefix tokens")
    numbers = graph.nodes_between([output], [logits])
    inputs = [name for name in graph.values_entering(numbers) if name != output]
    given = {name: values[name] for name in (output, *inputs)}
    axes = {output: _token_axis(values[output].shape, count, attention.output.axes)}
    axes |= {
        name: _token_axis(values[name].shape, count)
        for name in inputs
        if name in graph.image_values
    }
    made = [name for number in numbers for name in graph.nodes[number].output if name]
    moved_by, shapes = _prepare_changes(graph, given, axes, made)
    by_patches = moved_by(slice(prefix, count)) | axes.keys()
    if logits in by_patches:
        raise ModelError("the head reads all tokens, not prefix tokens alone")
    by_prefix = [moved_by(slice(token, token + 1)) for token in range(prefix)]
    reads: dict[str, SingleTokenRead] = {}
    for number in numbers:
        node = graph.nodes[number]
        # A node that picks a token uses a value which patches change, and computes one which they
        # do not. If no prefix token changes that one either, it is a shape or a constant.
        sources = [name for name in node_inputs(node) if name in by_patches]
        for name in node.output:
            tokens = [token for token in range(prefix) if name in by_prefix[token]]
            if not sources or name in by_patches or not tokens:
                continue
            if len(tokens) > 1:
                raise ModelError(f"{graph.describe(name)} reads {len(tokens)} tokens at once")
            axis = _token_axis(shapes[sources[0]], count)
            reads[name] = SingleTokenRead(tokens[0], sources[0], axis, shapes[name])
    if not reads:
        raise ModelError("no value of the head that is made from one token was found")
    return HeadReads({name: axis for name, axis in axes.items() if name != output}, reads)


def _prepare_changes(
    graph: Graph, given: Mapping[str, np.ndarray], axes: Mapping[str, int], made: Sequence[str]
) -> tuple[Callable[[slice], set[str]], dict[str, tuple[int, ...]]]:
    """Return a function from tokens to the names of values they change, and all values' shapes.

    The function changes these tokens in the `given` values that have a token axis in `axes`, and
    returns which of the values `made` from them are different then.
    """
    run = graph.prepare(given, made)
    before = run(given)
    draw = np.random.default_rng(2)

    def moved_by(tokens: slice) -> set[str]:
        moved: set[str] = set()
        # One change could miss a dependence. A ReLU or a clip may be flat around the usual values:
        # strong noise gets through it and weak noise does not. And no noise moves the mean of many
        # numbers by much, so all numbers are also shifted together: once far up, once far down.
        for size, shift in ((1, 0), (10, 0), (1, 5), (1, -5)):
            changed = dict(given)
            for name, axis in axes.items():
                value = given[name].copy()
                part = value[(slice(None),) * axis + (tokens,)]
                noise = size * draw.standard_normal(part.shape) + shift
                part += noise.astype(part.dtype)
                changed[name] = value
            after = run(changed)
            for name in made:
                floats = np.issubdtype(before[name].dtype, np.floating)
                if not np.array_equal(before[name], after[name], equal_nan=floats):
                    moved.add(name)
        return moved

    shapes = {name: value.shape for name, value in (*given.items(), *before.items())}
    return moved_by, shapes


def _token_axis(shape: tuple[int, ...], count: int, axes: tuple[str, ...] = ()) -> int:
    """Return the token axis of a value, which has that length and, if `axes` are given, is "t"."""
    found = [n for n, size in enumerate(shape) if size == count and (not axes or axes[n] == "t")]
    if not found:
        raise ModelError(f"a value {shape} beside the last attention has no axis of all tokens")
    return 1 if 1 in found else found[0]
