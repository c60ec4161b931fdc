"""Peak memory, measured in fresh processes."""

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


def test_peak_memory_is_that_of_a_fresh_process(small, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ballast = b"x" * 2**29  # held by this process, and no part of the other one's peak
    own = memory._watch_memory(None)()
    options = {"size": (160, 160), "batch": 2, "threads": 1}
    forward, added = memory.measure_peak(small.model, "forward", **options)
    naive, added_by_naive = memory.measure_peak(small.model, "naive H", **options)
    assert list(tmp_path.iterdir()) == [], "the model's file is removed"
    assert 2**25 < forward < own - len(ballast) / 2
    assert 0 < added < forward
    assert forward <= naive
    assert added + 2**24 < added_by_naive, "of 100 masks for two images at once"


def test_what_hinders_measuring_memory_is_said(monkeypatch, small):
    stage = Stage(monkeypatch, lambda label, number: 1.0)
    stage.classifier.model.odd = lambda: None  # cannot be written to a file
    rows = stage.run(memory=True)
    assert all("cannot be handed to a fresh process" in row.note for row in rows)
    assert all(row.ms is not None and row.peak_bytes is None for row in rows)
    with pytest.raises(ModelError, match=r"its process failed: .*holds ReciproCAM's maps"):
        memory.measure_peak(DEMO, "relevance", size=(112, 112), batch=1, threads=1)
