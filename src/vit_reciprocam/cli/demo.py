"""`vit-reciprocam demo`: the bundled model on the bundled picture, without torch."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.markup import escape

from vit_reciprocam.benchmark.calls import ALL_MAPS, FORWARD
from vit_reciprocam.benchmark.measure import benchmark
from vit_reciprocam.classifier.explain import explain
from vit_reciprocam.classifier.load import ASSETS, load
from vit_reciprocam.cli import options
from vit_reciprocam.cli.console import errors_in_one_line, out
from vit_reciprocam.cli.explain import add_picture, print_report, start_report

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
        rows = benchmark([classifier], (), naive=False)
    ms: dict[str, Any] = {row.method: row.ms for row in rows}
    predicted_ms, explained_ms = ms[FORWARD].median, ms[ALL_MAPS].median
    ratio = explained_ms / predicted_ms
    report = start_report("demo", {})
    add_picture(report, explanation, folder)
    if as_json:
        timing = {"plain_ms": predicted_ms, "explained_ms": explained_ms, "ratio": ratio}
        typer.echo(json.dumps(report | {"timing": timing}, indent=2))
        return
    height, width = explanation.scores.shape[2:]
    classes = explanation.probs.shape[1]
    print_report(report, as_json=False)
    out.print(
        f"prediction alone {predicted_ms:.1f} ms; with the {height}×{width} maps of all {classes} "
        f"classes {explained_ms:.1f} ms: [bold]{ratio:.2f}×[/bold]\n"
        "(medians of runs taken in turn, ONNX Runtime, this machine)",
        highlight=False,
    )
    out.print(
        f"look at [bold]{escape(str(folder / 'grid.png'))}[/bold]", soft_wrap=True, highlight=False
    )
