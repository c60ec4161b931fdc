"""Insert an explanation into an ONNX file of any origin; all that it holds stays as it is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError

import onnx
from onnx import external_data_helper, inliner
from vit_reciprocam.core.masks import NORMALIZATIONS, Masking
from vit_reciprocam.errors import InputError, ModelError, check_choice
from vit_reciprocam.onnx.contract import METADATA_KEY, Metadata, check_classes, check_file_targets
from vit_reciprocam.onnx.files import check_output, find_weights, write_then_move
from vit_reciprocam.onnx.insert.branch import PREFIX, Branch, append_direct, append_outputs
from vit_reciprocam.onnx.insert.closed_form import append_closed_form
from vit_reciprocam.onnx.insert.graph import Graph, open_unoptimized, remove_rounding
from vit_reciprocam.onnx.insert.read import Reading, read
from vit_reciprocam.pictures.preprocess import Preprocess
from vit_reciprocam.results.explanation import softmax
from vit_reciprocam.results.files import library_versions

__all__ = ["Inserted", "insert"]

_LEAST_OPSET = 11
_ROUNDING = 2e-5  # largest error of evidence in float32, in nats


@dataclass(frozen=True)
class Inserted:
    """What `insert` found in a file, and how it explains it.

    Attributes:
        path: "closed-form" or "direct".
        direct_because: Why the closed form does not hold; empty if it does.
        grid: Patch grid (h, w).
        prefix_tokens: Number P of tokens before the patches.
        normed: Name of F, the value that is masked.
        classes: Number C of classes.
        difference: Largest difference between the inserted scores and those of the graph's own
            nodes run on masked F, relative to the largest score.
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
    normalize: str = "minmax",
    targets: str = "all",
    raw: bool = False,
    grid: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
    target_node: str | None = None,
    class_names: Sequence[str] | None = None,
    preprocess: Preprocess | str | None = None,
    name: str | None = None,
) -> Inserted:
    """Write a copy of an ONNX file that gives maps beside its own outputs.

    The cut is the paper's: the output of the LayerNorm before the last attention is masked, the
    skip path is not. `vit_reciprocam.onnx.contract` describes the new outputs.

    Args:
        source: ONNX file of a classifier, written by any exporter.
        destination: File to write.
        kernel: Window kept around each patch, as in `ReciproCAM`.
        class_token: Whether prefix tokens are kept, as in `ReciproCAM`.
        normalize: "minmax" or "evidence", as in `ReciproCAM`. With evidence, the output `scores`
            holds the signed evidence.
        targets: Classes to explain: "all", "top1", "top2" … or "input", which adds an input
            `targets` (B, K).
        raw: Whether to leave out the maps scaled to [0, 1]; the scores remain.
        grid: Patch grid (h, w), if it cannot be found.
        size: Height and width of the pictures, if the graph leaves them open. The file written
            then takes only that size.
        target_node: Name of the value to mask, or of the node that computes it, if it cannot be
            found.
        class_names: One name per class, for the file's metadata.
        preprocess: Preprocessing of pictures for the model, for the file's metadata; also as text,
            such as "imagenet" (`vit_reciprocam.pictures.preprocess`), with the graph's own size.
        name: Name of the model; by default the file's name.

    Raises:
        ModelError: If the file cannot be read or cannot be explained; names the node where reading
            stopped.
        InputError: If a setting does not fit.
    """
    masking = Masking(kernel, class_token)
    check_choice("normalize", normalize, NORMALIZATIONS)
    null = normalize == "evidence"
    top = check_file_targets(targets)
    source, destination = Path(source), check_output(destination)
    graph = Graph(_load(source, destination), source.parent)
    _refuse_names(graph, source, targets, raw)
    try:
        unrounded = remove_rounding(graph)
        reading = read(unrounded, grid=grid, size=size, target_node=target_node)
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from error
    check_classes(reading.classes, class_names, top)
    height, width = reading.values[reading.images].shape[2:]
    if isinstance(preprocess, str):
        preprocess = Preprocess.parse(preprocess, size=(height, width))
    if preprocess is not None and preprocess.size != (height, width):
        raise InputError(
            f"preprocess makes pictures of {preprocess.size}, the maps hold for {(height, width)}"
        )
    explained, inserted = _explain(graph, unrounded, reading, masking, targets, raw, null)
    metadata = Metadata(
        name=name or source.stem,
        masking=masking,
        path=inserted.path,
        normalize=normalize,
        targets=targets,
        images=reading.images,
        logits=reading.logits,
        probabilities=reading.is_softmax,
        class_names=None if class_names is None else tuple(class_names),
        preprocess=preprocess,
        versions=library_versions(),
    )
    for key, value in metadata.to_properties().items():
        explained.metadata_props.add(key=key, value=value)
    _save(explained, destination, source.parent)
    return inserted


