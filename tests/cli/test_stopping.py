"""What stops before a model is loaded, and Ctrl-C."""

import shlex
import signal
import subprocess
import sys
import time

import pytest
import typer
from typer.testing import CliRunner

from vit_reciprocam.cli import app
from vit_reciprocam.cli.console import errors_in_one_line


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.mark.needs_extras
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


@pytest.mark.needs_extras
@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
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


@pytest.mark.needs_extras
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
