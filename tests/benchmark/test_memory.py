"""Peak memory, measured in fresh processes."""

from pathlib import Path

import pytest
from stage import SMALL, Stage

import vit_reciprocam as vr
from vit_reciprocam.benchmark import memory
from vit_reciprocam.benchmark.calls import OnnxFiles
from vit_reciprocam.classifier.load import ASSETS
from vit_reciprocam.errors import ModelError

DEMO = OnnxFiles({"path": str(ASSETS / "demo.onnx")}, str(ASSETS / "demo-plain.onnx"))


@pytest.fixture(scope="module")
def small():
    return vr.load(SMALL, weights="random")


def test_peak_memory_is_that_of_a_fresh_process(small):
    ballast = b"x" * 2**29  # held by this process, and no part of the other one's peak
    own = memory._watch_memory(None)()
    peaks = {}
    with memory.store_model(small.model) as where:
        for label in ("forward", "naive H"):
            options = {"size": (160, 160), "batch": 2, "threads": 1}
            peaks[label] = memory.measure_peak(where, label, **options)
        assert Path(where["file"]).exists()
    assert not Path(where["file"]).exists()
    forward, naive = peaks["forward"], peaks["naive H"]
    assert 2**25 < forward.total < own - len(ballast) / 2
    assert 0 < forward.added < forward.total
    assert forward.total <= naive.total
    assert forward.added + 2**24 < naive.added, "of 100 masks for two images at once"


def test_what_hinders_measuring_memory_is_said(monkeypatch, small):
    stage = Stage(monkeypatch, lambda label, number: 1.0)
    stage.classifier.model.odd = lambda: None  # cannot be written to a file
    rows = stage.run(memory=True)
    assert all("cannot be handed to a fresh process" in row.note for row in rows)
    assert all(row.ms is not None and row.peak_bytes is None for row in rows)
    with (
        memory.store_model(DEMO) as where,
        pytest.raises(ModelError, match=r"its process failed: .*holds ReciproCAM's maps"),
    ):
        memory.measure_peak(where, "relevance", size=(112, 112), batch=1, threads=1)
