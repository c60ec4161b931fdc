"""The environment report, `vit-reciprocam --version --json`."""

import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import onnxruntime
import pytest
from typer.testing import CliRunner

from vit_reciprocam.cli import app
from vit_reciprocam.results.files import library_versions


def run(*arguments):
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def report():
    return json.loads(run("--version", "--json").stdout)


def in_a_new_process(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_report_says_what_is_installed():
    found = report()
    assert found["vit-reciprocam"] == version("vit-reciprocam")
    assert found["python"].startswith(platform.python_version())
    assert found["libraries"] == library_versions()
    assert found["onnxruntime"]["version"] == onnxruntime.__version__
    assert found["onnxruntime"]["providers"] == onnxruntime.get_available_providers()
    assert run("--json", "--version").stdout == run("--version", "--json").stdout


def test_the_report_names_no_user_and_no_path():
    text = run("--version", "--json").stdout
    assert str(Path.home()) not in text
    assert sys.prefix not in text


@pytest.mark.needs_extras
def test_the_report_says_what_torch_can_use():
    import torch

    found = report()["torch"]
    assert found["version"] == torch.__version__
    assert found["cuda"] == torch.version.cuda
    assert found["cuda_available"] == torch.cuda.is_available()
    assert len(found["gpus"]) == torch.cuda.device_count()


def test_torch_is_not_imported_to_say_the_version_or_that_it_is_absent():
    code = (
        "import importlib.util, sys\n"
        "from typer.testing import CliRunner\n"
        "from vit_reciprocam.cli import app\n"
        "CliRunner().invoke(app, ['--version'], catch_exceptions=False)\n"
        "assert 'vit_reciprocam.cli.environment' not in sys.modules\n"
        "from vit_reciprocam.cli import environment\n"
        "environment.find_spec = lambda name: None\n"
        "assert environment.report_environment()['torch'] is None\n"
        "print('torch' in sys.modules)"
    )
    assert in_a_new_process(code) == "False\n"


def test_a_broken_library_is_reported(monkeypatch):
    monkeypatch.setattr("vit_reciprocam.cli.environment.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "torch", None)  # what importing it raises then
    assert report()["torch"]["error"].startswith("ModuleNotFoundError: import of torch halted")


@pytest.mark.parametrize("arguments", [["--json"], ["--json", "demo"]])
def test_json_before_a_command_is_refused(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "vit-reciprocam --version --json" in result.stderr
    assert result.stdout == ""
