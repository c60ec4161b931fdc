"""Prove what was put into a graph: run it, and the graph's own nodes under masks, one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

import onnx
from vit_reciprocam.core.masks import Masking, mask_matrix
from vit_reciprocam.errors import ModelError
from vit_reciprocam.onnx.insert.graph import Graph, open_unoptimized, run_session
from vit_reciprocam.onnx.insert.read import Reading
from vit_reciprocam.results.explanation import softmax

__all__ = ["prove"]


def prove(
    graph: Graph,
    unrounded: Graph,
    reading: Reading,
    masking: Masking,
    model: onnx.ModelProto,
    targets: str,
) -> float:
    """Run a model: its own outputs must be as before, its scores those of masks one by one.

    Args:
        graph: The file's graph.
        unrounded: The same without rounding.
        reading: What was read of that.
        masking: The masks.
        model: The model with the explanation in it.
        targets: Whose maps it gives.

    Returns:
        The largest difference of scores, relative to the largest score.

    Raises:
        ModelError: If outputs or scores differ.
    """
    session = open_unoptimized(model, graph.folder)
    names = [value.name for value in session.get_outputs()]
    noise = reading.values[reading.images]
    # Noise is what was read with; a smooth picture could answer otherwise.
    smooth = np.linspace(-1, 1, noise.size).reshape(noise.shape).astype(noise.dtype)
    worst = 0.0
    for pictures in (noise, smooth):
        feeds = {reading.images: pictures}
        before = graph.run(feeds, [value.name for value in graph.model.graph.output])
        if targets == "input":
            feeds["targets"] = np.tile(np.arange(min(5, reading.classes)), (len(pictures), 1))
        after = dict(zip(names, run_session(session, feeds), strict=True))
        _check_outputs(before, after, reading)
        scores = after["scores"].reshape(*after["scores"].shape[:2], -1)
        chosen = after.get("classes", feeds.get("targets"))
        # a dozen patches, corners among them, show what all would at a small part of the time
        patches = sorted({*np.linspace(0, scores.shape[2] - 1, 12).astype(int).tolist()})
        expected = _score_masks(graph, unrounded, reading, masking, pictures, patches)
        if chosen is not None:
            expected = np.take_along_axis(expected, chosen[:, :, None], axis=1)
        worst = max(worst, _compare(scores[:, :, patches], expected, reading))
    return worst


def _check_outputs(
    before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], reading: Reading
) -> None:
    """Refuse outputs of the graph that are not as they were.

    They are the same bit for bit, but for float16, which CPUs compute in float32 and round where a
    value is an output.

    Raises:
        ModelError: If one is not.
    """
    loose = 1e-2 if reading.is_half else 0.0
    for name, value in before.items():
        off = np.abs(after[name].astype(np.float64) - value).max()
        if not off <= loose * np.abs(value).max():
            raise ModelError(f"the output {name!r} is not as before, by {off:.1e}")


def _compare(scores: np.ndarray, expected: np.ndarray, reading: Reading) -> float:
    """Return the largest difference, relative to the largest score.

    Raises:
        ModelError: If it is too large, or patches rank otherwise than they should.
    """
    off = np.abs(scores - expected)
    difference = float(off.max() / expected.max())
    # Scores that hardly vary from patch to patch can be close to what they should be and still make
    # another map. So maps are also compared by shape, but for those that are flat.
    spread = np.ptp(expected, axis=2, keepdims=True)
    shapes = [each - each.mean(axis=2, keepdims=True) for each in (scores, expected)]
    shapes = [each / np.maximum(spread, 1e-30) for each in shapes]
    clear = np.broadcast_to(spread > 1e-3 * expected.max(), scores.shape)
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
    """Return scores (B, C, n) as the method defines them: F masked, the nodes after it run.

    What stands before the cut rounds as the file does; what is masked does not.
    """
    entering = unrounded.values_entering(
        unrounded.nodes_between([reading.normed], [reading.logits])
    )
    wanted = [*dict.fromkeys([reading.normed, *entering])]
    given = graph.run({reading.images: pictures}, wanted)
    normed = given[reading.normed]
    run = unrounded.prepare(given, [reading.logits])
    masks = mask_matrix(reading.layout.grid, masking, prefix_tokens=reading.layout.prefix)
    first = reading.layout.axes[0]
    shape = [normed.shape[axis] for axis in reading.layout.axes]
    shape += [1] * (normed.ndim - first - len(shape))
    scores = []
    for patch in patches:
        given[reading.normed] = normed * masks[patch].reshape(shape).astype(normed.dtype)
        logits = run(given)[reading.logits].astype(np.float32)
        scores.append(logits if reading.is_softmax else softmax(logits))
    return np.stack(scores, axis=2)