def _refuse_names(graph: Graph, source: Path, targets: str, raw: bool) -> None:
    """Refuse a file that has an explanation, or values named like the outputs to add."""
    ours = any(entry.key == METADATA_KEY for entry in graph.model.metadata_props)
    if ours or any(name.startswith(PREFIX) for name in graph.names):
        raise ModelError(f"{source} holds an explanation already")
    names = {"scores"} | (set() if raw else {"saliency"})
    names |= {"targets"} if targets == "input" else set() if targets == "all" else {"classes"}
    if clash := graph.names & names:
        raise ModelError(
            f"{source} has values of its own named {', '.join(sorted(clash))}: rename them, since "
            "the maps' outputs have these names"
        )


def _explain(
    graph: Graph,
    unrounded: Graph,
    reading: Reading,
    masking: Masking,
    targets: str,
    raw: bool,
    null: bool,
) -> tuple[onnx.ModelProto, Inserted]:
    """Return the model with an explanation, by the closed form if the graph permits.

    If `null`, its scores are the evidence over the all-null mask.
    """

    def build(because: str) -> tuple[onnx.ModelProto, Inserted]:
        branch = Branch(_find_opset(graph.model))
        if because:
            logits = append_direct(branch, unrounded, reading, masking, null=null)
        else:
            rounded = unrounded is not graph
            logits = append_closed_form(
                branch, unrounded, reading, masking, null=null, rounded=rounded
            )
        append_outputs(branch, reading, logits, targets=targets, raw=raw, null=null)
        model = onnx.ModelProto()
        model.CopyFrom(graph.model)
        # Everything is appended, so that no node, weight or output of the file changes. Only the
        # size of the pictures becomes fixed, since masks are made for one grid.
        images = next(each for each in model.graph.input if each.name == reading.images)
        for axis in (2, 3):
            dim = images.type.tensor_type.shape.dim[axis]
            dim.dim_value = reading.values[reading.images].shape[axis]
        model.graph.node.extend(branch.nodes)
        model.graph.initializer.extend(branch.weights)
        model.graph.input.extend(branch.inputs)
        model.graph.output.extend(branch.outputs)
        return model, Inserted(
            path="direct" if because else "closed-form",
            direct_because=because,
            grid=reading.layout.grid,
            prefix_tokens=reading.layout.prefix,
            normed=reading.normed,
            classes=reading.classes,
            difference=_prove(graph, unrounded, reading, masking, model, targets, null),
        )

    because = reading.direct_because
    if not because:
        try:
            return build("")
        except ModelError as error:  # it cannot be built, does not run, or gives wrong scores
            because = str(error)
    return build(because)


def _prove(
    graph: Graph,
    unrounded: Graph,
    reading: Reading,
    masking: Masking,
    model: onnx.ModelProto,
    targets: str,
    null: bool,
) -> float:
    """Refuse an explained model whose own outputs changed, or whose scores are wrong.

    `reading` is what was read from `unrounded`, the file's graph without rounding. The result is
    the largest difference of scores, relative to the largest score.
    """
    run = open_unoptimized(model, graph.folder)
    noise = reading.values[reading.images]
    # The graph was read by means of noise; with a smooth picture it could behave differently.
    smooth = np.linspace(-1, 1, noise.size).reshape(noise.shape).astype(noise.dtype)
    # Outputs stay the same bit for bit, except in float16: CPUs compute it in float32 and round
    # only where a value is an output.
    tolerance = 1e-2 if reading.is_half else 0.0
    worst = 0.0
    for pictures in (noise, smooth):
        feeds = {reading.images: pictures}
        before = graph.run(feeds, [value.name for value in graph.model.graph.output])
        if targets == "input":
            feeds["targets"] = np.tile(np.arange(min(5, reading.classes)), (len(pictures), 1))
        after = run(feeds)
        for name, value in before.items():
            difference = np.abs(after[name].astype(np.float64) - value).max()
            if not difference <= tolerance * np.abs(value).max():
                raise ModelError(f"the output {name!r} has changed by {difference:.1e}")
        scores = after["scores"].reshape(*after["scores"].shape[:2], -1)
        chosen = after.get("classes", feeds.get("targets"))
        # A dozen patches, with the first and the last, show what all would in far less time.
        patches = sorted({*np.linspace(0, scores.shape[2] - 1, 12).astype(int).tolist()})
        expected = _score_masks(graph, unrounded, reading, masking, pictures, patches)
        if null:
            logs = np.log(np.maximum(expected, np.finfo(np.float32).tiny))
            expected = logs[:, :, 1:] - logs[:, :, :1]
        else:
            expected = expected[:, :, 1:]
        if chosen is not None:
            expected = np.take_along_axis(expected, chosen[:, :, None], axis=1)
        room = _ROUNDING if null else 0.0
        worst = max(worst, _compare(scores[:, :, patches], expected, reading, room))
    return worst


