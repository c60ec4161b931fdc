"""Pictures explained from the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import vit_reciprocam
from vit_reciprocam.classifier.load import ASSETS
from vit_reciprocam.cli import app
from vit_reciprocam.pictures.scenes import CLASSES, draw_scene
from vit_reciprocam.results.ranges import write_range


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


def test_table_and_json_say_the_range_of_each_map(scenes, tmp_path):
    arguments = (scenes / "0.png", "--target", "top2", "--out", tmp_path / "out")
    report = json.loads(explain_demo(*arguments, "--json").stdout)
    table = explain_demo(*arguments).stdout
    with np.load(tmp_path / "out" / "0" / "maps.npz") as saved:
        scores = saved["scores"][0]
    for target, map_scores in zip(report["images"][0]["targets"], scores, strict=True):
        assert target["lowest"] == float(map_scores.min())
        assert target["highest"] == float(map_scores.max())
        assert (target["unit"], target["reliable"]) == ("probability", True)
        assert write_range(target) in table


@pytest.mark.needs_extras
def test_against_draws_signed_evidence(scenes, tmp_path):
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "w.safetensors")
    arguments = ["--model", "timm:test_vit", "--weights", tmp_path / "w.safetensors"]
    arguments += ["--method", "deep:fast"]
    grids = []
    for more in ([], ["--against"]):
        result = run("explain", scenes / "0.png", *arguments, *more, "--out", tmp_path / "out")
        assert result.exit_code == 0, result.stderr
        with Image.open(tmp_path / "out" / "0" / "grid.png") as grid:
            grids.append(np.asarray(grid).astype(int))
    assert grids[0].shape == grids[1].shape
    legends = [grid[-40:] for grid in grids]
    assert [bool((legend == (0, 90, 181)).all(axis=-1).any()) for legend in legends] == [0, 1]
    assert " nats" in result.stdout


def test_against_is_refused_without_evidence(scenes):
    result = run("explain", scenes / "0.png", "--model", "timm:test_vit", "--against")
    assert result.exit_code == 2
    assert "--against shows signed evidence, which reciprocam does not give" in result.stderr
    assert "fetching" not in result.stderr
    result = explain_demo(scenes / "0.png", "--against")
    assert result.exit_code == 2
    assert "this explanation has none" in result.stderr


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


@pytest.mark.needs_extras
def test_a_table_of_all_classes_is_cut_and_json_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "w.safetensors")
    arguments = ["--model", "timm:test_vit", "--weights", tmp_path / "w.safetensors"]
    arguments += ["--target", "all", "--out", tmp_path / "out"]
    table = run("explain", ASSETS / "demo.png", *arguments).stdout
    assert table.count("%") == 3 * 12  # the probability, and both ends of the map's range
    assert "and 988 less" in table
    report = json.loads(run("explain", ASSETS / "demo.png", *arguments, "--json").stdout)
    assert len(report["images"][0]["targets"]) == 1000


def test_pictures_of_one_name_get_folders_of_their_own(scenes, tmp_path):
    (tmp_path / "more").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "more" / "0.png")
    arguments = (scenes / "0.png", tmp_path / "more" / "0.png", "--json", "--out", tmp_path / "out")
    folders = [record["folder"] for record in json.loads(explain_demo(*arguments).stdout)["images"]]
    assert folders == [str(tmp_path / "out" / name) for name in ("0", "0-2")]


@pytest.mark.needs_extras
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


def test_class_names_are_utf_8_wherever_they_are_read(tmp_path):
    (tmp_path / "names.txt").write_bytes("n01\tpêche\nn02\tりんご\n".encode())
    code = (
        "import sys; from pathlib import Path; from vit_reciprocam.cli.options import read_lines;"
        "print(ascii(read_lines(Path(sys.argv[1]))))"
    )
    # a machine whose own encoding is another one
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", code, str(tmp_path / "names.txt")]
    read = subprocess.run(command, env=os.environ | plain, capture_output=True, text=True)
    assert read.stdout == ascii(["pêche", "りんご"]) + "\n", read.stderr


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
        (
            ["{scene}", "--kernel", "disk"],
            "kernel must be one of 'gaussian', 'dirac', 'box', 'box5'; got 'disk'",
        ),
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
        pytest.param(
            ["{scene}", "--model", "timm:test_vit.nope", "--weights", "w"],
            "no such weights file",
            marks=pytest.mark.needs_extras,
        ),
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


@pytest.mark.needs_extras
def test_a_timm_model_with_local_weights(tmp_path):
    import timm
    from safetensors.torch import save_file

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
        "depth": 1,
        "score": "probability",
        "normalize": "minmax",
    }
    with np.load(tmp_path / "out" / "demo" / "maps.npz") as saved:
        assert saved["maps"].shape == (1, 1, 10, 10)


@pytest.mark.needs_extras
def test_depth_score_and_normalization(tmp_path):
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "w.safetensors")
    model = ["--model", "timm:test_vit", "--weights", tmp_path / "w.safetensors", "--json"]
    model += ["--out", tmp_path / "out"]
    deep = ["--depth", "2", "--kernel", "box", "--normalize", "evidence"]
    result = run("explain", ASSETS / "demo.png", *model, *deep)
    settings = json.loads(result.stdout)["settings"]
    assert (settings["depth"], settings["kernel"], settings["normalize"]) == (2, "box", "evidence")
    with np.load(tmp_path / "out" / "demo" / "maps.npz") as saved:
        evidence = saved["evidence"]
        assert evidence.min() < 0 < evidence.max()
        np.testing.assert_allclose(saved["maps"], evidence.clip(0) / evidence.max(), rtol=1e-6)
    for wrong, message in (
        (["--method", "deep", "--depth", "2"], "--depth: for method reciprocam only, not for deep"),
        (["--score", "softmax"], "score must be one of 'probability', 'log-probability', 'logit'"),
        (["--depth", "7"], "depth=7, but the model has 6 blocks"),
    ):
        result = run("explain", ASSETS / "demo.png", *model, *wrong)
        assert result.exit_code == 2
        assert message in result.stderr
