"""The demo, and the command itself."""

import json
import subprocess
import sys

from PIL import Image
from typer.testing import CliRunner

import vit_reciprocam
from vit_reciprocam.classifier.load import ASSETS
from vit_reciprocam.cli import app


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


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
