"""Reports: figures as the protocol has them, intervals as by hand, nothing mixed."""

import base64
import csv
import hashlib
import inspect
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import vit_reciprocam as vr
from vit_reciprocam.cli import app
from vit_reciprocam.errors import InputError
from vit_reciprocam.evaluate.data.datasets import Item
from vit_reciprocam.evaluate.metrics.measure import summarize
from vit_reciprocam.evaluate.metrics.protocols import PROTOCOLS
from vit_reciprocam.evaluate.metrics.registry import METRICS
from vit_reciprocam.evaluate.report import formats, gallery, sheets
from vit_reciprocam.evaluate.report import write as report
from vit_reciprocam.evaluate.report.bootstrap import resample
from vit_reciprocam.evaluate.report.tables import DEFAULTS, read_tables
from vit_reciprocam.evaluate.run import summaries
from vit_reciprocam.evaluate.store import RunFolder
from vit_reciprocam.methods import MethodSpec
from vit_reciprocam.pictures.preprocess import Preprocess

VARIANTS = ["reciprocam", "reciprocam:kernel=dirac", "reciprocam:class_token=false", "center"]


def digest(picture):
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()


SCENE = digest(Item(0, "scene 800000").read())  # every picture is this one unless it says else


def figures(random, pictures):
    """One method's columns, in fractions: what a picture's record must have."""
    p, o, coherency, complexity = random.uniform(0.05, 0.95, size=(4, pictures))
    drop = np.maximum(0, p - o) / p
    return {
        "p": p,
        "o": o,
        "drop": drop,
        "increase": (o > p).astype(float),
        "coherency": coherency,
        "complexity": complexity,
        "adcc": 3 / (1 / coherency + 1 / (1 - complexity) + 1 / (1 - drop)),
    }


def write_run(
    path,
    columns,
    *,
    model="demo",
    protocol="byun2023",
    sources=None,
    failed=(),
    finished=True,
    data="d",
    weights="w" * 64,
    versions=None,
    digests=None,
    seed=0,
):
    """A run's folder with the given columns for each method, maps drawn at random."""
    random = np.random.default_rng(seed)
    pictures = len(next(iter(columns.values()))["drop"])
    sources = sources or ["scene 800000"] * pictures
    settings = {
        "protocol": PROTOCOLS[protocol].to_dict(),
        "insertion": False,
        "data": {"name": f"data/{data}", "digest": data * 32, "pictures": pictures},
        "models": {model: {"weights": weights, "preprocess": Preprocess((112, 112)).to_dict()}},
        "methods": {
            method: {"method": MethodSpec.parse(method).name, **MethodSpec.parse(method).settings}
            for method in columns
        },
        "versions": versions or {"vit-reciprocam": "0.1.0", "numpy": "2"},
    }
    records = [
        {
            "index": index,
            "source": sources[index],
            "digest": digests[index] if digests else SCENE,
            "model": model,
            "method": method,
            "label": 3,
            "target": 3,
            "predicted": 4,
            "map": random.random(49).tolist(),
            "rows": 7,
            **{
                name: None if np.isnan(values[index]) else float(values[index])
                for name, values in each.items()
            },
        }
        for method, each in columns.items()
        for index in range(pictures)
        if index not in failed
    ]
    records += [
        {"index": index, "source": "gone", "model": model, "method": method, "error": "it is gone"}
        for method in columns
        for index in failed
    ]
    with RunFolder.open(path, settings) as run:
        run.write(records)
        if finished:
            run.finish({"duplicates": 0})
    return path


@pytest.fixture
def run(tmp_path):
    """Four methods, 40 pictures, insertion and deletion, and objects known of half."""
    random = np.random.default_rng(1)
    columns = {method: figures(random, 40) for method in VARIANTS}
    known = random.random(40) < 0.5
    for each in columns.values():
        each |= {"insertion": random.random(40), "deletion": random.random(40)}
        each["pointing_game"] = np.where(known, random.integers(2, size=40), np.nan)
    return write_run(tmp_path / "run", columns)


def rows_of(table):
    return {row.method: row for row in table.models[0].rows}


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


def columns_for(*methods, pictures=6):
    random = np.random.default_rng(0)
    return {method: figures(random, pictures) for method in methods}


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
        ({"data": "e"}, "its data set is another"),
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
    shown = {name for names in gallery.choose(table, model).values() for name in names}
    assert shown == set(both)


def test_no_picture_in_common(tmp_path):
    first = write_run(tmp_path / "a", columns_for("reciprocam"), failed=[0, 1, 2])
    second = write_run(tmp_path / "b", columns_for("rollout"), failed=[3, 4, 5])
    (table,) = read_tables([first, second], resamples=5)
    assert not any(row.differences or row.best for row in table.models[0].rows)
    assert "no differences" in " ".join(report.notes(table))
    assert "ablation.md" not in report.make_report([table])


