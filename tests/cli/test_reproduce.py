"""The paper's tables and figures as presets."""

import inspect
import json

import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

from vit_reciprocam.cli import app, reproduce
from vit_reciprocam.evaluate.store import read_run
from vit_reciprocam.pictures.scenes import draw_scene

SPEC = "timm:test_vit"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save(timm.create_model("test_vit").state_dict(), path)
    return path


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(2):
        draw_scene(number).image.save(folder / f"{number}.png")
    (folder / "labels.csv").write_text("image,label\n0.png,7\n1.png,8\n")
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["reproduce", *map(str, arguments)])


@pytest.mark.parametrize(
    ("table", "methods"),
    [
        (
            "table3",
            {
                "reciprocam:kernel=dirac",
                "reciprocam:class_token=false,kernel=dirac",
                "reciprocam:kernel=gaussian",
                "reciprocam:class_token=false,kernel=gaussian",
            },
        ),
        (
            "table4",
            {
                "reciprocam:kernel=dirac",
                "reciprocam:kernel=dirac,layer=block",
                "reciprocam:kernel=gaussian",
                "reciprocam:kernel=gaussian,layer=block",
                "uniform",
            },
        ),
    ],
)
def test_tables(table, methods, weights, data, tmp_path):
    options = ["--data", data, "--model", SPEC, "--weights", weights, "--out", tmp_path / "out"]
    if table == "table4":
        options += ["--method", "uniform"]
    result = run(table, *options)
    assert result.exit_code == 0, result.output
    settings, rows = read_run(tmp_path / "out" / table / "run")
    assert set(settings["methods"]) == methods
    assert settings["protocol"]["name"] == "byun2023"
    assert rows.num_rows == 2 * len(methods)
    ablation = (tmp_path / "out" / table / "report" / "ablation.md").read_text()
    assert "class_token" in ablation or "layer" in ablation
    assert run(table, *options).exit_code == 2  # it is there already
    assert run(table, *options, "--resume").exit_code == 0


def test_a_failing_picture_does_not_cost_the_report(weights, data, tmp_path):
    with (data / "labels.csv").open("a") as listing:
        listing.write("gone.png,1\n")
    options = ["--data", data, "--model", SPEC, "--weights", weights, "--out", tmp_path / "out"]
    result = run("table3", *options)
    assert result.exit_code == 1
    assert "no such file" in result.output
    assert (tmp_path / "out" / "table3" / "report" / "report.html").exists()


def test_figures(weights, data, tmp_path):
    (data / "labels.csv").unlink()
    for folder in ("a", "b"):  # pictures of one name in class folders
        (data / folder).mkdir()
        draw_scene(2).image.save(data / folder / "0.png")
    (data / "b" / "broken.png").write_bytes(b"no picture")
    options = ["--data", data, "--model", SPEC, "--weights", weights, "--out", tmp_path / "out"]
    result = run("figures", *options, "--method", "rollout")
    assert result.exit_code == 1, result.output
    assert "broken.png is not a picture" in result.output
    folder = tmp_path / "out" / "figures"
    manifest = json.loads((folder / "manifest.json").read_text())
    names = [f"timm-test_vit-{name}.png" for name in ("0", "1", "a-0", "b-0")]
    assert manifest["files"] == names
    with Image.open(folder / names[0]) as drawn:
        assert drawn.width > 2 * drawn.height  # the picture and four methods, for two classes


def test_table2_is_the_benchmark(monkeypatch, weights):
    signature, calls = inspect.signature(reproduce.benchmark_command), []
    monkeypatch.setattr(reproduce, "benchmark_command", lambda **given: calls.append(given))
    assert (
        run("table2", "--model", SPEC, "--weights", weights, "--method", "rollout").exit_code == 0
    )
    (given,) = calls
    signature.bind(**given)
    assert given["method"] == ["relevance", "rollout"]
    assert given["model"] == [SPEC]


def test_the_paper_s_models_and_methods():
    assert [name.split("_")[1] for name in reproduce.MODELS] == ["tiny", "small", "base"]
    assert {"reciprocam", "reciprocam:kernel=dirac", "relevance"} < set(
        reproduce.TABLE_METHODS["table1"]
    )


def test_options_that_are_missing_or_without_use():
    result = run("table1", "--model", SPEC)
    assert result.exit_code == 2
    assert "table1 needs pictures: give --data" in result.output
    result = run("table2", "--data", "somewhere", "--limit", 1)
    assert result.exit_code == 2
    assert "table2 takes no --data, --limit" in result.output
