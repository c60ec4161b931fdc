"""Tables: figures as the protocol has them, intervals as by hand, nothing mixed."""

import inspect

import numpy as np
import pytest
from runs import VARIANTS, columns_for, figures, rows_of, write_default_run, write_run

import vit_reciprocam as vr
from vit_reciprocam.errors import InputError
from vit_reciprocam.evaluate.metrics.protocols import PROTOCOLS
from vit_reciprocam.evaluate.metrics.registry import METRICS, summarize
from vit_reciprocam.evaluate.report import gallery, sheets
from vit_reciprocam.evaluate.report import write as report
from vit_reciprocam.evaluate.report.bootstrap import resample
from vit_reciprocam.evaluate.report.tables import DEFAULTS, read_tables
from vit_reciprocam.evaluate.run import summaries


@pytest.fixture
def run(tmp_path):
    return write_default_run(tmp_path / "run")


# --- figures and intervals ---------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_figures_are_the_protocol_s(tmp_path, protocol):
    random = np.random.default_rng(2)
    columns = {method: figures(random, 23) for method in VARIANTS}
    columns["center"] |= {"insertion": random.random(23), "deletion": random.random(23)}
    path = write_run(tmp_path / "run", columns, protocol=protocol, failed=[4])
    (table,) = read_tables([path], resamples=10)
    found = rows_of(table)
    for summary in summaries(path):
        row = found[summary["method"]]
        assert row.images == summary["images"] == 22
        assert {name: one.value for name, one in row.figures.items()} == pytest.approx(
            {name: value for name, value in summary.items() if name in METRICS}
        )


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_a_resample_is_the_summary_of_the_pictures_drawn(protocol):
    random = np.random.default_rng(3)
    columns = {name: figures(random, 9) for name in ("a", "b")}
    columns["b"] |= {"insertion": random.random(9), "deletion": random.random(9)}
    columns["b"]["mass_accuracy"] = np.where(np.arange(9) < 6, random.random(9), np.nan)
    found = resample(columns, protocol, resamples=70, seed=5)
    draws = np.random.default_rng(5)
    for number in range(71):
        drawn = draws.integers(9, size=9) if number else np.arange(9)
        for place, each in enumerate(columns.values()):
            expected = summarize({name: v[drawn] for name, v in each.items()}, protocol)
            for name, values in found.values.items():
                value = values[number, place]
                assert value == pytest.approx(expected.get(name, np.nan), nan_ok=True)


def test_intervals_known_by_hand():
    columns = figures(np.random.default_rng(0), 2)
    columns |= {"coherency": np.full(2, 0.3), "deletion": np.array([0.0, 1.0])}
    found = resample({"a": columns}, PROTOCOLS["byun2023"]).figures("a")
    assert (found["coherency"].low, found["coherency"].high) == pytest.approx((30, 30))
    # a quarter of the draws of two are (0, 0), a quarter (1, 1)
    one = found["deletion"]
    assert (one.low, one.value, one.high) == (0, 50, 100)
    assert "insertion" not in found


def test_many_pictures_give_the_interval_of_the_mean():
    columns = figures(np.random.default_rng(0), 4000)
    one = resample({"a": columns}, PROTOCOLS["byun2023"]).figures("a")["coherency"]
    error = 100 * columns["coherency"].std() / np.sqrt(4000)
    assert one.high - one.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert (one.high + one.low) / 2 == pytest.approx(one.value, abs=0.2 * error)


def test_paired_differences():
    a = figures(np.random.default_rng(0), 30)
    shifted = a | {"complexity": a["complexity"] / 2 + 0.02, "coherency": a["coherency"] - 0.04}
    found = resample({"a": a, "same": dict(a), "b": shifted}, PROTOCOLS["byun2023"])
    for one in found.differences("same", "a").values():
        assert (one.low, one.value, one.high) == (0, 0, 0)
        assert not one.is_clear
    one = found.differences("b", "a")["coherency"]  # the same of every picture
    assert (one.low, one.value, one.high) == pytest.approx((-4, -4, -4))
    assert one.is_clear
    own = found.figures("b")["coherency"]
    assert own.high - own.low > 10


# --- which is compared with which --------------------------------------------------------------


