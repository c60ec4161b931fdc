import io
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner

import vit_reciprocam
from vit_reciprocam.classifier.load import ASSETS
from vit_reciprocam.cli import app
from vit_reciprocam.cli.console import errors_in_one_line
from vit_reciprocam.cli.evaluate import _print
from vit_reciprocam.evaluate.metrics.registry import METRICS
from vit_reciprocam.libraries import listing
from vit_reciprocam.pictures.scenes import CLASSES, draw_scene


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture
def scenes(tmp_path):
    folder = tmp_path / "scenes"
    folder.mkdir()
    for seed in range(3):
        draw_scene(seed).image.save(folder / f"{seed}.png")
    return folder


def explain_demo(*arguments):
    return run("explain", "--model", "demo", *arguments)


# --- explain -----------------------------------------------------------------------------------


def test_explain_a_folder(scenes, tmp_path):
    result = explain_demo(scenes, "--target", "top3", "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "0.png" in result.stdout
    report = json.loads((tmp_path / "out" / "explanations.json").read_text())
    assert [len(record["targets"]) for record in report["images"]] == [3, 3, 3]
    assert report["failures"] == []
    for record in report["images"]:
        folder = Path(record["folder"])
        manifest = json.loads((folder / "manifest.json").read_text())
        for target in manifest["images"][0]["targets"]:
            assert (folder / target["overlay"]).exists()


def test_json_is_the_only_thing_on_stdout(scenes, tmp_path):
    result = explain_demo(scenes, "--json", "--out", tmp_path / "out")
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "out" / "explanations.json").read_text())
    assert {record["path"] for record in report["images"]} == {"closed-form"}
    seen = [record["prediction"]["name"] for record in report["images"]]
    present = [{list(CLASSES)[label] for label in draw_scene(seed).labels} for seed in range(3)]
    assert [name in names for name, names in zip(seen, present, strict=True)] == [True] * 3


def test_targets_by_name_and_index(scenes, tmp_path):
    arguments = ("--target", "fish", "--target", "2", "--json", "--out", tmp_path / "out")
    record = json.loads(explain_demo(scenes / "0.png", *arguments).stdout)["images"][0]
    assert [target["name"] for target in record["targets"]] == ["fish", "cup"]


def test_named_classes_and_the_most_probable(scenes, tmp_path):
    arguments = ("--target", "key", "--target", "top2", "--json", "--out", tmp_path / "out")
    record = json.loads(explain_demo(scenes / "0.png", *arguments).stdout)["images"][0]
    key, first, second = record["targets"]
    assert key["name"] == "key"
    assert first["name"] == record["prediction"]["name"]
    assert first["probability"] > second["probability"]


def test_the_table_names_the_prediction_if_it_is_not_explained(scenes, tmp_path):
    absent = set(range(len(CLASSES))) - set(draw_scene(0).labels)
    other = list(CLASSES)[min(absent)]
    result = explain_demo(scenes / "0.png", "--target", other, "--out", tmp_path / "out")
    assert "(predicted: " in result.stdout
    result = explain_demo(scenes / "0.png", "--target", "top1", "--out", tmp_path / "out")
    assert "(predicted: " not in result.stdout


def test_a_table_of_all_classes_is_cut_and_json_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    import timm

    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "w.safetensors")
    arguments = ["--model", "timm:test_vit", "--weights", tmp_path / "w.safetensors"]
    arguments += ["--target", "all", "--out", tmp_path / "out"]
    table = run("explain", ASSETS / "demo.png", *arguments).stdout
    assert table.count("%") == 12
    assert "and 988 less" in table
    report = json.loads(run("explain", ASSETS / "demo.png", *arguments, "--json").stdout)
    assert len(report["images"][0]["targets"]) == 1000


def test_pictures_of_one_name_get_folders_of_their_own(scenes, tmp_path):
    (tmp_path / "more").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "more" / "0.png")
    arguments = (scenes / "0.png", tmp_path / "more" / "0.png", "--json", "--out", tmp_path / "out")
    folders = [record["folder"] for record in json.loads(explain_demo(*arguments).stdout)["images"]]
    assert folders == [str(tmp_path / "out" / name) for name in ("0", "0-2")]


