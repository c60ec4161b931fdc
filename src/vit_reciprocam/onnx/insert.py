"""An explanation put into an ONNX file from anywhere: no PyTorch, and nothing of the file changed.

The file keeps its nodes and outputs; a branch beside them gives scores and maps. What is inserted
is checked before it is written: the outputs against the file's own, the scores against the graph's
own nodes run with F masked, one mask after the other.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import inliner

from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.explanation import softmax
from vit_reciprocam.files import library_versions
from vit_reciprocam.images import Preprocess
from vit_reciprocam.masks import Masking, mask_matrix
from vit_reciprocam.onnx.foreign.branch import PREFIX, Branch
from vit_reciprocam.onnx.foreign.graph import Graph, open_unoptimized
from vit_reciprocam.onnx.foreign.masked import append_closed_form, append_direct
from vit_reciprocam.onnx.foreign.outputs import append_outputs
from vit_reciprocam.onnx.foreign.reading import Reading, find_images, read
from vit_reciprocam.onnx.foreign.rounding import without_rounding
from vit_reciprocam.onnx.foreign.weights import load_model, save_model
from vit_reciprocam.onnx.metadata import Metadata, check_file_targets
from vit_reciprocam.presets import parse_preprocess

__all__ = ["Inserted", "insert"]

_LEAST_OPSET = 11


@dataclass(frozen=True)
class Inserted:
    """What was found in a file and put into it.

    Attributes:
        path: "closed-form" or "direct".
        direct_because: Why the closed form does not hold; empty where it does.
        grid: (h, w).
        prefix_tokens: P.
        normed: The value that is masked.
        classes: C.
        difference: Between the inserted scores and the graph's own nodes run with F masked: the
            largest, relative to the largest score.
    """

    path: str
    direct_because: str
    grid: tuple[int, int]
    prefix_tokens: int
    normed: str
    classes: int
    difference: float


def insert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    kernel: str = "gaussian",
    class_token: bool = True,
    targets: str = "all",
    raw: bool = False,
    grid: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
    target_node: str | None = None,
    class_names: Sequence[str] | None = None,
    preprocess: Preprocess | str | None = None,
    name: str | None = None,
) -> Inserted:
    """Write an ONNX file once more, with maps beside its own outputs.

    The cut is the paper's: the output of the last attention's LayerNorm is masked, the skip path is
    not. The new outputs stand in `vit_reciprocam.onnx.metadata`.

    Args:
        source: A classifier's ONNX file, of any exporter.
        destination: The file to write.
        kernel: "gaussian" or "dirac".
        class_token: False also masks the prefix tokens.
        targets: Classes to explain: "all", "top1", "top2" … or "input", which adds an input
            `targets` (B, K).
        raw: Leave out the maps scaled to [0, 1]; the scores remain.
        grid: Patch grid (h, w), where it is not found.
        size: Height and width of the pictures, where the graph leaves them open. The maps then hold
            for that size alone.
        target_node: The value to mask or the node that makes it, where it is not found.
        class_names: One a class, for the file's metadata.
        preprocess: What stands before the model, for the file's metadata; also as text, such as
            "imagenet" (`vit_reciprocam.presets`), with the graph's own size.
        name: What the model is called; by default the file's name.

    Raises:
        ModelError: If the file cannot be read, or is none that can be explained; names the node
            where reading stopped.
        InputError: If a setting does not fit.
    """
    masking = Masking(kernel, class_token)
    check_file_targets(targets)
    source, destination = Path(source), Path(destination)
    model = load_model(source)
    _check_opset(model, source)
    if model.functions:
        model = inliner.inline_local_functions(model)
    graph = Graph(model, source.parent)
    if any(name.startswith(PREFIX) for name in graph.names):
        raise ModelError(f"{source} holds an explanation already")
    clash = graph.names & {"saliency", "scores", "classes", "targets"}
    if clash:
        raise ModelError(f"{source} has values of its own named {', '.join(sorted(clash))}")
    try:
        plain = without_rounding(graph, graph.varying(find_images(graph).name))
        reading = read(plain, grid=grid, size=size, target_node=target_node)
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from error
    if class_names is not None and len(class_names) != reading.classes:
        raise InputError(
            f"{len(class_names)} class names given for a model of {reading.classes} classes"
        )
    if isinstance(preprocess, str):
        height, width = reading.values[reading.images].shape[2:]
        preprocess = parse_preprocess(preprocess, size=(height, width))
    explained, inserted = _explained(graph, plain, reading, masking, targets, raw)
    metadata = Metadata(
        name=name or source.stem,
        masking=masking,
        path=inserted.path,
        targets=targets,
        images=reading.images,
        logits=reading.logits,
        class_names=None if class_names is None else tuple(class_names),
        preprocess=preprocess,
        versions=library_versions(),
    )
    for key, value in metadata.to_properties().items():
        explained.metadata_props.add(key=key, value=value)
    save_model(explained, destination, folder=source.parent)
    return inserted


def _check_opset(model: onnx.ModelProto, source: Path) -> None:
    opset = _opset(model)
    newest = onnx.defs.onnx_opset_version()
    if not _LEAST_OPSET <= opset <= newest:
        raise ModelError(
            f"{source} is written in opset {opset}; {_LEAST_OPSET} to {newest} are read here"
        )


def _opset(model: onnx.ModelProto) -> int:
    versions = [each.version for each in model.opset_import if each.domain in ("", "ai.onnx")]
    return max(versions, default=0)


def _explained(
    graph: Graph, plain: Graph, reading: Reading, masking: Masking, targets: str, raw: bool
) -> tuple[onnx.ModelProto, Inserted]:
    """The model with its branch, by the closed form where the graph permits.

    Args:
        graph: Of the file.
        plain: The same without rounding.
        reading: Of that.
        masking: What to mask.
        targets: Which classes.
        raw: Without maps in [0, 1].

    Raises:
        ModelError: If what is inserted proves wrong.
    """

    def built(because: str) -> tuple[onnx.ModelProto, Inserted]:
        branch = Branch(_opset(graph.model))
        if because:
            logits = append_direct(branch, plain, reading, masking)
        else:
            rounded = plain is not graph
            logits = append_closed_form(branch, plain, reading, masking, rounded=rounded)
        inputs, outputs = append_outputs(branch, reading, logits, targets=targets, raw=raw)
        model = onnx.ModelProto()
        model.CopyFrom(graph.model)
        model.graph.node.extend(branch.nodes)
        model.graph.initializer.extend(branch.weights)
        model.graph.input.extend(inputs)
        model.graph.output.extend(outputs)
        return model, Inserted(
            path="direct" if because else "closed-form",
            direct_because=because,
            grid=reading.grid,
            prefix_tokens=reading.prefix_tokens,
            normed=reading.normed,
            classes=reading.classes,
            difference=_check(graph, plain, reading, masking, model, targets),
        )

    because = reading.direct_because
    if not because:
        try:
            return built("")
        except ModelError as error:
            because = str(error)
    return built(because)


def _check(
    graph: Graph,
    plain: Graph,
    reading: Reading,
    masking: Masking,
    model: onnx.ModelProto,
    targets: str,
) -> float:
    """Run the model: its own outputs must be as before, its scores those of masks one by one.

    Raises:
        ModelError: If they differ.
    """
    pictures = reading.values[reading.images]
    feeds = {reading.images: pictures}
    own = [value.name for value in graph.model.graph.output]
    before = graph.run(feeds, own)
    if targets == "input":
        feeds["targets"] = np.tile(np.arange(min(5, reading.classes)), (len(pictures), 1))
    session = open_unoptimized(model, graph.folder)
    names = [value.name for value in session.get_outputs()]
    after = dict(zip(names, session.run(None, feeds), strict=True))
    half = reading.values[reading.normed].dtype == np.float16  # computed in float32 on CPUs
    for name in own:
        off = np.abs(after[name].astype(np.float64) - before[name]).max()
        if off > (1e-2 * np.abs(before[name]).max() if half else 0):
            raise ModelError(f"the output {name!r} is not as before, by {off:.1e}")
    scores = after["scores"].reshape(*after["scores"].shape[:2], -1)
    chosen = after.get("classes", feeds.get("targets"))
    patches = sorted(
        {*range(0, scores.shape[2], max(1, scores.shape[2] // 6)), scores.shape[2] - 1}
    )
    expected = masked_scores(graph, plain, reading, masking, patches)
    if chosen is not None:
        expected = np.take_along_axis(expected, chosen[:, :, None], axis=1)
    difference = float(np.abs(scores[:, :, patches] - expected).max() / expected.max())
    if difference > reading.tolerance:
        raise ModelError(
            f"the scores differ from the graph's own nodes under masks by {difference:.1e} of the "
            "largest"
        )
    return difference


def masked_scores(
    graph: Graph, plain: Graph, reading: Reading, masking: Masking, patches: Sequence[int]
) -> np.ndarray:
    """Scores (B, C, n) as the method says them: F masked, the nodes below it run, once a mask."""
    entering = plain.entering(plain.between([reading.normed], [reading.logits]))
    pictures = {reading.images: reading.values[reading.images]}
    given = graph.run(pictures, [*dict.fromkeys([reading.normed, *entering])])
    normed = given[reading.normed]
    run = plain.part(given, [reading.logits])
    masks = mask_matrix(reading.grid, masking, prefix_tokens=reading.prefix_tokens)
    first = reading.token_axes[0]
    shape = [normed.shape[axis] for axis in reading.token_axes]
    shape += [1] * (normed.ndim - first - len(shape))
    scores = []
    for patch in patches:
        given[reading.normed] = normed * masks[patch].reshape(shape).astype(normed.dtype)
        logits = run(given)[reading.logits].astype(np.float32)
        scores.append(logits if reading.is_softmax else softmax(logits))
    return np.stack(scores, axis=2)
