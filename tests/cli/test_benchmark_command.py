"""Benchmarks from the command line."""

import csv
import json
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

from vit_reciprocam.cli import app

pytestmark = pytest.mark.needs_extras

SMALL = "timm:test_vit"
FIXED = [
    "forward",
    "reciprocam",
    "reciprocam, all scores",
    "reciprocam, all maps",
    "naive H",
]


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
