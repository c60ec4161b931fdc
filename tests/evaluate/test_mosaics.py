"""GridPG on mosaics: values worked by hand, the same mosaics whatever the batch, resumed runs."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from typer.testing import CliRunner

from vit_reciprocam.classifier.classifier import Classifier
from vit_reciprocam.cli import app
from vit_reciprocam.core.batch import Batch
from vit_reciprocam.core.targets import resolve_targets
from vit_reciprocam.errors import InputError
from vit_reciprocam.evaluate import mosaics
from vit_reciprocam.evaluate.data.datasets import Item
from vit_reciprocam.evaluate.mosaics import Mosaic, group_pictures, load_mosaics
from vit_reciprocam.evaluate.report.tables import read_tables
from vit_reciprocam.evaluate.report.write import write_report
from vit_reciprocam.evaluate.run import evaluate, summaries
from vit_reciprocam.evaluate.store import read_run
from vit_reciprocam.pictures.preprocess import Preprocess
from vit_reciprocam.results.explanation import Explanation, softmax

CLASSES = 10
PLAIN = Preprocess((8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)


class Toy:
    """Reads a picture's class from its red, 20 levels each, and the probability from its green."""

    model, num_classes, device = None, CLASSES, "cpu"

    def __init__(self):
        self.explained = []  # targets of each call
        self.refused = None  # class whose mosaics cannot be explained

    def digest(self):
        return "toy"

    def batch(self, images):
        return Batch(images)

    def predict(self, images):
        red, green, _ = (255 * getattr(images, "images", images)).mean(axis=(2, 3)).T
        right = np.eye(CLASSES)[np.rint(red / 20).astype(int)]
        p = green.clip(1, 254)[:, None] / 255
        return np.log(right * p + (1 - right) * (1 - p) / (CLASSES - 1)).astype(np.float32)

    def make_explainer(self, *, method="reciprocam", normalize="minmax"):
        def explain(images, targets):
            pixels = getattr(images, "images", images)
            logits = self.predict(images)
            targets = resolve_targets(targets, logits)
            if self.refused is not None and (targets == self.refused).any():
                raise InputError(f"class {self.refused} is refused")
            self.explained.append(targets)
            # a cell of the map is a pixel; its own class's cell has a level of red that is its own
            own = np.rint(255 * pixels[:, :1] / 20) == targets[..., None, None]
            maps = {
                "reciprocam": np.where(own, 1.0, 0.5),
                "uniform": np.ones(own.shape),
                "raw_attention": np.zeros(own.shape),
            }[method].astype(np.float32)
            evidence = np.where(own, 2.0, -1.0) if normalize == "evidence" else None
            return Explanation(
                scores=maps,
                scores_are_maps=True,
                logits=logits,
                probs=softmax(logits),
                targets=targets,
                path="",
                settings={},
                evidence=evidence,
            )

        return explain


@pytest.fixture
def toy():
    return Classifier("toy", Toy(), PLAIN, None)


def write_pictures(folder, pictures):
    """A listing of pictures in one colour each, from (label, class of the colour, green)."""
    folder.mkdir()
    lines = ["image,label"]
    for number, (label, colour, green) in enumerate(pictures):
        Image.new("RGB", (16, 16), (20 * colour, green, 0)).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{label}")
    (folder / "labels.csv").write_text("\n".join(lines))
    return str(folder)


SURE, UNSURE = 240, 120  # probabilities .94 and .47
# Right and sure are 0, 1, 2, 4, 5, 7, 8, 9 and 10. The first mosaic waits for a class other than 0,
# 1 and 2 until 7 comes; 4, 5, 8 and 9 are of the classes of the second; 10 is left out.
PICTURES = [
    (0, 0, SURE),
    (1, 1, SURE),
    (2, 2, SURE),
    (3, 3, UNSURE),
    (0, 0, SURE),
    (1, 1, SURE),
    (4, 5, SURE),  # wrong
    (7, 7, SURE),
    (8, 8, SURE),
    (9, 9, SURE),
    (1, 1, SURE),
    ("", 6, SURE),  # its label is not known
]
PLACES = [[0, 1, 2, 7], [4, 5, 8, 9]]


@pytest.fixture
def data(tmp_path):
    return write_pictures(tmp_path / "pictures", PICTURES)


def rows(folder):
    return read_run(folder)[1].to_pylist()


@pytest.fixture(autouse=True)
def in_order(request, monkeypatch):
    """Leave pictures in the order of the data set, by which the values here were worked out."""
    if request.function is not test_pictures_are_shuffled_alike_everywhere:
        monkeypatch.setattr(mosaics, "shuffle", list)


