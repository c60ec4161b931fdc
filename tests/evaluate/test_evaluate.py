"""Runs: figures as the paper defines them, every record once, whatever happens on the way."""

import dataclasses
import errno
import json
import subprocess
import sys
import time

import numpy as np
import pytest
import timm
import torch
from filelock import FileLock
from PIL import Image
from torch.nn.functional import interpolate
from typer.testing import CliRunner

import vit_reciprocam as vr
from vit_reciprocam.cli import app
from vit_reciprocam.errors import InputError
from vit_reciprocam.evaluate import store
from vit_reciprocam.evaluate.metrics.perturbation import insertion
from vit_reciprocam.evaluate.metrics.protocols import Protocol
from vit_reciprocam.evaluate.run import evaluate, summaries
from vit_reciprocam.evaluate.store import columns_of, read_run
from vit_reciprocam.pictures.scenes import draw_scene
from vit_reciprocam.results.explanation import softmax

SPEC = "timm:test_vit"


@pytest.fixture(scope="module")
def demo():
    return vr.load("demo")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A torch model of 5 classes with weights large enough for maps to differ."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(model.state_dict(), path)
    return vr.load(SPEC, weights=path, num_classes=5)


@pytest.fixture
def pictures(tmp_path):
    """Three labelled pictures with a box each."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        draw_scene(number).image.save(folder / f"{number}.png")
    (folder / "labels.csv").write_text(
        "image,label,xmin,ymin,xmax,ymax\n0.png,0,20,20,60,70\n1.png,3,0,0,111,40\n2.png,4,50,50,90,90\n"
    )
    return folder


def rows(folder):
    return read_run(folder)[1].to_pylist()


# --- figures -----------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(classifier, files, labels, protocol):
    """Each picture's figures straight from METHOD, with torch, maps from ReciproCAM.

    All pictures in one batch, as the run has them: an untrained model's scores differ so little
    from patch to patch that scaling them to [0, 1] shows the rounding of another batch size.
    """
    byun = protocol == "byun2023"
    preprocess = dataclasses.replace(
        classifier.preprocess,
        resize="squash" if byun else "shortest",
        crop_pct=0.875,
        interpolation="bilinear",
    )
    x = torch.stack([torch.from_numpy(preprocess(Image.open(file))) for file in files])
    probs = classifier.model(x).softmax(dim=1)
    targets = torch.tensor(labels) if byun else probs.argmax(dim=1)
    explainer = vr.ReciproCAM(classifier.model)
    mode = "bicubic" if byun else "bilinear"

    def up(maps):
        return interpolate(torch.tensor(maps), size=x.shape[2:], mode=mode, align_corners=False)

    maps = explainer(x, targets).maps
    masked = x * up(maps)
    after = classifier.model(masked).softmax(dim=1)
    again = explainer(masked, targets).maps
    figures = []
    for number, target in enumerate(targets):
        a, b = (torch.tensor(m) if byun else up(m) for m in (maps, again))
        p, o = probs[number, target].item(), after[number, target].item()
        pearson = np.corrcoef(a[number].flatten(), b[number].flatten())[0, 1]
        drop, coherency = max(0, p - o) / p, (1 + pearson) / 2
        complexity = a[number].abs().mean().item()
        figures.append(
            {
                "target": target.item(),
                "p": p,
                "o": o,
                "drop": drop,
                "increase": float(o > p),
                "coherency": coherency,
                "complexity": complexity,
                "adcc": 3 / (1 / coherency + 1 / (1 - complexity) + 1 / (1 - drop)),
            }
        )
    return figures


@pytest.mark.parametrize("protocol", ["byun2023", "poppi2021"])
def test_figures_are_the_definition_s(small, pictures, tmp_path, protocol):
    evaluate(str(pictures), [small], ["reciprocam"], out=tmp_path / "run", protocol=protocol)
    files = [pictures / f"{number}.png" for number in range(3)]
    expected = by_hand(small, files, [0, 3, 4], protocol)
    for row, wanted in zip(rows(tmp_path / "run"), expected, strict=True):
        for name, value in wanted.items():
            assert row[name] == pytest.approx(value, abs=1e-4), name
    (summary,) = summaries(tmp_path / "run")
    means = {name: np.mean([one[name] for one in expected]) for name in expected[0]}
    terms = (means["coherency"], 1 - means["complexity"], 1 - means["drop"])
    harmonic = 3 / sum(1 / term for term in terms)
    adcc = harmonic if protocol == "byun2023" else means["adcc"]
    assert summary["adcc"] == pytest.approx(100 * adcc, abs=0.01)
    assert summary["increase"] == pytest.approx(100 * means["increase"])


def test_methods_side_by_side_share_p_and_have_their_own_maps(small, pictures, tmp_path):
    methods = ["reciprocam", "reciprocam:kernel=dirac", "center", "uniform"]
    evaluate(str(pictures), [small], methods, out=tmp_path / "run", insertion=True)
    _, table = read_run(tmp_path / "run")
    columns = {method: columns_of(table, SPEC, method) for method in methods}
    for each in columns.values():
        np.testing.assert_allclose(each["p"], columns["reciprocam"]["p"], rtol=1e-5)
        assert set(each) >= {"insertion", "deletion"}
    assert not np.array_equal(columns["reciprocam"]["o"], columns["reciprocam:kernel=dirac"]["o"])
    # a map of ones leaves the picture as it is
    assert np.array_equal(columns["uniform"]["o"], columns["uniform"]["p"]), "to the bit: o > p"
    evaluate(str(pictures), [small], methods[::-1], out=tmp_path / "other", insertion=True)
    other = {(row["index"], row["method"]): row for row in rows(tmp_path / "other")}
    for row in rows(tmp_path / "run"):
        assert row == other[row["index"], row["method"]], "whatever ran before"
    assert columns["uniform"]["complexity"] == pytest.approx(1)
    for row in table.to_pylist():
        assert len(row["map"]) == row["rows"] * 10 == 100


def test_settings_of_one_method_share_what_comes_before_the_mask(small, pictures, tmp_path):
    """M settings run G once on each picture and once on each of its M masked pictures."""
    methods = ["reciprocam", "reciprocam:kernel=dirac", "reciprocam:layer=block"]
    calls = []
    hook = small.model.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    try:
        evaluate(str(pictures), [small], methods, out=tmp_path / "together", batch_size=3)
    finally:
        hook.remove()
    tried = len(methods)  # each on one black picture before the data set is begun
    assert len(calls) == tried + 1 + len(methods)
    for method in methods:
        evaluate(str(pictures), [small], [method], out=tmp_path / method, batch_size=3)
        (alone,) = summaries(tmp_path / method)
        together = {row["method"]: row for row in summaries(tmp_path / "together")}[method]
        figures = [name for name in alone if name not in ("model", "method")]
        for name in figures:
            assert together[name] == pytest.approx(alone[name], rel=1e-5), (method, name)


def test_signed_evidence_puts_patches_in_order(small, pictures, tmp_path):
    """The run's insertion is that of the ranking, and not that of the maps, which are clipped."""
    protocol = Protocol("mine", steps=100, baseline="mean")  # every patch on its own
    method, out = "reciprocam:normalize=evidence", tmp_path / "run"
    evaluate(str(pictures), [small], [method], out=out, protocol=protocol, insertion=True)
    x = np.stack(
        [
            protocol.preprocess(small.preprocess)(Image.open(pictures / f"{number}.png"))
            for number in range(3)
        ]
    )
    labels = np.array([0, 3, 4])
    explained = small.backend.make_explainer(normalize="evidence")(x, labels[:, None])
    assert (explained.ranking < 0).sum() > 20, "the test needs values that are clipped"
    expected, clipped = (
        insertion(
            lambda images: softmax(small.backend.predict(images)),
            x,
            np.zeros_like(x),
            values[:, 0],
            labels,
            steps=100,
        )
        for values in (explained.ranking, explained.maps)
    )
    found = [row["insertion"] for row in rows(out)]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert abs(expected - clipped).max() > 1e-4


