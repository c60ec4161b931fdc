"""Check an inserted explanation against the graph's own nodes, run under one mask after another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import onnx
from vit_reciprocam.core.masks import Masking
from vit_reciprocam.errors import ModelError
from vit_reciprocam.onnx.insert.graph import Graph, open_unoptimized
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
        if chosen is not None:
            expected = np.take_along_axis(expected, chosen[:, :, None], axis=1)
        worst = max(worst, _compare(scores[:, :, patches], expected, reading))
    return worst


def _compare(scores: np.ndarray, expected: np.ndarray, reading: Reading) -> float:
    """Return the largest difference, relative to the largest score; refuse it if too large."""
    difference = float(np.abs(scores - expected).max() / expected.max())
    # Scores that hardly vary from patch to patch can be close to what they should be and still give
    # another map. So the shapes of maps are compared too, except of those that are flat.
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
    """Return scores (B, C, n) as the method defines them: mask F and run the nodes after it.

    The nodes before F round as in the file, those after it do not.
    """
    entering = unrounded.values_entering(
        unrounded.nodes_between([reading.normed], [reading.logits])
    )
    wanted = [*dict.fromkeys([reading.normed, *entering])]
    given = graph.run({reading.images: pictures}, wanted)
    normed = given[reading.normed]
    run = unrounded.prepare(given, [reading.logits])
    scores = []
    for mask in reading.masks(masking)[patches]:
        given[reading.normed] = normed * mask
        logits = run(given)[reading.logits].astype(np.float32)
        scores.append(logits if reading.is_softmax else softmax(logits))
    return np.stack(scores, axis=2)