def test_pictures_are_shuffled_alike_everywhere():
    items = [Item(index, "", index) for index in range(8)]
    # sha256("0") begins with 5feceb66, then 6b86b273, d4735e3a, 4e074085, 4b227777, ef2d127d,
    # e7f6c011 and 7902699b
    expected = [4, 3, 0, 1, 7, 2, 6, 5]
    assert [item.index for item in mosaics.shuffle(items)] == expected
    assert [item.index for item in mosaics.shuffle(items[::-1])] == expected


# --- grouping and drawing ------------------------------------------------------------------------


def group(labels, count):
    items = [Item(index, "", label) for index, label in enumerate(labels)]
    return [[item.index for item in one] for one in group_pictures(items, count)]


@pytest.mark.parametrize(
    ("labels", "groups"),
    [
        ([3, 4, 5, 6], [[0, 1, 2, 3]]),
        ([3, 3, 4, 4, 5, 5, 6], [[0, 2, 4, 6]]),  # 1, 3 and 5 wait for a fourth class
        ([3, 3, 3, 4, 5, 6, 4, 5, 6, 7], [[0, 3, 4, 5], [1, 6, 7, 8]]),
        ([3, 3, 4, 5], []),
        ([1, 2, 3, 4, 1, 2, 3, 4], [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
)
def test_groups_by_hand(labels, groups):
    assert group(labels, 4) == groups


def load(pictures, preprocess, n):
    items = tuple(Item(index, str(path), index) for index, path in enumerate(pictures))
    ((*found,),) = load_mosaics([Mosaic(3, items)], preprocess, n, batch_size=1, workers=1)
    return found


def test_a_picture_is_scaled_into_its_cell_with_antialiasing(tmp_path):
    ramp = np.zeros((8, 8, 3), np.uint8)
    ramp[:, 4:] = 255
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.new("RGB", (5, 9), "white").save(tmp_path / "b.png")
    whole = dataclasses.replace(PLAIN, resize="squash", crop_pct=1.0)
    cells = load([tmp_path / "a.png", *[tmp_path / "b.png"] * 3], whole, 2)
    # At half the size the triangle reaches 2 pixels to both sides: .25, .75, .75 and .25 over 2. So
    # the second pixel has 1/8 of white, the third 7/8.
    expected = np.full((8, 8), 255)
    expected[:4, :4] = [0, 32, 223, 255]
    for cell in cells:
        np.testing.assert_array_equal(np.rint(255 * cell.pixels), [expected] * 3)
    assert [cell.item.index for cell in cells] == [12, 13, 14, 15]
    assert [cell.item.label for cell in cells] == [0, 1, 2, 3]
    names = " + ".join(str(tmp_path / name) for name in ("a.png", "b.png", "b.png", "b.png"))
    assert [cell.item.source for cell in cells] == [f"{names}, cell {cell}" for cell in range(4)]
    for cell, (row, column) in zip(cells, np.ndindex(2, 2), strict=True):
        mask = np.kron(np.eye(4)[2 * row + column].reshape(2, 2), np.ones((4, 4)))
        np.testing.assert_array_equal(cell.objects.mask, mask)


def test_a_cell_has_what_the_model_saw_of_the_picture_and_is_not_cropped_again(tmp_path):
    framed = Image.new("RGB", (16, 16), "red")
    framed.paste("blue", (4, 4, 12, 12))  # what a crop of half of the sides leaves
    framed.save(tmp_path / "a.png")
    half = dataclasses.replace(PLAIN, resize="squash", crop_pct=0.5)
    cells = load([tmp_path / "a.png"] * 4, half, 2)
    np.testing.assert_array_equal(cells[0].pixels[0], 0)
    np.testing.assert_array_equal(cells[0].pixels[2], 1)


def test_cells_cover_a_side_that_does_not_divide(tmp_path):
    Image.new("RGB", (16, 16), "white").save(tmp_path / "a.png")
    cells = load([tmp_path / "a.png"] * 4, dataclasses.replace(PLAIN, size=(5, 7)), 2)
    np.testing.assert_array_equal(cells[0].pixels, 1)
    # rows 0 to 1 and 2 to 4; columns 0 to 2 and 3 to 6
    assert [int(cell.objects.mask.sum()) for cell in cells] == [2 * 3, 2 * 4, 3 * 3, 3 * 4]
    assert sum(cell.objects.mask.astype(int) for cell in cells).tolist() == [[1] * 7] * 5


# --- runs ---------------------------------------------------------------------------------------

METHODS = ["reciprocam", "reciprocam:normalize=evidence", "uniform", "raw_attention"]


def test_figures_by_hand(toy, data, tmp_path):
    manifest = evaluate(data, [toy], METHODS, out=tmp_path / "run", mosaic=2, batch_size=16)
    found = rows(tmp_path / "run")
    expected = {
        "reciprocam": 16 / (16 + 48 / 2),  # 16 cells of 1 in its own cell, 48 of 1/2 elsewhere
        "reciprocam:normalize=evidence": 1,  # negative elsewhere, which the map shows as 0
        "uniform": 1 / 4,
        "raw_attention": 0,  # a map of zeros has nothing in the cell
    }
    assert len(found) == 4 * 8
    names = [[f"{Path(data) / f'{place}.png'}" for place in places] for places in PLACES]
    for row in found:
        assert row["gridpg"] == pytest.approx(expected[row["method"]], abs=1e-6)
        number, cell = divmod(row["index"], 4)
        assert row["label"] == row["target"] == PICTURES[PLACES[number][cell]][0]
        assert row["source"] == f"{' + '.join(names[number])}, cell {cell}"
        assert row["o"] is row["coherency"] is row["pointing_game"] is row["insertion"] is None
    about = manifest["mosaic"]
    assert (about["n"], about["threshold"]) == (2, 0.5)
    one = about["models"]["toy"]
    assert (one["confident"], one["mosaics"], one["left_out"]) == (9, 2, 1)
    assert manifest["images"] == 8
    for row in summaries(tmp_path / "run"):
        assert row == {
            "model": "toy",
            "method": row["method"],
            "images": 8,
            "gridpg": pytest.approx(100 * expected[row["method"]], abs=1e-4),
        }
    tried, *calls = toy.backend.explained[-len(METHODS) - 1 :]
    assert tried.tolist() == [[0]]
    # one call per method has all classes of all mosaics
    assert [call.tolist() for call in calls] == [[[0, 1, 2, 7], [0, 1, 8, 9]]] * len(METHODS)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_size_changes_nothing(toy, data, tmp_path, batch_size):
    one, other = (
        evaluate(data, [toy], METHODS, out=tmp_path / f"{size}", mosaic=2, batch_size=size)
        for size in (batch_size, 16)
    )
    assert one["mosaic"] == other["mosaic"]
    assert rows(tmp_path / f"{batch_size}") == rows(tmp_path / "16")


def test_a_run_that_was_cut_short_is_resumed(toy, data, tmp_path):
    options = {"data": data, "classifiers": [toy], "methods": ["reciprocam"], "mosaic": 2}
    seen = []

    def stop(progress):
        seen.append((progress.done, progress.total, len(progress.records)))
        if progress.records:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(**options, out=tmp_path / "run", batch_size=1, progress=stop)
    assert seen == [*((done, 11, 0) for done in range(1, 12)), (4, 8, 4)]  # predictions, then cells
    assert [row["index"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3]
    toy.backend.explained.clear()
    evaluate(**options, out=tmp_path / "run", batch_size=1, resume=True)
    assert [call.tolist() for call in toy.backend.explained] == [[[0]], [[0, 1, 8, 9]]]
    evaluate(**options, out=tmp_path / "whole")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert len(rows(tmp_path / "run")) == 8


def test_a_run_is_not_resumed_with_other_mosaics(toy, data, tmp_path):
    options = {"data": data, "classifiers": [toy], "methods": ["reciprocam"]}
    evaluate(**options, out=tmp_path / "run", mosaic=2)
    Image.new("RGB", (16, 16), (0, UNSURE, 0)).save(Path(data) / "0.png")
    with pytest.raises(InputError, match=r"differ.*mosaic\.models\.toy\.confident: 9 there, 8 now"):
        evaluate(**options, out=tmp_path / "run", mosaic=2, resume=True)


def test_a_folder_in_use_is_refused_before_anything_is_predicted(toy, data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").touch()
    predicted = []
    with pytest.raises(InputError, match=r"holds mine\.txt and no run"):
        evaluate(
            data, [toy], ["uniform"], out=tmp_path / "run", mosaic=2, progress=predicted.append
        )
    evaluate(data, [toy], ["uniform"], out=tmp_path / "other", mosaic=2)
    with pytest.raises(InputError, match="holds a run already"):
        evaluate(
            data, [toy], ["uniform"], out=tmp_path / "other", mosaic=2, progress=predicted.append
        )
    assert predicted == []


def test_one_mosaic_that_is_refused_does_not_take_the_others_along(toy, data, tmp_path):
    toy.backend.refused = 8
    manifest = evaluate(data, [toy], ["reciprocam", "uniform"], out=tmp_path / "run", mosaic=2)
    assert manifest["images"] == 4
    assert len(manifest["failures"]) == 4
    failed = [row for row in rows(tmp_path / "run") if row["error"]]
    assert {row["index"] for row in failed} == {4, 5, 6, 7}
    assert {row["error"] for row in failed} == {"class 8 is refused"}


def test_a_picture_that_cannot_be_read_is_listed(toy, data, tmp_path):
    (Path(data) / "0.png").write_text("no picture")
    manifest = evaluate(data, [toy], ["uniform"], out=tmp_path / "run", mosaic=2)
    assert [Path(one["source"]).name for one in manifest["failures"]] == ["0.png"]
    assert manifest["images"] == 4  # 1, 2, 4 and 7; the others are of classes 1, 8 and 9
    (source,) = {row["source"].rpartition(",")[0] for row in rows(tmp_path / "run")}
    assert [Path(one).name for one in source.split(" + ")] == ["1.png", "2.png", "4.png", "7.png"]


@pytest.mark.parametrize("protocol", ["byun2023", "poppi2021"])
def test_the_report_has_intervals_and_no_examples(toy, data, tmp_path, protocol):
    run = tmp_path / "run"
    evaluate(data, [toy], METHODS, out=run, mosaic=2, protocol=protocol)
    (table,) = read_tables([run], resamples=20)
    assert table.metrics == ["gridpg"]
    one = table.models[0].rows[0].figures["gridpg"]
    assert (one.low, one.value, one.high) == pytest.approx((40, 40, 40), abs=1e-4)
    write_report([run], tmp_path / "report", resamples=20)
    text = (tmp_path / "report" / "table1.md").read_text()
    assert "8 cells of 2x2 mosaics of 12 pictures of pictures" in text
    page = (tmp_path / "report" / "report.html").read_text()
    assert "GridPG of a picture" in page
    assert "ADCC of a picture" not in page


def test_runs_with_and_without_mosaics_do_not_share_a_table(toy, data, tmp_path):
    evaluate(data, [toy], ["uniform"], out=tmp_path / "one", mosaic=2)
    evaluate(data, [toy], ["reciprocam"], out=tmp_path / "two", protocol="poppi2021")
    settings = tmp_path / "two" / "run.json"
    about = json.loads(settings.read_text())
    about["protocol"] = json.loads((tmp_path / "one" / "run.json").read_text())["protocol"]
    settings.write_text(json.dumps(about))
    (tmp_path / "two" / "manifest.json").unlink()
    _, other = read_tables([tmp_path / "one", tmp_path / "two"], resamples=5)
    assert "mosaic" in other.apart


@pytest.mark.parametrize(
    ("pictures", "options", "words"),
    [
        (PICTURES, {"mosaic": 1}, "from 2 to the 8 pixels of the model's input; got 1"),
        (PICTURES, {"mosaic": 9}, "from 2 to the 8 pixels of the model's input; got 9"),
        (PICTURES, {"mosaic": 2, "insertion": True}, "insertion is not measured on mosaics"),
        ([("", 0, SURE)] * 3, {"mosaic": 2}, "none of 3 has one: add a column label"),
        (
            PICTURES,
            {"mosaic": 3},
            r"3x3 mosaic needs 9 pictures.*toy has 9 such picture\(s\) of 6 class\(es\), among 11",
        ),
        (PICTURES[:3], {"mosaic": 2}, r"has 3 such picture\(s\) of 3 class\(es\), among 3"),
    ],
)
def test_what_cannot_be_a_mosaic_leaves_no_folder(toy, tmp_path, pictures, options, words):
    data = write_pictures(tmp_path / "pictures", pictures)
    with pytest.raises(InputError, match=words):
        evaluate(data, [toy], ["uniform"], out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_the_command_measures_the_demo_model_on_mosaics_of_scenes(tmp_path):
    command = ["evaluate", "scenes:60", "--model", "demo", "--method", "reciprocam", "--method"]
    command += ["center", "--mosaic", "2", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    ours, null = json.loads(result.stdout)["summaries"]
    assert ours["images"] == null["images"] > 0
    for row in rows(tmp_path / "run"):
        grid = torch.tensor(row["map"]).reshape(1, 1, row["rows"], -1)
        shown = F.interpolate(grid.double(), (112, 112), mode="bilinear")[0, 0]
        down, across = divmod(row["index"] % 4, 2)
        own = shown[56 * down :, 56 * across :][:56, :56].sum() / shown.sum()
        assert row["gridpg"] == pytest.approx(float(own), abs=1e-6)
    assert ours["gridpg"] != pytest.approx(25, abs=0.5)
    assert null["gridpg"] == pytest.approx(25, abs=1e-3)  # the same in all four cells
    result = CliRunner().invoke(app, [*command, "--resume"])
    assert result.exit_code == 0, result.output
    assert "GridPG" in result.output
    assert "cells of 2x2 mosaics of pictures of scenes:60" in result.output
    result = CliRunner().invoke(app, [*command[:-3], "1"])
    assert result.exit_code == 2
