"""What is measured, how often and in what order; by a clock of our own, never by time."""

import csv
import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import timm
import torch
import transformers
from typer.testing import CliRunner

import onnx
import vit_reciprocam as vr
from vit_reciprocam.benchmark import calls, memory, models
from vit_reciprocam.benchmark import measure as module
from vit_reciprocam.benchmark.measure import benchmark
from vit_reciprocam.classifier.classifier import Classifier
from vit_reciprocam.classifier.load import ASSETS
from vit_reciprocam.cli import app
from vit_reciprocam.errors import InputError, MissingDependencyError, ModelError

SMALL = "timm:test_vit"
FIXED = [
    "forward",
    "reciprocam",
    "reciprocam, all scores",
    "reciprocam, all maps",
    "naive H",
]


DEMO = models.OnnxFiles({"path": str(ASSETS / "demo.onnx")}, str(ASSETS / "demo-plain.onnx"))


@pytest.fixture(scope="module")
def small():
    return vr.load(SMALL, weights="random")


# --- by a clock of our own -----------------------------------------------------------------------


class Stage:
    """Calls that take the seconds they are told, on a clock that only they move."""

    def __init__(self, monkeypatch, seconds, warmup=2):
        self.now, self.log = 0.0, []
        self.seconds, self.warmup = seconds, warmup
        monkeypatch.setattr(module, "make_call", self.make_call)
        model = torch.nn.Linear(1, 1)
        backend = SimpleNamespace(model=model, num_classes=2, device="cpu")
        self.classifier = Classifier("fake", backend, vr.Preprocess((4, 4)), None)

    def make_call(self, model, label, *, size, batch):
        count = 0

        def call():
            nonlocal count
            self.log.append((label, batch))
            self.now += self.seconds(label, max(0, count - self.warmup))
            count += 1
            return None, "closed-form" if label == "reciprocam" else ""

        return call

    def run(self, **options):
        options = {"warmup": self.warmup, "rounds": 6} | options
        return benchmark([self.classifier], ["rollout"], clock=lambda: self.now, **options)


def test_every_round_makes_each_call_once_in_an_order_of_its_own(monkeypatch):
    stage = Stage(monkeypatch, lambda label, number: 1.0)
    stage.run(batch_sizes=(1, 16))
    labels = [*FIXED, "rollout"]
    each = [(label, batch) for batch in (1, 16) for label in labels]
    assert stage.log[:24] == [one for one in each for _ in range(2)], "warm-up"
    rounds = [stage.log[start : start + 12] for start in range(24, len(stage.log), 12)]
    assert len(rounds) == 6
    for one in rounds:
        assert sorted(one[:6]) == sorted(each[:6]), "neighbours in time are compared"
        assert sorted(one[6:]) == sorted(each[6:])
    assert len({tuple(one) for one in rounds}) == 6
    again = Stage(monkeypatch, lambda label, number: 1.0)
    again.run(batch_sizes=(1, 16))
    assert again.log == stage.log


COST = {"forward": 2.0, "reciprocam": 3.0, "naive H": 9.0, "rollout": 6.0}


def test_ratios_are_taken_round_by_round(monkeypatch):
    # The machine slows down from round to round: 1, 2, 3, 4, 5 times.
    stage = Stage(monkeypatch, lambda label, number: COST.get(label, 2.5) * (1 + number))
    rows = {row.method: row for row in stage.run(rounds=5, batch_sizes=(8,))}
    naive = rows["naive H"]
    assert naive.ms == pytest.approx((27_000, 18_000, 36_000)), "median and quartiles of 9 to 45 s"
    assert naive.fps == pytest.approx(8 / 27)
    assert naive.to_forward == pytest.approx((4.5, 4.5, 4.5)), "drift cancels out"
    assert naive.to_reciprocam == pytest.approx((3, 3, 3))
    assert rows["forward"].to_forward == (1, 1, 1)
    assert rows["forward"].to_reciprocam == pytest.approx((2 / 3,) * 3)
    assert {row.rounds for row in rows.values()} == {5}