def test_the_defaults_are_reciprocam_s():
    parameters = inspect.signature(vr.ReciproCAM).parameters
    assert {name: parameters[name].default for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(
    ("methods", "reference"),
    [
        (["rollout", "reciprocam"], "reciprocam"),
        (["reciprocam:kernel=dirac", "reciprocam:kernel=gaussian"], "reciprocam:kernel=gaussian"),
        (["rollout", "reciprocam:path=direct"], "reciprocam:path=direct"),
        (["reciprocam:kernel=dirac", "reciprocam:block=-2"], "reciprocam:kernel=dirac"),
        (["center", "rollout", "relevance"], "rollout"),
        (["center", "random"], "center"),
    ],
)
def test_the_reference_method(tmp_path, methods, reference):
    random = np.random.default_rng(0)
    path = write_run(tmp_path / "run", {method: figures(random, 5) for method in methods})
    (table,) = read_tables([path], resamples=5)
    assert table.models[0].reference == reference
    for method, row in rows_of(table).items():
        assert bool(row.differences) == (method != reference)


def test_best_is_marked_where_it_is_clear_and_never_on_a_null_baseline(tmp_path):
    base = figures(np.random.default_rng(0), 50)
    low = base | {"coherency": base["coherency"] * 0.5}
    high = base | {"coherency": base["coherency"] * 0.5 + 0.49}
    path = write_run(
        tmp_path / "run", {"reciprocam": base, "rollout": low, "relevance": base, "center": high}
    )
    (table,) = read_tables([path])
    assert [row.method for row in table.models[0].rows][-1] == "center"
    best = {method: row.best for method, row in rows_of(table).items()}
    assert best["center"] == best["rollout"] == frozenset()
    # two alike are both best; of the other metrics all are alike, so that none is
    assert best["reciprocam"] == best["relevance"] == {"coherency", "adcc"}
    sentences = " ".join(sheets.findings(table))
    assert "center, which never looks at the picture, has the highest Coher: " in sentences
    assert "Drop" not in sentences  # the same there


def test_a_null_baseline_that_beats_some_methods_is_named(tmp_path):
    base = figures(np.random.default_rng(0), 20)
    worse = base | {"complexity": base["complexity"] * 0.5 + 0.49}
    between = base | {"complexity": base["complexity"] * 0.9 + 0.09}
    path = write_run(tmp_path / "run", {"reciprocam": base, "rollout": worse, "random": between})
    (table,) = read_tables([path], resamples=5)
    assert any(
        "On Compl random" in one and "1 of 2 methods: rollout." in one
        for one in sheets.findings(table)
    )


def test_ablations_change_one_setting(run):
    (table,) = read_tables([run])
    found = {(one.setting, one.variant.method): one for one in sheets.ablations(table.models[0])}
    assert set(found) == {
        ("kernel", "reciprocam:kernel=dirac"),
        ("class_token", "reciprocam:class_token=false"),
    }
    rows = rows_of(table)
    one = found["class_token", "reciprocam:class_token=false"]
    assert one.base is rows["reciprocam"]
    for name, change in one.differences.items():
        change_by_hand = one.variant.figures[name].value - one.base.figures[name].value
        assert change.value == pytest.approx(change_by_hand)
    assert [sheet.title for sheet in sheets.ablation_sheets(table)] == [
        "Class token (the paper's Table 3)",
        "Kernel",
    ]


# --- several runs ------------------------------------------------------------------------------


def test_runs_measured_alike_share_a_table(tmp_path):
    first = write_run(tmp_path / "a", columns_for("reciprocam"))
    second = write_run(tmp_path / "b", columns_for("rollout", "center"))
    other = write_run(tmp_path / "c", columns_for("reciprocam"), model="timm:test_vit")
    (table,) = read_tables([first, second, other, first], resamples=5)
    assert [model.model for model in table.models] == ["demo", "timm:test_vit"]
    assert list(rows_of(table)) == ["reciprocam", "rollout", "center"]
    assert rows_of(table)["rollout"].differences


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"protocol": "poppi2021"}, "its protocol is poppi2021"),
        ({"data": "e"}, "its data set differs"),
        ({"weights": "v" * 64}, "other weights"),
        ({"digests": ["other"] * 6}, "other pixels"),
    ],
)
def test_runs_measured_otherwise_stand_apart(tmp_path, changes, words):
    first = write_run(tmp_path / "a", columns_for("reciprocam"))
    second = write_run(tmp_path / "b", columns_for("rollout"), **changes)
    tables = read_tables([first, second], resamples=5)
    assert [list(rows_of(table)) for table in tables] == [["reciprocam"], ["rollout"]]
    assert words in tables[1].apart
    page = report.render_page(tables)
    assert "there are 2 tables" in page
    assert words in page


def test_the_same_method_twice_is_not_mixed(tmp_path):
    paths = [write_run(tmp_path / name, columns_for("reciprocam")) for name in "ab"]
    tables = read_tables(paths, resamples=5)
    assert len(tables) == 2
    assert "has reciprocam of demo already" in tables[1].apart


def test_runs_that_are_not_finished_and_pictures_that_failed(tmp_path):
    whole = write_run(tmp_path / "a", columns_for("reciprocam"), failed=[1])
    part = columns_for("rollout")
    half = write_run(tmp_path / "b", part, failed=[2], finished=False)
    (table,) = read_tables([whole, half], resamples=5)
    (model,) = table.models
    text = " ".join(report.notes(table))
    assert "b is not finished: 6 of 6 pictures" in text
    assert "1 picture(s) failed with demo in" in text
    assert "over the 4 pictures that every method" in text
    assert "1 others are left out" in text
    assert model.paired.pictures == 4
    assert {row.images for row in model.rows} == {5}
    both = [0, 3, 4, 5]
    expected = {
        name: summarize({k: v[both] for k, v in columns.items()}, PROTOCOLS["byun2023"])
        for name, columns in {**columns_for("reciprocam"), "rollout": part["rollout"]}.items()
    }
    difference = rows_of(table)["rollout"].differences["adcc"].value
    assert difference == pytest.approx(expected["rollout"]["adcc"] - expected["reciprocam"]["adcc"])
    shown = {name for names in gallery.choose(model).values() for name in names}
    assert shown == set(both)


def test_no_picture_in_common(tmp_path):
    first = write_run(tmp_path / "a", columns_for("reciprocam"), failed=[0, 1, 2])
    second = write_run(tmp_path / "b", columns_for("rollout"), failed=[3, 4, 5])
    (table,) = read_tables([first, second], resamples=5)
    assert not any(row.differences or row.best for row in table.models[0].rows)
    assert "no differences" in " ".join(report.notes(table))
    assert "ablation.md" not in report.make_report([table])


def test_what_cannot_be_reported(tmp_path):
    with pytest.raises(InputError, match="is not a run of vit-reciprocam evaluate"):
        read_tables([tmp_path])
    path = write_run(tmp_path / "run", columns_for("reciprocam", pictures=2), failed=[0, 1])
    with pytest.raises(InputError, match="no picture was measured"):
        read_tables([path])
    with pytest.raises(InputError, match="resamples must be 1 or more"):
        read_tables([path], resamples=0)
