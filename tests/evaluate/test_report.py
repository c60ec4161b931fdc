"""The command `report`, from run folders to files."""

import json
import subprocess
import sys

import pytest
from runs import VARIANTS, rows_of, write_default_run
from typer.testing import CliRunner

from vit_reciprocam.cli import app
from vit_reciprocam.evaluate.report.tables import read_tables


@pytest.fixture
def run(tmp_path):
    return write_default_run(tmp_path / "run")


def test_the_command(run, tmp_path):
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["report", str(run), "--out", str(out), "--resamples", "20"])
    assert result.exit_code == 0, result.output
    assert "| Method | Drop ↓" in result.stdout
    assert str(out / "report.html") in result.stdout.replace("\n", "")
    names = {f"{stem}.{end}" for stem in ("table1", "ablation") for end in ("md", "tex", "csv")}
    assert {path.name for path in out.iterdir()} == names | {"report.html", "manifest.json"}
    result = CliRunner().invoke(app, ["report", str(run), "--out", str(out), "--json"])
    found = json.loads(result.stdout)
    assert set(found["files"]) == names | {"report.html"}
    (table,) = found["tables"]
    (model,) = table["models"]
    assert {row["method"] for row in model["rows"]} == set(VARIANTS)
    (expected,) = read_tables([run])
    for row in model["rows"]:
        one = rows_of(expected)[row["method"]].figures["adcc"]
        assert row["figures"]["adcc"] == {"value": one.value, "low": one.low, "high": one.high}


def test_the_command_on_a_real_run(tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    evaluated = ["evaluate", "scenes:5", "--model", "demo", "--out", str(run)]
    assert CliRunner().invoke(app, evaluated).exit_code == 0
    result = CliRunner().invoke(app, ["report", str(run), "--out", str(out)])
    assert result.exit_code == 0, result.output
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "scene 800000" in page
    assert "cannot be shown" not in page  # drawn again, pixel by pixel the same


def test_a_report_needs_no_torch(run, tmp_path):
    code = (
        "import sys, pathlib; from vit_reciprocam.evaluate.report.write import write_report;"
        f"write_report([{str(run)!r}], pathlib.Path({str(tmp_path)!r}) / 'out', resamples=5);"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


def test_the_command_s_exit_codes(run, tmp_path):
    def invoke(*arguments):
        result = CliRunner().invoke(app, ["report", *map(str, arguments)])
        return result.exit_code, " ".join(result.output.split())

    code, text = invoke(tmp_path / "none", "--out", tmp_path / "out")
    assert code == 2
    assert "is not a run of vit-reciprocam evaluate" in text
    assert not (tmp_path / "out").exists()
    before = {path: path.read_bytes() for path in run.iterdir()}
    code, text = invoke(run, "--out", run)
    assert code == 2
    assert "is a run: write the report to another folder" in text
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "table1.md").write_text("mine")
    code, text = invoke(run, "--out", tmp_path / "mine")
    assert code == 2
    assert "was not written by vit-reciprocam" in text
    about = run / "run.json"
    about.write_text(about.read_text().replace('"format": 1', '"format": 7'))
    code, text = invoke(run, "--out", tmp_path / "out")
    assert code == 2
    assert "written in format 7, this version reads 1" in text