def test_the_spread_is_that_of_the_ratios(monkeypatch):
    seconds = {"forward": [1, 2, 1, 2, 1], "rollout": [1, 4, 3, 8, 5]}  # ratios 1, 2, 3, 4, 5
    stage = Stage(monkeypatch, lambda label, number: seconds.get(label, [1] * 5)[number])
    rows = {row.method: row for row in stage.run(rounds=5)}
    assert rows["rollout"].to_forward == pytest.approx((3, 2, 4))
    assert rows["rollout"].to_reciprocam == pytest.approx((4, 3, 5))


@pytest.mark.parametrize(
    ("cost", "rounds", "timed"),
    [(10, 30, 30), (11, 30, 15), (25, 30, 8), (25, 9, 5), (500, 30, 8), (500, 40, 5), (500, 4, 4)],
)
def test_slow_calls_are_timed_in_fewer_rounds(monkeypatch, cost, rounds, timed):
    every = -(-rounds // timed)

    def seconds(label, number):
        return cost * (1 + every * number) if label == "rollout" else 1.0 + number

    rows = {row.method: row for row in Stage(monkeypatch, seconds).run(rounds=rounds)}
    assert rows["rollout"].rounds == timed
    assert rows["rollout"].to_forward == pytest.approx((cost,) * 3), "of the rounds that have both"
    assert rows["naive H"].rounds == rounds


def test_progress_ends_where_it_said(monkeypatch):
    seen = []
    stage = Stage(monkeypatch, lambda label, number: 30.0 if label == "rollout" else 1.0)
    stage.run(rounds=16, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1] == (6 + 5 * 16 + 8, 6 + 5 * 16 + 8)


def test_where_memory_runs_out_the_row_says_so_and_the_others_go_on(monkeypatch):
    def seconds(label, number):
        if label == "naive H":
            raise RuntimeError("not enough memory: you tried to allocate\nmore")
        return 1.0

    rows = {row.method: row for row in Stage(monkeypatch, seconds).run()}
    assert rows["naive H"].note == "RuntimeError: not enough memory: you tried to allocate"
    assert rows["naive H"].ms is None
    assert rows["rollout"].ms is not None


# --- with models ---------------------------------------------------------------------------------


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


def test_threads_are_set_and_set_back_also_after_an_error(monkeypatch):
    before, seen = torch.get_num_threads(), set()

    def seconds(label, number):
        seen.add(torch.get_num_threads())
        return 1.0

    rows = Stage(monkeypatch, seconds).run(threads=before + 1)
    assert {row.threads for row in rows} == seen == {before + 1}
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError):
        Stage(monkeypatch, lambda label, number: 1 / 0).run(threads=before + 1)
    assert torch.get_num_threads() == before


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
    monkeypatch.setattr(module, "make_call", lambda *_, **__: pytest.fail("nothing is measured"))
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


# --- memory --------------------------------------------------------------------------------------


def test_peak_memory_is_that_of_a_fresh_process(small):
    ballast = b"x" * 2**29  # of this process, which the other one's peak must not count
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


# --- the command ---------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, ["benchmark", *map(str, arguments)], catch_exceptions=False)


QUICK = ["--random", "--rounds", "2", "--no-memory"]


@pytest.mark.parametrize("ending", ["md", "csv", "json"])
def test_the_command(tmp_path, ending):
    file = tmp_path / "new" / f"figures.{ending}"
    arguments = ["--model", SMALL, *QUICK, "--batch", "2", "--threads", "1", "--out", file]
    result = run(*arguments)
    assert result.exit_code == 0
    assert result.stderr == ""
    for words in (f"{SMALL}, 160×160 px, batch 2", "÷ forward", "… all maps", "relevance", "1 thr"):
        assert words in result.stdout
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 80, "but the line on the machine"
    text = file.read_text()
    if ending == "md":
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert [line.split(" | ")[1] for line in lines[2:]] == [*FIXED, "relevance"]
        assert {line.count("|") for line in lines} == {9}
    elif ending == "csv":
        rows = list(csv.DictReader(text.splitlines()))
        assert [row["method"] for row in rows] == [*FIXED, "relevance"]
        assert float(rows[0]["to_forward"]) == 1
        assert float(rows[0]["ms_low"]) <= float(rows[0]["ms_high"])
    else:
        rows = json.loads(text)["rows"]
        assert rows[0]["to_forward"] == {"median": 1, "low": 1, "high": 1}