def _compare(
    scores: np.ndarray, expected: np.ndarray, reading: Reading, room: float = 0.0
) -> float:
    """Return the largest difference, relative to the largest score; refuse it if too large.

    Differences up to `room` do not count.
    """
    largest = np.abs(expected).max()
    difference = float((np.abs(scores - expected) - room).clip(0).max() / largest)
    # Scores that hardly vary from patch to patch can be close to what they should be and still give
    # another map. So the shapes of maps are compared too, except of those that are flat.
    spread = np.ptp(expected, axis=2, keepdims=True)
    shapes = [each - each.mean(axis=2, keepdims=True) for each in (scores, expected)]
    shapes = [each / np.maximum(spread, 1e-30) for each in shapes]
    clear = np.broadcast_to(spread > 1e-3 * largest, scores.shape)
    alike = np.corrcoef(*(each[clear] for each in shapes))[0, 1] if clear.any() else 1.0
    if not difference <= reading.tolerance or not alike >= 0.9:
        raise ModelError(
            f"the scores differ from the graph's own nodes under masks by {difference:.1e} of the "
            f"largest; their maps correlate by {alike:.3f}"
        )
    return difference


def _score_masks(
    graph: Graph,
    unrounded: Graph,
    reading: Reading,
    masking: Masking,
    pictures: np.ndarray,
    patches: Sequence[int],
) -> np.ndarray:
    """Return scores (B, C, 1 + n) as the method defines them: mask F, run the nodes after it.

    The first are those under the all-null mask.
    """
    entering = unrounded.values_entering(
        unrounded.nodes_between([reading.normed], [reading.logits])
    )
    wanted = [*dict.fromkeys([reading.normed, *entering])]
    # the nodes before F round as in the file, those after it do not
    given = graph.run({reading.images: pictures}, wanted)
    normed = given[reading.normed]
    run = unrounded.prepare(given, [reading.logits])
    scores = []
    masks = reading.masks(masking, null=True)
    for mask in masks[[0, *(1 + patch for patch in patches)]]:
        given[reading.normed] = normed * mask
        logits = run(given)[reading.logits].astype(np.float32)
        scores.append(logits if reading.is_softmax else softmax(logits))
    return np.stack(scores, axis=2)


def _load(path: Path, destination: Path) -> onnx.ModelProto:
    """Read a model that is to be written to another place, with calls of its functions inlined."""
    if not path.is_file():
        raise ModelError(f"no such model file: {path}")
    damaged = ModelError(f"{path} is not an ONNX file, or was cut short")
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise damaged from error
    if not model.graph.node or not model.opset_import:
        raise damaged
    folder, files = path.parent.resolve(), [path]
    for place in sorted(_find_locations(model)):
        weights = find_weights(path, place)
        # A link out of the folder is refused too: insert copies the file that it leads to.
        if not weights.resolve().is_relative_to(folder):
            raise ModelError(
                f"{path} asks for weights outside its folder, by the link {place!r}: that is "
                "refused. Put the file itself in place of the link"
            )
        files.append(weights)
    if destination.resolve() in [file.resolve() for file in files]:
        raise InputError(f"{destination} belongs to the file to read: write to another place")
    opset, newest = _find_opset(model), onnx.defs.onnx_opset_version()
    if not _LEAST_OPSET <= opset <= newest:
        raise ModelError(
            f"{path} is written in opset {opset}; {_LEAST_OPSET} to {newest} are read here"
        )
    return inliner.inline_local_functions(model) if model.functions else model


def _find_opset(model: onnx.ModelProto) -> int:
    """Return the version of ONNX's own operators in a model."""
    versions = [each.version for each in model.opset_import if each.domain in ("", "ai.onnx")]
    return max(versions, default=0)


def _save(model: onnx.ModelProto, path: Path, folder: Path) -> None:
    """Write a model, whole or not at all, and copy its external weights from `folder` beside it."""
    with write_then_move(path) as file:
        if path.parent.resolve() != folder.resolve():
            for number, (place, entries) in enumerate(sorted(_find_locations(model).items())):
                weights = file.with_name(f"{path.name}.{number}.data")
                shutil.copyfile(folder / place, weights)
                for entry in entries:
                    entry.value = weights.name
        file.write_bytes(model.SerializeToString())


def _find_locations(model: onnx.ModelProto) -> dict[str, list[onnx.StringStringEntryProto]]:
    """Return the entries with the path of external weights, relative to the file, by that path."""
    found: dict[str, list[onnx.StringStringEntryProto]] = {}
    for tensor in external_data_helper._get_all_tensors(model):
        for entry in tensor.external_data:
            if entry.key == "location" and external_data_helper.uses_external_data(tensor):
                found.setdefault(entry.value, []).append(entry)
    return found
