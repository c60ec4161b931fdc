"""Whether what was put into a graph is right: run it, and the graph's own nodes under masks."""

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
    session = open_unoptimized(model, graph.folder)
    names = [value.name for value in session.get_outputs()]
    noise = reading.values[reading.images]
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
        patches = sorted({*np.linspace(0, scores.shape[2] - 1, 12).astype(int).tolist()})
        expected = masked_scores(graph, plain, reading, masking, pictures, patches)
        if chosen is not None:
            expected = np.take_along_axis(expected, chosen[:, :, None], axis=1)
        worst = max(worst, _difference(scores[:, :, patches], expected, reading))
    return worst


def _check_outputs(
    before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], reading: Reading
) -> None:
    """The graph's own outputs are as they were; float16 is computed in float32 on CPUs.

    Raises:
        ModelError: If one is not.
    """
    loose = 1e-2 if reading.is_half else 0.0
    for name, value in before.items():
        off = np.abs(after[name].astype(np.float64) - value).max()
        if not off <= loose * np.abs(value).max():
            raise ModelError(f"the output {name!r} is not as before, by {off:.1e}")


def _difference(scores: np.ndarray, expected: np.ndarray, reading: Reading) -> float:
    """The largest, relative to the largest score.

    Raises:
        ModelError: If it is too large, or patches rank otherwise than they should.
    """
    off = np.abs(scores - expected)
    difference = float(off.max() / expected.max())
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


def masked_scores(
    graph: Graph,
    plain: Graph,
    reading: Reading,
    masking: Masking,
    pictures: np.ndarray,
    patches: Sequence[int],
) -> np.ndarray:
    """Scores (B, C, n) as the method says them: F masked, the nodes below it run, once a mask."""
    entering = plain.entering(plain.between([reading.normed], [reading.logits]))
    wanted = [*dict.fromkeys([reading.normed, *entering])]
    given = graph.run({reading.images: pictures}, wanted)
    normed = given[reading.normed]
    run = plain.part(given, [reading.logits])
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