def test_boxes_count_where_the_label_is_explained(small, pictures, tmp_path):
    for protocol in ("byun2023", "poppi2021"):
        evaluate(str(pictures), [small], ["center"], out=tmp_path / protocol, protocol=protocol)
    for row in rows(tmp_path / "byun2023"):
        assert row["pointing_game"] in (0, 1)
        assert 0 < row["energy_in_box"] < 1
        assert row["mass_accuracy"] is None
    for row in rows(tmp_path / "poppi2021"):
        assert (row["pointing_game"] is None) == (row["target"] != row["label"])


def test_a_mask_counts_before_a_box(small, pictures, tmp_path):
    left = np.zeros((112, 112), np.uint8)
    left[:, :56] = 255
    Image.fromarray(left).save(pictures / "m.png")
    (pictures / "labels.csv").write_text(
        "image,label,xmin,ymin,xmax,ymax,mask\n0.png,0,0,0,5,5,m.png\n"
    )
    evaluate(str(pictures), [small], ["center"], out=tmp_path / "run")
    (row,) = rows(tmp_path / "run")
    assert row["mass_accuracy"] == pytest.approx(0.5, abs=0.01)
    assert row["energy_in_box"] is None


def test_small_objects_are_not_lost(small, pictures, tmp_path):
    Image.new("RGB", (2000, 1500)).save(pictures / "large.png")
    corners = [(x, y, x + 5, y + 6) for x in (700, 901, 1003, 1202) for y in (400, 707, 1101)]
    lines = [f"large.png,0,{','.join(map(str, box))}" for box in corners]
    (pictures / "labels.csv").write_text(
        "image,label,xmin,ymin,xmax,ymax\n" + "\n".join([*lines, "large.png,0,0,0,3,3"])
    )
    manifest = evaluate(str(pictures), [small], ["center"], out=tmp_path / "run")
    energies = [row["energy_in_box"] for row in rows(tmp_path / "run")]
    assert all(energy > 0 for energy in energies[:-1])
    assert energies[-1] is None  # cropped away
    assert ["outside the part" in one["note"] for one in manifest["not_located"]] == [True]


