"""Run folders that earlier versions wrote are read with the figures that those versions gave."""

import shutil

import pytest
from runs import EXPECTED, OLD_RUN, estimates

from vit_reciprocam.errors import InputError
from vit_reciprocam.evaluate.report.tables import read_tables
from vit_reciprocam.evaluate.run import summaries


def test_an_old_run_has_its_old_summaries():
    found = summaries(OLD_RUN)
    assert len(found) == len(EXPECTED["summaries"]) == 3
    for row, expected in zip(found, EXPECTED["summaries"], strict=True):
        assert list(row) == list(expected)
        for name, value in expected.items():
            number = isinstance(value, (int, float))
            assert row[name] == (pytest.approx(value, rel=1e-12) if number else value), name


def test_an_old_run_has_its_old_figures_intervals_and_differences():
    (table,) = read_tables([OLD_RUN], resamples=50)
    rows = table.models[0].rows
    assert {row.method for row in rows} == set(EXPECTED["rows"])
    for row in rows:
        expected = EXPECTED["rows"][row.method]
        for found, wanted in (
            (row.figures, expected["figures"]),
            (row.differences, expected["differences"]),
        ):
            assert list(found) == list(wanted)
            for name, one in estimates(found).items():
                assert one == pytest.approx(wanted[name], rel=1e-9, abs=1e-9), name


def test_a_run_of_another_format_is_refused_with_both_versions_named(tmp_path):
    folder = shutil.copytree(OLD_RUN, tmp_path / "run")
    about = folder / "run.json"
    about.write_text(about.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(InputError, match="written in format 2, this version reads 1"):
        summaries(folder)
