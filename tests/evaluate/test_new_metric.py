"""A metric that is registered in one place is measured, stored, summarized and reported."""

import csv
import io

import numpy as np
import pytest
from runs import EXPECTED, OLD_RUN, estimates

import vit_reciprocam as vr
from vit_reciprocam.errors import InputError
from vit_reciprocam.evaluate.metrics.registry import METRICS, Metric
from vit_reciprocam.evaluate.report.tables import read_tables
from vit_reciprocam.evaluate.report.write import make_report
from vit_reciprocam.evaluate.run import evaluate, summaries
from vit_reciprocam.evaluate.store import read_run, schema

# The toy: the share of cells above a half. Everything about it stands in this record.
BULK = Metric(
    "bulk",
    "Bulk",
    higher=False,
    kind="map",
    compute=lambda seen: (seen.maps > 0.5).mean(axis=(1, 2)),
    description="share of cells above 1/2",
    source="this test",
)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(METRICS, BULK.column, BULK)


@pytest.fixture
def run(registered, tmp_path):
    methods = ["reciprocam", "center"]
    evaluate("scenes:6", [vr.load("demo")], methods, out=tmp_path / "run", batch_size=4)
    return tmp_path / "run"


def values(run, method):
    """The toy's value of each picture, from the stored maps."""
    rows = [row for row in read_run(run)[1].to_pylist() if row["method"] == method]
    assert len(rows) == 6
    return np.array([np.mean(np.array(row["map"]) > 0.5) for row in rows])


def test_it_is_in_records_and_summaries(run):
    settings, table = read_run(run)
    assert "bulk" in schema().names
    for method in settings["methods"]:
        stored = [row["bulk"] for row in table.to_pylist() if row["method"] == method]
        assert stored == pytest.approx(values(run, method))
    for row in summaries(run):
        assert row["bulk"] == pytest.approx(100 * values(run, row["method"]).mean())


def test_it_has_an_interval_and_a_paired_difference(run):
    (table,) = read_tables([run], resamples=200)
    assert table.metrics[-1] == "bulk"
    ours, null = table.models[0].rows
    for row in (ours, null):
        one = row.figures["bulk"]
        assert one.value == pytest.approx(100 * values(run, row.method).mean())
    one = ours.figures["bulk"]
    assert one.low < one.value < one.high
    # the map in the middle is the same for every picture
    one = null.figures["bulk"]
    assert (one.low, one.high) == pytest.approx((one.value, one.value))
    one = null.differences["bulk"]
    change = values(run, "center") - values(run, "reciprocam")
    assert one.value == pytest.approx(100 * change.mean())
    assert one.low < one.value < one.high


def test_it_is_in_every_file_of_the_report(run):
    tables = read_tables([run], resamples=20)
    files = {name: content.decode() for name, content in make_report(tables).items()}
    assert "| Bulk ↓ |" in files["table1.md"]
    assert r"Bulk $\downarrow$" in files["table1.tex"]
    assert files["report.html"].count("Bulk ↓") == 2  # figures and differences
    for line in csv.DictReader(io.StringIO(files["table1.csv"])):
        assert float(line["bulk"]) == pytest.approx(100 * values(run, line["method"]).mean())
        assert float(line["bulk_low"]) <= float(line["bulk"]) <= float(line["bulk_high"])
        assert bool(line["bulk_difference"]) == (line["method"] == "center")


def test_a_run_without_it_reads_and_lacks_it(registered):
    for row, expected in zip(summaries(OLD_RUN), EXPECTED["summaries"], strict=True):
        assert list(row) == list(expected)
    (table,) = read_tables([OLD_RUN], resamples=50)
    assert "bulk" not in table.metrics
    for row in table.models[0].rows:
        wanted = EXPECTED["rows"][row.method]["figures"]
        found = estimates(row.figures)
        assert list(found) == list(wanted)
        for name, one in found.items():
            assert one == pytest.approx(wanted[name], rel=1e-9, abs=1e-9)


def test_a_run_with_it_reads_where_it_is_not_known(run, monkeypatch):
    before = summaries(run)
    monkeypatch.delitem(METRICS, "bulk")
    assert set(read_run(run)[1].column_names) == set(schema().names)
    assert "bulk" not in schema().names
    for row in before:
        del row["bulk"]
    assert summaries(run) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "nonsense"}, "kind of metric must be one of 'adcc', 'map', 'order', 'location'"),
        ({"aggregate": "median"}, "aggregate of metric must be one of 'mean', 'means', 'protocol'"),
    ],
)
def test_a_record_that_makes_no_sense_is_refused(change, words):
    about = {"higher": True, "kind": "map", "description": "", "source": ""} | change
    with pytest.raises(InputError, match=words):
        Metric("bulk", "Bulk", compute=BULK.compute, **about)
