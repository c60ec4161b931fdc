"""`vit-reciprocam demo`: the bundled model on the bundled picture, without torch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import typer
from rich.markup import escape

from vit_reciprocam.classifier.classifier import Classifier
from vit_reciprocam.classifier.explain import explain
from vit_reciprocam.classifier.load import ASSETS, load
from vit_reciprocam.cli import options
from vit_reciprocam.cli.console import errors_in_one_line, out
from vit_reciprocam.cli.explain import make_record, make_report, print_report, settings_of
from vit_reciprocam.pictures.read import read_image

__all__ = ["demo_command"]


def demo_command(
    destination: options.Out = options.DEFAULT_OUT / "demo",
    colormap: options.Colormap = "viridis",
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Explain the bundled picture, without torch.

    The bundled model is small and knows 12 drawn classes; for photographs use the command explain
    with another model. Nothing is fetched.
    """
    with errors_in_one_line(debug):
        classifier = load("demo")
        explanation = explain(ASSETS / "demo.png", classifier, top=3)
        folder = explanation.save(destination, colormap=colormap)
        predicted_ms, explained_ms = _time_demo(classifier)
    ratio = explained_ms / predicted_ms
    settings = settings_of(explanation)
    report = make_report("demo", settings, [make_record(explanation, folder)], [])
    if as_json:
        timing = {"plain_ms": predicted_ms, "explained_ms": explained_ms, "ratio": ratio}
        typer.echo(json.dumps(report | {"timing": timing}, indent=2))
        return
    rows, columns = explanation.scores.shape[2:]
    classes = explanation.probs.shape[1]
    print_report(report, as_json=False)
    out.print(
        f"prediction alone {predicted_ms:.1f} ms; with the {rows}×{columns} maps of all {classes} "
        f"classes {explained_ms:.1f} ms: [bold]{ratio:.2f}×[/bold]\n"
        "(medians of runs taken in turn, ONNX Runtime, this machine)",
        highlight=False,
    )
    out.print(
        f"look at [bold]{escape(str(folder / 'grid.png'))}[/bold]", soft_wrap=True, highlight=False
    )


def _time_demo(classifier: Classifier, runs: int = 30) -> tuple[float, float]:
    """Return the median milliseconds of the prediction alone and with maps, measured in turn."""
    from vit_reciprocam.onnx.run.sessions import open_session

    untouched = open_session(ASSETS / "demo-plain.onnx")
    batch = classifier.preprocess(read_image(ASSETS / "demo.png"))[None]
    calls: list[Callable[[], Any]] = [
        lambda: untouched.run(["logits"], {"images": batch}),
        lambda: classifier.model.session.run(["logits", "saliency"], {"images": batch}),
    ]
    times = np.empty((runs, 2))
    for run in range(runs):
        for column, call in enumerate(calls):
            began = time.perf_counter()
            call()
            times[run, column] = 1000 * (time.perf_counter() - began)
    predicted_ms, explained_ms = np.median(times, axis=0).tolist()
    return predicted_ms, explained_ms
