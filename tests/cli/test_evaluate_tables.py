"""The tables that evaluate prints."""

import io

import pytest
from rich.console import Console

from vit_reciprocam.cli.evaluate import _print
from vit_reciprocam.evaluate.metrics.registry import METRICS


@pytest.mark.parametrize("columns", [64, 80, 200])
def test_no_figure_is_cut(columns, monkeypatch):
    names = list(METRICS)
    figures = {name: 10 + number + 0.25 for number, name in enumerate(names)}
    rows = [
        {"model": "m", "method": method, **figures}
        for method in ("reciprocam", "reciprocam:kernel=dirac,class_token=false")
    ]
    data = {"models": ["m"], "protocol": {"name": "byun2023"}, "duplicates": 0, "images": 4}
    printed = io.StringIO()
    monkeypatch.setattr("vit_reciprocam.cli.evaluate.out", Console(file=printed, width=columns))
    _print({**data, "data": {"name": "x"}}, rows)
    lines = printed.getvalue().splitlines()
    assert max(map(len, lines)) <= columns
    shown = [line.split() for line in lines]
    for figure in figures.values():
        assert sum(f"{figure:.2f}" in words for words in shown) == 2
    headings = " ".join(line for line in lines if "method" in line)
    assert [one.heading in headings for one in METRICS.values()] == [True] * len(names)
    assert "…" not in printed.getvalue()
    if columns == 200:
        assert sum("method" in line for line in lines) == 1