def test_explain_builds_models_with_options(scenes, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("n01\tpear, fruit\nn02\tapple\n")
    model = ("--model", "timm:test_vit", "--weights", "random", "--class-names", names)
    options = ("--option", "img_size=96", "--option", "num_classes=2", "--target", "pear")
    arguments = ("--json", "--out", tmp_path / "out")
    result = run("explain", scenes / "0.png", *model, *options, *arguments)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["images"][0]["targets"][0]["name"] == "pear, fruit"
    with np.load(tmp_path / "out" / "0" / "maps.npz") as saved:
        assert saved["maps"].shape[-2:] == (6, 6)


def test_the_rest_is_done_where_some_pictures_fail(scenes, tmp_path):
    (scenes / "broken.png").write_text("no picture")
    result = explain_demo(scenes, tmp_path / "none.png", "--json", "--out", tmp_path / "out")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert len(report["images"]) == 3
    assert [failure["source"] for failure in report["failures"]] == [
        str(scenes / "broken.png"),
        str(tmp_path / "none.png"),
    ]
    assert "broken.png is not a picture" in result.stderr
    assert "no such file" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.png"], "no such file: none.png"),
        (["*.none"], "no file matches *.none"),
        (["{scene}", "--target", "fisch"], "no class is called 'fisch'. Closest: 3 (fish)"),
        (["{scene}", "--target", "12"], "class 12 does not exist: the model has 12 classes"),
        (["{scene}", "--target", "all", "--target", "fish"], "'all' stands alone"),
        (["{scene}", "--target", "-1"], "class -1 does not exist: the model has 12 classes"),
        (["{scene}", "--target", ""], "got an empty text"),
        (["{scene}", "--weights", "w"], "drop --weights"),
        (["{scene}", "--out", "{scene}"], "0.png is a file"),
        (["{scene}", "--out", "{scene}/sub"], "0.png is a file"),
        (["{scene}", "--target", "top13"], "top must be between 1 and the number of classes, 12"),
        (["{scene}", "--kernel", "dirac"], "fixed when its file was written"),
        (["{scene}", "--kernel", "box"], "kernel must be one of 'gaussian', 'dirac'; got 'box'"),
        (["{scene}", "--colormap", "hot"], "colormap must be one of"),
        (["{scene}", "--model", "demoo"], "model must be one of 'demo', 'timm:NAME'"),
        (["{scene}", "--max-pixels", "100"], "more than 100 pixels"),
        (["{scene}", "--opacity", "2"], "opacity"),
        (["{scene}", "--device", "abacus"], "ONNX Runtime has no 'abacus' here; available: "),
        (["{scene}", "--backend", "tvm"], "backend must be one of 'onnxruntime', 'openvino'"),
        (["{scene}", "--class-names", "none.txt"], "--class-names none.txt cannot be read"),
        (["{scene}", "--preprocess", "imagenet:size=224"], "takes pictures of 112x112 pixels"),
        (["{scene}", "--model", "timm:test_vit", "--threads", "1"], "threads: for ONNX files"),
        (["{scene}", "--target", "top0"], "top must be between 1 and"),
        (["{scene}", "--model", "timm:test_vit.nope", "--weights", "w"], "no such weights file"),
        ([], "Missing argument"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words, scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # put back afterwards
    given = [argument.format(scene=scenes / "0.png") for argument in arguments]
    result = run("explain", "--model", "demo", *given)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "vit-reciprocam-out").exists(), "nothing is written for nothing"


def test_debug_shows_where_and_keeps_the_exit_code(scenes):
    result = explain_demo(scenes / "0.png", "--target", "fisch", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "in find_class" in result.stderr


def test_nothing_but_errors_on_stderr_without_a_terminal(scenes, tmp_path):
    assert explain_demo(scenes, "--out", tmp_path / "out").stderr == ""


def test_before_fetching_it_says_so(scenes, monkeypatch):
    def offline(*_, **__):
        raise vit_reciprocam.errors.DownloadError("no network")

    monkeypatch.setattr("vit_reciprocam.cli.explain.load", offline)
    result = run("explain", scenes / "0.png", "--model", "timm:test_vit")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "fetching timm:test_vit, or taking it from the cache (--weights FILE needs no network)",
        "error: no network",
    ]


def test_one_folder_in_the_way_does_not_stop_the_others(scenes, tmp_path):
    (tmp_path / "out" / "1").mkdir(parents=True)
    (tmp_path / "out" / "1" / "grid.png").write_text("mine")
    result = explain_demo(scenes, "--json", "--out", tmp_path / "out")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert [Path(record["folder"]).name for record in report["images"]] == ["0", "2"]
    assert "grid.png was not written by" in report["failures"][0]["error"]
    assert (tmp_path / "out" / "1" / "grid.png").read_text() == "mine"


def test_a_foreign_summary_is_not_replaced(scenes, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "explanations.json").write_text("mine")
    result = explain_demo(scenes, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "choose another --out" in result.stderr
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["explanations.json"]


def test_a_second_run_does_not_explain_the_first_ones_pictures(scenes):
    for _ in range(2):
        report = json.loads(explain_demo(scenes, "--json", "--out", scenes / "out").stdout)
        assert len(report["images"]) == 3


def test_unexpected_errors_are_one_line_too(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr("vit_reciprocam.cli.explain.load", lambda *_, **__: 1 / 0)
    result = explain_demo(scenes, "--out", tmp_path / "out")
    assert result.exit_code == 3
    assert result.stderr == "error: division by zero (unexpected: --debug shows where)\n"


def test_a_timm_model_with_local_weights(tmp_path):
    import timm

    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "w.safetensors")
    arguments = ["--model", "timm:test_vit", "--weights", tmp_path / "w.safetensors"]
    arguments += ["--kernel", "dirac", "--no-class-token", "--layer", "block", "--json"]
    result = run("explain", ASSETS / "demo.png", *arguments, "--out", tmp_path / "out")
    report = json.loads(result.stdout)
    assert report["settings"] == {
        "method": "reciprocam",
        "kernel": "dirac",
        "class_token": False,
        "layer": "block",
    }
    with np.load(tmp_path / "out" / "demo" / "maps.npz") as saved:
        assert saved["maps"].shape == (1, 1, 10, 10)


# --- what stops before, and Ctrl-C -------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "nowhere"], "no such data set: nowhere"),
        (["evaluate", "scenes:0"], "scenes:0 is empty"),
        (["evaluate", "{empty}"], "holds neither class folders nor labels.csv"),
        (["evaluate", "scenes:2", "--boxes", "nowhere"], "no such folder of boxes"),
        (["evaluate", "scenes:2", "--protocol", "none"], "protocol must be one of"),
        (["evaluate", "scenes:2", "--method", "none"], "method must be one of"),
        (["evaluate", "scenes:2", "--out", "{file}"], "is a file"),
        (["explain", "none.png", "other.png"], "no such file: none.png, other.png"),
        (["reproduce", "table1", "--data", "nowhere"], "no such data set: nowhere"),
        (["reproduce", "figures", "--data", "nowhere"], "no such folder of pictures: nowhere"),
        (["reproduce", "figures", "--data", "{empty}"], "no pictures in folder"),
    ],
)
def test_what_needs_no_model_is_refused_before_one_is_loaded(
    arguments, words, tmp_path, monkeypatch
):
    def loaded(*_, **__):
        pytest.fail("a model was loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vit_reciprocam.cli.options.load", loaded)
    monkeypatch.setattr("vit_reciprocam.cli.explain.load", loaded)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    result = run(*(word.format(empty="empty", file="file") for word in arguments))
    assert result.exit_code == 2
    assert words in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


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