def test_scenes_need_no_torch_and_have_null_baselines_beside_them(demo, tmp_path):
    methods = ["reciprocam", "random", "center", "uniform", "image_edges"]
    code = (
        "import sys, pathlib, vit_reciprocam as vr;"
        "from vit_reciprocam.evaluate.run import evaluate, summaries;"
        f"out = pathlib.Path({str(tmp_path)!r}) / 'run';"
        f"evaluate('scenes:6', [vr.load('demo')], {methods}, out=out);"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
    found = {row["method"]: row for row in summaries(tmp_path / "run")}
    assert [found[method]["images"] for method in methods] == [6] * 5
    assert found["center"]["coherency"] == pytest.approx(100)  # it never looks
    assert found["uniform"]["complexity"] == pytest.approx(100)
    assert found["uniform"]["drop"] == pytest.approx(0, abs=0.01)  # the picture as it is
    assert 30 < found["random"]["coherency"] < 70  # unrelated maps: 50
    assert found["image_edges"]["coherency"] > 80
    _, table = read_run(tmp_path / "run")
    columns = [columns_of(table, "demo", method) for method in methods]
    for each in columns:
        np.testing.assert_allclose(each["p"], columns[0]["p"], rtol=0, atol=1e-6)
    assert found["reciprocam"]["pointing_game"] >= 50
    assert found["reciprocam"]["mass_accuracy"] > 10


def test_the_figures_of_deit_tiny_on_500_photographs(shared_data, deit_tiny_weights, tmp_path):
    """The prototype's, from the README of the shared data: drop, inc, coher, compl, ADCC."""
    classifier = vr.load("timm:deit_tiny_patch16_224", weights=deit_tiny_weights)
    data = str(shared_data / "imagenet-samples")
    evaluate(data, [classifier], ["reciprocam", "reciprocam:kernel=dirac"], out=tmp_path / "run")
    gaussian, dirac = summaries(tmp_path / "run")
    assert gaussian["images"] == 500
    names = ("drop", "increase", "coherency", "complexity", "adcc")
    for row, wanted in (
        (gaussian, (27.50, 23.20, 85.48, 41.66, 70.37)),
        (dirac, (34.36, 12.60, 70.66, 51.76, 59.86)),
    ):
        assert [row[name] for name in names] == pytest.approx(wanted, abs=0.1)


# --- whatever happens --------------------------------------------------------------------------


class StopError(Exception):
    pass


def test_a_run_cut_short_goes_on_where_it_was(demo, tmp_path):
    options = {"data": "scenes:7", "classifiers": [demo], "methods": ["reciprocam"]}
    evaluate(**options, out=tmp_path / "whole", batch_size=2)

    def stop(progress):
        if progress.done == 4:
            raise StopError

    with pytest.raises(StopError):
        evaluate(**options, out=tmp_path / "cut", batch_size=2, progress=stop)
    assert not (tmp_path / "cut" / "manifest.json").exists()
    settings, table = read_run(tmp_path / "cut")
    assert table.num_rows == 4
    assert "images" not in settings
    counts = []
    manifest = evaluate(
        **options,
        out=tmp_path / "cut",
        batch_size=2,
        resume=True,
        progress=lambda progress: counts.append((progress.done, progress.total)),
    )
    assert counts == [(6, 7), (7, 7)]
    assert manifest["images"] == 7
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    before = (tmp_path / "cut" / "manifest.json").read_bytes()
    evaluate(**options, out=tmp_path / "cut", resume=True)  # complete: nothing changes
    assert (tmp_path / "cut" / "manifest.json").read_bytes() == before


def test_a_killed_process_loses_nothing(demo, tmp_path):
    out = tmp_path / "run"
    command = ["evaluate", "scenes:40", "--model", "demo", "--batch-size", "2", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "vit_reciprocam", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (out / "part-000003.parquet").exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = read_run(out)[1].num_rows
    assert kept >= 8
    result = CliRunner().invoke(app, [*command, "--resume", "--json"])
    assert result.exit_code == 0, result.output
    found = rows(out)
    assert [row["index"] for row in found] == list(range(40))
    evaluate("scenes:40", [demo], ["reciprocam"], out=tmp_path / "whole", batch_size=2)
    assert found == rows(tmp_path / "whole")


def test_another_run_is_not_resumed_and_says_what_changed(demo, tmp_path):
    options = {"classifiers": [demo], "methods": ["reciprocam"], "out": tmp_path / "run"}
    evaluate("scenes:2", **options)
    with pytest.raises(InputError, match="holds a run already: pass --resume"):
        evaluate("scenes:2", **options)
    for changes, words in (
        ({"data": "scenes:3"}, r"data\.name: scenes:2 there, scenes:3 now"),
        ({"protocol": "poppi2021"}, r"protocol\.name: byun2023 there, poppi2021 now"),
        ({"limit": 1}, r"data\.pictures: 2 there, 1 now"),
        ({"methods": ["reciprocam:kernel=gaussian"]}, "methods"),
    ):
        with pytest.raises(InputError, match=f"cannot be resumed.*{words}"):
            evaluate(**({"data": "scenes:2", **options} | changes), resume=True)
    about = tmp_path / "run" / "run.json"
    content = json.loads(about.read_text())
    about.write_text(json.dumps(content | {"versions": {"numpy": "0.1"}}))
    with pytest.raises(InputError, match=r"versions\.numpy: 0\.1 there"):
        evaluate("scenes:2", **options, resume=True)
    about.write_text(json.dumps(content | {"format": 99}))
    with pytest.raises(InputError, match="written in format 99, this version reads 1"):
        evaluate("scenes:2", **options, resume=True)
    assert len(list((tmp_path / "run").glob("part-*"))) == 1


def test_folders_that_are_not_ours(demo, tmp_path):
    options = {"classifiers": [demo], "methods": ["reciprocam"]}
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds notes\.txt and no run"):
        evaluate("scenes:2", **options, out=tmp_path)
    with pytest.raises(InputError, match="is a file"):
        evaluate("scenes:2", **options, out=tmp_path / "notes.txt")
    with pytest.raises(InputError, match="is not a run of vit-reciprocam evaluate"):
        read_run(tmp_path)


def test_two_processes_on_one_folder(demo, tmp_path):
    (tmp_path / "run").mkdir()
    with (
        FileLock(tmp_path / "run" / ".lock"),
        pytest.raises(InputError, match="another process is writing"),
    ):
        evaluate("scenes:2", [demo], ["reciprocam"], out=tmp_path / "run")


def test_a_full_disk(demo, tmp_path, monkeypatch):
    command = ["evaluate", "scenes:4", "--model", "demo", "--batch-size", "2"]
    command += ["--out", str(tmp_path / "run")]
    real = store.write_atomically

    def full(path, content):
        if path.name == "part-000001.parquet":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, content)

    monkeypatch.setattr(store, "write_atomically", full)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 3
    assert "No space left on device" in result.output
    assert not (tmp_path / "run" / "manifest.json").exists()
    monkeypatch.undo()
    result = CliRunner().invoke(app, [*command, "--resume"])
    assert result.exit_code == 0, result.output
    assert [row["index"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3]


def test_pictures_that_fail_are_listed_and_the_others_done(small, pictures, tmp_path):
    (pictures / "1.png").write_bytes((pictures / "1.png").read_bytes()[:200])
    with (pictures / "labels.csv").open("a") as listing:
        listing.write("gone.png,1,0,0,1,1\n2.png,4,50,50,90,90\n0.png,2,100,100,300,300\n")
    manifest = evaluate(
        str(pictures), [small], ["reciprocam", "center"], out=tmp_path / "run", batch_size=3
    )
    assert (manifest["images"], manifest["duplicates"]) == (3, 1)
    errors = [failure["error"] for failure in manifest["failures"]]
    assert len(errors) == 2
    assert "1.png is damaged" in errors[0]
    assert "no such file" in errors[1]
    (note,) = manifest["not_located"]  # its ADCC needs no box
    assert "is not inside" in note["note"]
    found = rows(tmp_path / "run")
    assert len(found) == 2 * 5
    assert [row["pointing_game"] is None for row in found[:5]] == [False, True, False, True, True]
    assert {one["images"] for one in summaries(tmp_path / "run")} == {3}


def test_pictures_that_failed_are_tried_again(small, pictures, tmp_path):
    whole = (pictures / "1.png").read_bytes()
    options = {"data": str(pictures), "classifiers": [small], "methods": ["center", "uniform"]}
    evaluate(**options, out=tmp_path / "whole")
    (pictures / "1.png").write_bytes(whole[:200])
    manifest = evaluate(**options, out=tmp_path / "run")
    assert (manifest["images"], len(manifest["failures"])) == (2, 1)
    (pictures / "1.png").write_bytes(whole)
    manifest = evaluate(**options, out=tmp_path / "run", resume=True)
    assert (manifest["images"], manifest["failures"]) == (3, [])
    for row, wanted in zip(rows(tmp_path / "run"), rows(tmp_path / "whole"), strict=True):
        for name in ("index", "method", "digest", "error"):
            assert row[name] == wanted[name]
        assert row["drop"] == pytest.approx(wanted["drop"], abs=1e-4)  # rounded in another batch


def test_a_lost_part_makes_the_run_unfinished(demo, tmp_path):
    options = {"data": "scenes:4", "classifiers": [demo], "methods": ["reciprocam"]}
    evaluate(**options, out=tmp_path / "run", batch_size=2)
    before = rows(tmp_path / "run")
    (tmp_path / "run" / "part-000000.parquet").unlink()
    settings, table = read_run(tmp_path / "run")
    assert "images" not in settings
    assert table.num_rows == 2
    evaluate(**options, out=tmp_path / "run", batch_size=2, resume=True)
    assert rows(tmp_path / "run") == before
    (tmp_path / "run" / "manifest.json").write_text("{")
    settings, table = read_run(tmp_path / "run")
    assert "images" not in settings
    assert table.num_rows == 4


def test_the_digest_of_weights_knows_every_tensor(tmp_path):
    model = timm.create_model("xcit_nano_12_p16_224", num_classes=3)  # has BatchNorm's counters
    digests = set()
    for change in (0, 1):
        with torch.no_grad():
            model.head.bias += change
        torch.save(model.state_dict(), tmp_path / "w.pth")
        name = "timm:xcit_nano_12_p16_224"
        digests.add(vr.load(name, weights=tmp_path / "w.pth", num_classes=3).backend.digest())
        digests.add(vr.load(name, weights=tmp_path / "w.pth", num_classes=3).backend.digest())
    assert len(digests) == 2


def test_one_picture_that_the_model_refuses_does_not_take_its_batch_along(demo, tmp_path):
    class Picky:
        def __getattr__(self, name):
            return getattr(demo.backend, name)

        def make_explainer(self, **settings):
            explain = demo.backend.make_explainer(**settings)

            def explain_some(images, targets):
                pixels = getattr(images, "images", images)
                if len(pixels) > 1 or np.allclose(pixels, poison):
                    raise InputError("the model does not like this one")
                return explain(images, targets)

            return explain_some

    source = draw_scene(800_001).image
    preprocess = dataclasses.replace(
        demo.preprocess, resize="squash", crop_pct=0.875, interpolation="bilinear"
    )
    poison = preprocess(source)
    picky = dataclasses.replace(demo, backend=Picky())
    manifest = evaluate("scenes:3", [picky], ["reciprocam"], out=tmp_path / "run")
    assert [one["source"] for one in manifest["failures"]] == ["scene 800001"]
    assert manifest["images"] == 2


def test_labels_are_needed_where_the_protocol_explains_them(small, pictures, tmp_path):
    (pictures / "labels.csv").write_text("image\n0.png\n1.png\n")
    with pytest.raises(InputError, match=r"2 of 2 pictures have no label.*poppi2021"):
        evaluate(str(pictures), [small], ["center"], out=tmp_path / "a")
    assert not (tmp_path / "a").exists()
    manifest = evaluate(
        str(pictures), [small], ["center"], out=tmp_path / "b", protocol="poppi2021"
    )
    assert manifest["images"] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ["reciprocam", "reciprocam:"]}, "methods, each once"),
        ({"methods": []}, "one or more methods"),
        ({"classifiers": []}, "one or more models"),
        ({"methods": ["nonsense"]}, "method must be one of 'reciprocam'"),
        ({"methods": ["reciprocam:kernel"]}, "expected NAME:KEY=VALUE"),
        ({"methods": ["center:size=3"]}, "center"),
        ({"methods": ["center", "rollout:head_fusion=sum"]}, r"method rollout.* cannot explain"),
        ({"methods": ["center", "rollout:start_layer=99"]}, r"start_layer must be from 0"),
        ({"data": "scenes:2"}, "row 1: the model has no class names"),
        ({"protocol": "mine"}, "protocol must be one of 'byun2023'"),
        ({"batch_size": 0}, "must be 1 or more"),
    ],
)
def test_bad_settings_leave_no_folder(small, pictures, tmp_path, changes, words):
    options = {"data": str(pictures), "classifiers": [small], "methods": ["reciprocam"]}
    with pytest.raises(InputError, match=words):
        evaluate(**(options | changes), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- the command -------------------------------------------------------------------------------


def test_the_command_prints_a_table_or_json(tmp_path):
    command = ["evaluate", "scenes:3", "--model", "demo", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "protocol byun2023, 3 pictures of scenes:3" in result.output
    result = CliRunner().invoke(app, [*command, "--resume", "--json"])
    found = json.loads(result.stdout)
    assert found["images"] == 3
    assert found["summaries"] == summaries(tmp_path / "run")


def test_the_command_s_exit_codes(tmp_path):
    (tmp_path / "data").mkdir()
    draw_scene(0).image.save(tmp_path / "data" / "a.png")
    listing = tmp_path / "data" / "labels.csv"
    command = ["evaluate", str(tmp_path / "data"), "--model", "demo", "--out"]
    listing.write_text("image,label\na.png,0\ngone.png,1\n")
    result = CliRunner().invoke(app, [*command, str(tmp_path / "one")])
    assert result.exit_code == 1
    assert "failed: no such file" in result.output
    listing.write_text("image,label\ngone.png,1\n")
    assert CliRunner().invoke(app, [*command, str(tmp_path / "none")]).exit_code == 2
    listing.write_text("image,label\na.png,99\n")
    result = CliRunner().invoke(app, [*command, str(tmp_path / "bad")])
    assert result.exit_code == 2
    assert "class 99 does not exist" in result.output
    result = CliRunner().invoke(
        app, ["evaluate", "scenes:2", *("--model", "demo", "--model", SPEC, "--weights", "w")]
    )
    assert result.exit_code == 2
    assert "1 --weights for 2 --model" in result.output
