"""The report's page: whole, alone, safe, and its pictures those that the run measured."""

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import NASTY, columns_for, digest, figures, rows_of, write_default_run, write_run

from vit_reciprocam.evaluate.report import gallery, sheets
from vit_reciprocam.evaluate.report import write as report
from vit_reciprocam.evaluate.report.tables import read_tables


@pytest.fixture
def run(tmp_path):
    return write_default_run(tmp_path / "run")


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
            assert sheets.number(one.value, False) in page.text
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
    (section,) = gallery.sections(table.models[0])
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
    (section,) = gallery.sections(table.models[0])
    assert "Explained: tench, probability" in section.pictures[0].words
    assert section.pictures[0].words.endswith("predicted: shark.")


def test_best_worst_and_most_disputed(run):
    (table,) = read_tables([run], resamples=5)
    (model,) = table.models
    found = gallery.choose(model, 4)
    adcc = figures(np.random.default_rng(1), 40)["adcc"]  # the first method's
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
    found = gallery.choose(table.models[0])
    assert len(found["Best"]) == 4
    assert len(found["Worst"]) == 1
    assert not set(found["Best"]) & set(found["Worst"])