def test_what_cannot_be_reported(tmp_path):
    with pytest.raises(InputError, match="is no run of vit-reciprocam evaluate"):
        read_tables([tmp_path])
    path = write_run(tmp_path / "run", columns_for("reciprocam", pictures=2), failed=[0, 1])
    with pytest.raises(InputError, match="no picture was measured"):
        read_tables([path])
    with pytest.raises(InputError, match="resamples must be 1 or more"):
        read_tables([path], resamples=0)


# --- files -------------------------------------------------------------------------------------

NASTY = r"my_50%&#$~^\{model}|<script>alert(1)</script>"


def test_csv_reads_back_as_the_figures(run):
    tables = read_tables([run], resamples=20)
    read = list(csv.DictReader(io.StringIO(formats.figures_csv(tables))))
    assert len(read) == 4
    for line in read:
        row = rows_of(tables[0])[line["method"]]
        assert line["null_baseline"] == str(row.method == "center").lower()
        assert (line["protocol"], line["weights"]) == ("byun2023", "w" * 64)
        assert line["versions"] == "vit-reciprocam=0.1.0 numpy=2"
        for kind, estimates in (("", row.figures), ("_difference", row.differences)):
            for name in METRICS:
                text = [line.get(f"{name}{kind}{end}", "") for end in ("", "_low", "_high")]
                one = estimates.get(name)
                expected = (one.value, one.low, one.high) if one else None
                assert (tuple(map(float, text)) if any(text) else None) == expected
    read = list(csv.DictReader(io.StringIO(formats.ablation_csv(tables))))
    assert [line["setting"] for line in read] == ["kernel", "class_token"]
    for line in read:
        change = float(line["adcc"]) - float(line["adcc_reference"])
        assert float(line["adcc_difference"]) == pytest.approx(change)


def test_numbers():
    assert formats.number(-0.001, False) == formats.number(-0.004, True) == "0.00"
    assert formats.number(-1.239, True) == "−1.24"
    assert formats.number(2, True) == "+2.00"


def test_latex_is_balanced_and_escaped(tmp_path):
    columns = columns_for("reciprocam", "reciprocam:class_token=false", "center")
    path = write_run(tmp_path / "run", columns, model=NASTY, data="a\n\\end{document}%")
    (table,) = read_tables([path], resamples=5)
    content = report.make_report([table])
    for name in ("table1.tex", "ablation.tex"):
        lines = content[name].decode().splitlines()
        assert lines[1].startswith("\\providecommand")
        text = "\n".join(line for line in lines[2:] if not line.startswith("%"))
        assert "\\end{document}" not in text
        bare = re.sub(r"\\[{}&%$#_\\]", "", text)  # what is left of these means something
        assert not re.search(r"[#~_^]", bare.replace("$-$", ""))
        assert bare.count("{") == bare.count("}")
        assert bare.count("$") % 2 == 0
        assert text.count("\\begin{") == text.count("\\end{")
        for line in text.splitlines():
            if line.endswith(r"\\") and "multicolumn" not in line:
                assert len(re.findall(r"(?<!\\)&", line)) == 5
            assert not re.search(r"(?<!\\)%(?!$)", line)
    assert r"my\_50\%\&\#\$\textasciitilde{}\textasciicircum{}\textbackslash{}\{model\}" in text
    assert "w" * 64 in content["table1.tex"].decode()


def test_markdown_has_whole_rows_and_its_provenance(tmp_path):
    path = write_run(tmp_path / "run", columns_for("reciprocam", "center"), model=NASTY)
    (table,) = read_tables([path], resamples=5)
    text = report.make_report([table])["table1.md"].decode()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {7}
    assert "| Method | Drop ↓ | Inc ↑ | Coher ↑ | Compl ↓ | ADCC ↑ |" in lines
    assert r"\<script\>" in text
    assert "<script>" not in text.replace(r"\<script\>", "")
    for words in (
        "Protocol byun2023",
        "(weights wwwwwwwwwwww)",
        "(digest dddddddddddd)",
        "numpy 2",
    ):
        assert text.count(words) == 2 + (words == "Protocol byun2023")


VOID = {"meta", "img", "br", "wbr"}


