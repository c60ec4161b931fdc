"""What is measured of models and of ONNX files, and what is refused."""

import shutil
import subprocess
import sys

import pytest
import torch
from stage import FIXED, SMALL

import onnx
import vit_reciprocam as vr
from vit_reciprocam.benchmark import calls, measure
from vit_reciprocam.benchmark.calls import OnnxFiles
from vit_reciprocam.benchmark.measure import benchmark
from vit_reciprocam.classifier.load import ASSETS
from vit_reciprocam.errors import InputError, MissingDependencyError, ModelError

DEMO = OnnxFiles({"path": str(ASSETS / "demo.onnx")}, str(ASSETS / "demo-plain.onnx"))


@pytest.fixture(scope="module")
def small():
    return vr.load(SMALL, weights="random")


def test_rows_are_complete_and_nothing_is_changed(small):
    threads = torch.get_num_threads()
    model = small.model
    states = {key: value.clone() for key, value in model.state_dict().items()}
    rows = benchmark([small], batch_sizes=(1, 2), rounds=2, warmup=1)
    assert [row.method for row in rows] == [*FIXED, "relevance"] * 2
    assert [row.batch for row in rows] == [1] * 6 + [2] * 6
    paths = ["", "closed-form", "closed-form", "closed-form", "direct", ""]
    assert [row.path for row in rows] == paths * 2
    for row in rows:
        assert (row.model, row.size, row.threads, row.note) == (SMALL, (160, 160), threads, "")
        assert row.device
        assert row.ms.low <= row.ms.median <= row.ms.high
        assert row.fps == pytest.approx(1000 * row.batch / row.ms.median)
        assert row.to_forward.median > 0
        assert row.to_reciprocam.median > 0
        assert row.peak_bytes is None
    assert all(torch.equal(value, states[key]) for key, value in model.state_dict().items())
    assert not model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


def test_what_a_model_does_not_have(small):
    pooled = vr.load(SMALL, weights="random", global_pool="avg")
    rows = benchmark([pooled], rounds=1, warmup=1)
    assert [row.method for row in rows] == FIXED[:4], "relevance was not asked for"
    assert [row.path for row in rows] == ["", "direct", "direct", "direct"]
    methods = ["relevance", "reciprocam:kernel=dirac", "center"]
    rows = {row.method: row for row in benchmark([pooled], methods, rounds=1, warmup=1)}
    assert "head reads all tokens" in rows["relevance"].note
    assert rows["relevance"].ms is None
    assert rows["reciprocam:kernel=dirac"].path == "direct"
    assert rows["center"].to_forward is not None


def test_the_demo_model_needs_no_torch():
    code = (
        "import sys; from vit_reciprocam.classifier.load import load;"
        "from vit_reciprocam.benchmark.measure import benchmark;"
        "rows = benchmark([load('demo')], rounds=1, warmup=1, threads=1);"
        "print([row.method for row in rows], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{FIXED[:4]} False"


def test_calls_give_what_they_are_named_after(small):
    options = {"size": (160, 160), "batch": 2}
    results = {label: calls.make_call(small.model, label, **options)()[0] for label in FIXED}
    assert results["forward"].shape == (2, 1000)
    assert results["reciprocam, all scores"].shape == (2, 1000, 10, 10)
    assert (results["reciprocam, all scores"] != results["reciprocam, all maps"]).any()
    for label in ("reciprocam", "naive H"):
        top = results[label]
        assert top.shape == (2, 1, 10, 10)
        assert abs(results["naive H"] - top).max() < 0.05, "an untrained model's rounding, scaled"
    options["size"] = (112, 112)
    demo = {label: calls.make_call(DEMO, label, **options)()[0].shape for label in FIXED[:4]}
    all_of_them = (2, 12, 14, 14)
    assert list(demo.values()) == [(2, 12), (2, 1, 14, 14), all_of_them, all_of_them]


@pytest.mark.parametrize(
    ("methods", "options", "words"),
    [
        (["relevence"], {}, "method must be one of 'reciprocam', "),
        (["rollout:fusion=max"], {}, "a setting of rollout must be one of 'head_fusion'"),
        ([], {"batch_sizes": (4, 0)}, "a batch size must be 1 or more; got 0"),
        ([], {"batch_sizes": ()}, "at least one model and one batch size"),
        ([], {"rounds": 0}, "rounds must be 1 or more; got 0"),
        ([], {"warmup": 0}, "warmup must be 1 or more; got 0"),
        ([], {"threads": 0}, "threads must be 1 or more; got 0"),
        ([], {"untouched": [None, None]}, "2 files of untouched models for 1 models"),
        (
            [],
            {"untouched": ["a.onnx"]},
            "test_vit is not an ONNX file and needs no file of an untouched model",
        ),
    ],
)
def test_refusals(small, monkeypatch, methods, options, words):
    monkeypatch.setattr(measure, "make_call", lambda *_, **__: pytest.fail("nothing is measured"))
    with pytest.raises(InputError, match=words):
        benchmark([small], methods, **options)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_onnx_files_beside_pytorch(small, backend):
    demo = vr.load("demo", backend=backend, threads=2)
    untouched = [ASSETS / "demo-plain.onnx", None]
    rows = benchmark([demo, small], [], rounds=2, warmup=1, naive=False, untouched=untouched)
    assert [row.backend for row in rows] == [backend] * 4 + ["torch"] * 4
    assert [row.threads for row in rows] == [2] * 4 + [torch.get_num_threads()] * 4
    assert [row.note for row in rows] == [""] * 8
    rows = benchmark([demo], [], rounds=1, warmup=1, threads=1)
    assert {row.threads for row in rows} == {1}


def test_the_untouched_model_of_an_onnx_file(tmp_path, monkeypatch):
    shutil.copy(ASSETS / "demo.onnx", tmp_path / "demo.onnx")
    demo = vr.load(tmp_path / "demo.onnx")
    with pytest.raises(ModelError, match=r"come from the same operations.*--plain FILE"):
        benchmark([demo], [], rounds=1)
    other = onnx.load(ASSETS / "demo-plain.onnx")
    (gain,) = [one for one in other.graph.initializer if one.name == other.graph.node[-1].input[1]]
    gain.raw_data = (-onnx.numpy_helper.to_array(gain)).tobytes()
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(
        InputError, match=r"other\.onnx is not the model that .*demo\.onnx explains"
    ):
        benchmark([demo], [], rounds=1, untouched=[tmp_path / "other.onnx"])
    with pytest.raises(ModelError, match="must be the untouched model, with one input and one out"):
        benchmark([demo], [], rounds=1, untouched=[tmp_path / "demo.onnx"])
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingDependencyError, match=r"--plain FILE.*vit-reciprocam\[onnx\]"):
        benchmark([demo], [], rounds=1)
