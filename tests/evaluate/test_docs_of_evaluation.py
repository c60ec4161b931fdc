"""What docs/evaluation.md says of metrics is what the registry says, and its examples run."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from runs import OLD_RUN

from vit_reciprocam.evaluate.metrics.adcc import average_drop
from vit_reciprocam.evaluate.metrics.registry import KINDS, METRICS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "evaluation.md").read_text()


def block(words):
    """The one Python example of the page with these words."""
    (found,) = [one for one in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if words in one]
    return found


def table_of_metrics():
    lines = ["| metric | column | per picture | better | measured | source |", "| --- " * 6 + "|"]
    lines += [
        f"| {one.heading} | `{one.column}` | {one.description} | "
        f"{'higher' if one.higher else 'lower'} | {KINDS[one.kind]} | {one.source} |"
        for one in METRICS.values()
    ]
    return "\n".join(lines) + "\n"


def test_the_table_of_metrics_is_the_registry_s():
    start = PAGE.index("| metric | column |")
    assert PAGE[start : PAGE.index("\n\n", start) + 1] == table_of_metrics()


def test_every_metric_says_what_it_is_and_where_it_is_from():
    for name, one in METRICS.items():
        assert name == one.column
        assert one.description
        assert one.source
        assert one.aggregate != "means" or one.terms


def test_the_recipe_for_torchmetrics_runs_as_printed():
    names = {}
    exec(block("torchmetrics"), names)
    p, o = np.random.default_rng(0).random((2, 10))
    there, here = names["AverageDrop"](), names["AverageDrop"]()
    for metric, part in ((there, slice(0, 3)), (here, slice(3, 4)), (here, slice(4, 10))):
        metric.update(torch.from_numpy(p[part]), torch.from_numpy(o[part]))
    expected = average_drop(p, o)
    assert float(here.compute()) == pytest.approx(expected[3:].mean(), rel=1e-12)
    there.merge_state(here)  # as two processes do
    assert float(there.compute()) == pytest.approx(expected.mean(), rel=1e-12)
    there.reset()
    there.update(torch.tensor([0.8]), torch.tensor([0.6]))
    assert float(there.compute()) == pytest.approx(0.25)


def test_the_other_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(OLD_RUN, "run")
    names = {"model": timm.create_model("test_vit").eval(), "images": torch.rand(1, 3, 160, 160)}
    exec(block("METHODS"), names)
    assert names["maps"].shape == (1, 2, 10, 10)
    names = {}
    exec(block("Batch"), names)
    assert [one.maps.shape for one in names["both"]] == [(1, 1, 10, 10)] * 2
    exec(block("read_run"), names)
    assert names["table"].num_rows == 12