def stopped(arguments, begun):
    """Ctrl-C once something is there: exit code and what was printed."""
    command = [sys.executable, "-m", "vit_reciprocam", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not begun() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        printed, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert printed == ""
    return process.returncode, said


def test_ctrl_c_keeps_what_was_measured_and_says_how_to_go_on(tmp_path):
    folder = tmp_path / "a run"
    given = ["evaluate", "scenes:300", "--model", "demo", "--batch-size", "1", "--out", folder]
    code, said = stopped(given, lambda: list(folder.glob("part-*.parquet")))
    assert code == 130
    kept = len(list(folder.glob("part-*.parquet")))
    again = shlex.join(["evaluate", "--resume", *map(str, given[1:])])
    command = f"python -m vit_reciprocam {again}"
    assert said == (
        f"stopped: {kept} of 300 pictures are kept in {folder}. Go on with:\n  {command}\n"
    )
    with pytest.raises(typer.Exit) as ended, errors_in_one_line(False):
        raise KeyboardInterrupt
    assert ended.value.exit_code == 130


def test_ctrl_c_before_anything_is_measured(monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("vit_reciprocam.cli.options.load", interrupted)
    out = tmp_path / "out"
    for arguments, words in (
        (["evaluate", "scenes:2", "--out", out], "nothing was measured yet"),
        (["benchmark", "--out", tmp_path / "b.md"], "nothing is written"),
    ):
        result = run(*arguments)
        assert (result.exit_code, result.stderr) == (130, f"stopped: {words}\n")
        assert result.stdout == ""
        assert list(tmp_path.iterdir()) == []


# --- demo, models, and the command itself ------------------------------------------------------


def test_demo(tmp_path):
    result = run("demo", "--out", tmp_path / "demo")
    assert result.exit_code == 0
    assert "×" in result.stdout
    with Image.open(tmp_path / "demo" / "grid.png") as grid:
        assert grid.width > 1000


def test_demo_json(tmp_path):
    report = json.loads(run("demo", "--json", "--out", tmp_path / "demo").stdout)
    assert report.pop("timing")["ratio"] > 0
    explained = run(
        "explain", ASSETS / "demo.png", "--model", "demo", "--target", "top3", "--json",
        "--out", tmp_path,
    )  # fmt: skip
    assert report == json.loads(explained.stdout)


def test_models_says_by_which_path_and_why_not():
    rows = json.loads(run("models", "*deit_tiny*", "--json").stdout)
    paths = {row["model"]: row["path"] for row in rows}
    assert paths["timm:deit_tiny_distilled_patch16_224"] == "closed-form"
    assert "demo" not in paths
    rows = json.loads(run("models", "test_*", "--json").stdout)
    by_name = {row["model"]: row for row in rows}
    assert by_name["timm:test_resnet"]["path"] == "-"
    assert "it has no attention" in by_name["timm:test_resnet"]["why"]
    assert by_name["timm:test_vit"]["path"] == "closed-form"
    (pooled,) = json.loads(run("models", "vit_base_patch16_gap_224", "--json").stdout)
    assert pooled["path"] == "direct"
    assert "global_pool='avg'" in pooled["why"]
    (demo,) = json.loads(run("models", "demo", "--json").stdout)
    assert demo["path"] == "closed-form"


def test_models_cuts_no_name_and_says_a_reason_once(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    names = ["a" * 60, "b", "c", "d", "e", "f"]
    why = {"a" * 60: ("closed-form", ""), "b": ("direct", "it pools")}
    found = [listing.Architecture(f"timm:{name}", None) for name in names]
    monkeypatch.setattr(listing, "architectures", lambda pattern: found)
    monkeypatch.setattr(
        listing,
        "describe",
        lambda one: why.get(one.spec.removeprefix("timm:"), ("-", "it is none")),
    )
    printed = run("models", "z*").stdout
    assert printed.count("a") >= 60
    assert "…" in printed, "of many names of one reason some are shown"
    assert "direct, 1: it pools\n    timm:b" in printed
    assert "not supported, 4: it is none\n    timm:c, timm:d, timm:e, …" in printed
    assert len(json.loads(run("models", "z*", "--json").stdout)) == 6


def test_models_without_a_wildcard_or_without_torch(monkeypatch):
    result = run("models", "deit_tiny")
    assert result.exit_code == 2
    assert "'*deit_tiny*' fits 2, such as timm:deit_tiny_" in result.stderr

    monkeypatch.setitem(sys.modules, listing.__name__, None)  # as where torch is not installed
    assert run("models", "deit*").exit_code == 2
    printed = run("models")
    assert printed.exit_code == 0
    assert "demo" in printed.stdout
    assert "[torch]" in printed.stderr


def test_version_and_help():
    assert run("--version").stdout == f"vit-reciprocam {vit_reciprocam.__version__}\n"
    for command in ("explain", "demo", "evaluate", "models"):
        assert command in run("--help").stdout
        assert run(command, "--help").exit_code == 0
    shown = run("explain", "--help").stdout
    for words in ("timm:deit_tiny_patch16_224", "top1 (the default)", "Bright yellow is strong"):
        assert words in shown
    assert "..." not in run("--help").stdout.partition("Commands:")[2], "no summary is cut"


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "vit_reciprocam", "explain", "none.png", "--model", "demo"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert "no such file: none.png" in finished.stderr