def test_json_and_options(tmp_path):
    arguments = ["--model", SMALL, *QUICK, "--option", "img_size=[96, 160]", "--no-naive"]
    report = json.loads(
        run(*arguments, "--option", "class_token=true", "--method", "reciprocam", "--json").stdout
    )
    assert report["options"] == {"img_size": [96, 160], "class_token": True}
    assert report["random_weights"]
    assert report["environment"]["versions"]["torch"] == version("torch")
    assert [row["method"] for row in report["rows"]] == FIXED[:4]
    assert report["rows"][0]["size"] == [96, 160]


def test_the_demo_with_memory():
    result = run("--model", "demo", "--rounds", "1", "--json", "--random")
    assert result.exit_code == 0
    rows = json.loads(result.stdout)["rows"]
    assert all(row["peak_bytes"] >= row["added_bytes"] > 0 for row in rows)


def test_one_method_that_a_model_does_not_have_ends_with_1():
    result = run("--model", "demo", "--method", "rollout", "--rounds", "1", "--no-memory")
    assert result.exit_code == 1
    (line,) = [line for line in result.stdout.splitlines() if "rollout" in line]
    assert line.split() == ["rollout", "–"]
    assert (
        "demo, batch 1, rollout: an ONNX file holds ReciproCAM's maps and no other" in result.stderr
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "none"], "method must be one of"),
        (["--batch", "0"], "Invalid value for '--batch'"),
        (["--out", "figures.txt"], "ending of --out must be one of '.md', '.csv', '.json'"),
        (["--option", "img_size"], "--option must be KEY=VALUE"),
        (["--option", "colour=red"], "cannot create 'test_vit' with options"),
        (["--weights", "w.pth"], "drop it or --weights"),
        (["--prompt", "a cat"], "prompts are for open_clip: and hf:"),
        (["--backend", "openvino"], "--backend: for ONNX files, and no --model is one"),
        (["--plain", "a.onnx"], "1 --plain for 0 ONNX files"),
    ],
)
def test_bad_input_ends_with_2(arguments, words):
    result = run("--model", SMALL, *QUICK, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stdout == ""


def test_weights_go_with_models():
    result = run("--model", SMALL, "--model", "demo", "--weights", "w.pth")
    assert result.exit_code == 2
    assert "1 --weights for 2 --model" in result.stderr


# --- random weights ------------------------------------------------------------------------------


def test_random_weights_of_timm_and_torchvision():
    torch.manual_seed(0)
    expected = timm.create_model("test_vit")
    torch.manual_seed(0)
    fetched = vr.load(SMALL, weights="random")
    pairs = zip(expected.parameters(), fetched.model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert len(fetched.class_names) == 1000
    with pytest.raises(ModelError, match="not supported"):
        vr.load("timm:test_resnet", weights="random")
    vit = vr.load("torchvision:vit_b_32", weights="random", image_size=64, num_classes=3)
    assert (vit.preprocess.size, vit.num_classes, vit.class_names) == ((64, 64), 3, None)


def test_random_weights_of_open_clip(monkeypatch):
    real = open_clip.create_model

    def create(name, pretrained=None, **options):
        assert pretrained is None, "nothing is fetched"
        assert not options["load_weights"]
        return real(name, **options)

    monkeypatch.setattr(open_clip, "create_model", create)
    clf = vr.load("open_clip:ViT-B-32/openai", weights="random", prompts=["a cat", "a dog"])
    assert clf.class_names == ("a cat", "a dog")
    assert clf.preprocess.mean[0] == pytest.approx(0.48145466), "that of the tag"
    assert vr.load("open_clip:ViT-B-32", weights="random", prompts=["a"]).num_classes == 1
    with pytest.raises(ModelError, match="has no weights 'none'"):
        vr.load("open_clip:ViT-B-32/none", weights="random", prompts=["a"])


def test_random_weights_of_a_folder_without_any(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=24,
        image_size=64,
        patch_size=16,
        num_labels=4,
        architectures=["ViTForImageClassification"],
    )
    config.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    clf = vr.load(f"hf:{tmp_path}", weights="random")
    assert (clf.num_classes, clf.model.training) == (4, False)
    rows = benchmark([clf], [], rounds=1, warmup=1)
    assert [row.method for row in rows] == FIXED
    with pytest.raises(InputError, match="give their folder"):
        vr.load(f"hf:{tmp_path}", weights="w.pth")