class Page(HTMLParser):
    """Tags opened and closed in order, and what they say."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "defs"} & set(self.open):
            self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def test_the_page_is_whole_and_needs_nothing_else(run):
    tables = read_tables([run], resamples=20)
    text = report.render_page(tables)
    page = Page(text)
    assert "http" not in text
    assert "@import" not in text
    assert not page.all("script")
    assert not page.all("link")
    assert len(page.ids) == len(set(page.ids))
    for _, attrs in page.tags:
        assert attrs.get("src", "data:image/jpeg;").startswith("data:image/jpeg;")
        link = attrs.get("href", "#")
        assert link == "#" or link[1:] in page.ids
    images = page.all("img")
    assert len(images) == 3 * 4 * 5  # best, worst, most disputed; the picture and four methods
    assert all(attrs["alt"] for attrs in images)
    assert len(page.all("caption")) == len(page.all("table")) == 4
    assert all(attrs["scope"] for attrs in page.all("th"))
    assert len(page.all("svg")) == 5
    for row in rows_of(tables[0]).values():
        for one in row.figures.values():
            assert formats.number(one.value, False) in page.text
    for words in ("Protocol byun2023", "w" * 64, "d" * 32, "numpy 2"):
        assert words in page.text
    assert text == report.render_page(read_tables([run], resamples=20))


def test_names_are_shown_and_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "<script>alert(2)</script>.png"
    Path("<script>alert(2)<").mkdir()
    picture = Image.new("RGB", (40, 30), "orange")
    picture.save(name)
    path = write_run(
        tmp_path / "run",
        columns_for("reciprocam", "rollout", pictures=1),
        model=NASTY,
        sources=[name],
        digests=[digest(picture)],
    )
    text = report.render_page(read_tables([path], resamples=5))
    page = Page(text)
    assert not page.all("script")
    assert NASTY in page.text
    assert "script>.png" in page.text


def decoded(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_a_picture_is_as_the_model_saw_it_and_gone_ones_are_grey(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gradient = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (90, 1))).convert("RGB")
    for name in ("here.png", "changed.png"):
        gradient.save(name)
    path = write_run(
        tmp_path / "run",
        columns_for("reciprocam", pictures=3),
        sources=["here.png", "changed.png", "gone.png"],
        digests=[digest(gradient), "another", digest(gradient)],
    )
    (table,) = read_tables([path], resamples=5)
    (section,) = gallery.sections(table, table.models[0])
    shown = {one.name: one for one in section.pictures}
    squashed = gradient.resize((128, 128), Image.Resampling.BILINEAR).crop((8, 8, 120, 120))
    seen = decoded(shown["here.png"].uri).convert("RGB")
    assert np.abs(np.asarray(seen, float) - np.asarray(squashed)).mean() < 2
    assert not shown["here.png"].problem
    assert "is not the picture that was measured" in shown["changed.png"].problem
    assert "no such file: gone.png" in shown["gone.png"].problem
    for name in ("changed.png", "gone.png"):
        assert np.ptp(decoded(shown[name].overlays[0].uri), axis=(0, 1)).tolist() == [0, 0, 0]
    assert report.render_page([table]).count("The picture cannot be shown") == 2
    assert shown["here.png"].words == "Explained: class 3, probability " + (
        f"{100 * columns_for('reciprocam', pictures=3)['reciprocam']['p'][0]:.1f} %; "
        "predicted: class 4."
    )


def test_class_names_are_shown_where_the_run_has_them(tmp_path):
    path = write_run(tmp_path / "run", columns_for("reciprocam", pictures=1))
    about = json.loads((path / "manifest.json").read_text())
    about["models"]["demo"]["class_names"] = ["a", "b", "c", "tench, Tinca tinca", "shark"]
    (path / "manifest.json").write_text(json.dumps(about))
    (table,) = read_tables([path], resamples=5)
    (section,) = gallery.sections(table, table.models[0])
    assert "Explained: tench, probability" in section.pictures[0].words
    assert section.pictures[0].words.endswith("predicted: shark.")


def test_best_worst_and_most_disputed(run):
    (table,) = read_tables([run], resamples=5)
    (model,) = table.models
    found = gallery.choose(table, model, 4)
    adcc = figures(np.random.default_rng(1), 40)["adcc"]  # of the first method
    order = np.argsort(adcc)
    assert found["Best"] == order[::-1][:4].tolist()
    assert found["Worst"] == order[:4].tolist()
    random = np.random.default_rng(0)
    maps = random.random((4, 40, 49)).astype(np.float32)[:3]  # without the null baseline
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = [
        np.mean([np.corrcoef(maps[a, i], maps[b, i])[0, 1] for a, b in pairs]) for i in range(40)
    ]
    assert gallery.agreement(maps) == pytest.approx(expected, abs=1e-6)
    assert found["Most disputed"] == np.argsort(expected)[:4].tolist()


def test_a_constant_map_agrees_with_none():
    maps = np.array([[[0.0, 1.0, 2.0]], [[0.0, 2.0, 4.0]], [[1.0, 1.0, 1.0]]])
    assert gallery.agreement(maps) == pytest.approx([1 / 3])


def test_few_pictures_are_not_the_best_and_the_worst(tmp_path):
    path = write_run(tmp_path / "run", columns_for("reciprocam", pictures=5))
    (table,) = read_tables([path], resamples=5)
    found = gallery.choose(table, table.models[0])
    assert len(found["Best"]) == 4
    assert len(found["Worst"]) == 1
    assert not set(found["Best"]) & set(found["Worst"])


# --- the command -------------------------------------------------------------------------------


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
    assert "is no run of vit-reciprocam evaluate" in text
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
