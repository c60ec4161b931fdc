import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision import transforms as T

from vit_reciprocam.errors import InputError
from vit_reciprocam.evaluate.metrics import adcc as metrics
from vit_reciprocam.evaluate.metrics.perturbation import baseline_images, deletion, insertion
from vit_reciprocam.evaluate.metrics.protocols import PROTOCOLS, Protocol, get_protocol
from vit_reciprocam.pictures.preprocess import Preprocess

BYUN, POPPI = PROTOCOLS["byun2023"], PROTOCOLS["poppi2021"]


def rng():
    return np.random.default_rng(0)


# --- what a protocol says -------------------------------------------------------------------


def test_the_methods_table():
    shared = {"crop_pct": 0.875, "interpolation": "bilinear"}
    curves = {"steps": 14, "unit": "patch", "baseline": "blur"}
    assert {name: protocol.to_dict() for name, protocol in PROTOCOLS.items()} == {
        "byun2023": {
            "name": "byun2023",
            "target": "label",
            "upsampling": "bicubic",
            "compared_at": "grid",
            "adcc": "means",
            "resize": "squash",
            **shared,
            **curves,
        },
        "poppi2021": {
            "name": "poppi2021",
            "target": "top1",
            "upsampling": "bilinear",
            "compared_at": "image",
            "adcc": "mean",
            "resize": "shortest",
            **shared,
            **curves,
        },
    }


@pytest.mark.parametrize(
    ("protocol", "resize"), [(BYUN, T.Resize((256, 256))), (POPPI, T.Resize(256))]
)
def test_preprocessing_is_torchvisions_with_the_models_mean_and_std(protocol, resize):
    picture = Image.fromarray(rng().integers(0, 256, (150, 233, 3), dtype=np.uint8))
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    base = Preprocess((224, 224), crop_pct=1.0, interpolation="bicubic", mean=mean, std=std)
    whole = T.Compose([resize, T.CenterCrop(224), T.ToTensor(), T.Normalize(mean, std)])
    got = protocol.preprocess(base)(picture)
    np.testing.assert_allclose(got, whole(picture).numpy(), atol=1e-6)


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_the_models_size_is_kept(protocol):
    assert protocol.preprocess(Preprocess((384, 320))).size == (384, 320)


def test_which_class_is_explained():
    probs = np.array([[0.2, 0.8], [0.6, 0.4]])
    assert BYUN.targets(probs, np.array([0, 0])).tolist() == [0, 0]
    assert POPPI.targets(probs, np.array([0, 1])).tolist() == [1, 0]
    assert POPPI.targets(probs).tolist() == [1, 0]
    with pytest.raises(InputError, match=r"'byun2023' explains the true class.*got none"):
        BYUN.targets(probs)
    with pytest.raises(InputError, match=r"labels \(3,\)"):
        BYUN.targets(probs, np.zeros(3, int))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", " ", "needs a name"),
        ("name", 3, "needs a name"),
        ("target", "top5", "'label', 'top1'; got 'top5'"),
        ("upsampling", "nearest", "'bilinear', 'bicubic'"),
        ("compared_at", "pixel", "'grid', 'image'"),
        ("adcc", "median", "'means', 'mean'"),
        ("resize", "pad", "'shortest', 'squash'"),
        ("crop_pct", 0, "above 0"),
        ("crop_pct", 87.5, "at most 1"),
        ("crop_pct", "0.9", "share"),
        ("interpolation", "area", "'nearest', 'bilinear'"),
        ("steps", 0, "whole number"),
        ("steps", 1.5, "whole number"),
        ("steps", True, "whole number"),
        ("unit", "cell", "'patch', 'pixel'"),
        ("baseline", "noise", "'blur', 'mean', 'black'"),
    ],
)
def test_each_field_is_checked(field, value, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(BYUN, **{field: value})


# --- finding and writing one ------------------------------------------------------------------


def test_lookup():
    assert get_protocol("poppi2021") is POPPI
    with pytest.raises(InputError, match=r"'byun2023', 'poppi2021', or a \.toml .* got 'byun'"):
        get_protocol("byun")


@pytest.mark.parametrize("protocol", [BYUN, POPPI, Protocol("mine", steps=7, crop_pct=1)])
def test_there_and_back_through_json(protocol):
    assert Protocol.from_dict(json.loads(json.dumps(protocol.to_dict()))) == protocol


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("mine.toml", 'steps = 28\nunit = "pixel"\ntarget = "top1"\n'),
        ("mine.JSON", '{"steps": 28, "unit": "pixel", "target": "top1"}'),
        ("other.toml", 'name = "mine"\nsteps = 28\nunit = "pixel"\ntarget = "top1"\n'),
    ],
)
def test_ones_own_from_a_file(tmp_path, file, content):
    path = tmp_path / file
    path.write_text(content)
    expected = dataclasses.replace(BYUN, name="mine", steps=28, unit="pixel", target="top1")
    assert Protocol.from_file(path) == get_protocol(str(path)) == expected


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.yaml", "steps: 3", "must end in .toml or .json"),
        ("a.toml", "steps = = 3", "not valid TOML"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", "[1]", "a list"),
        ("a.toml", "step = 3", "a.toml: a protocol's field must be one of 'name', .* got 'step'"),
        ("a.toml", "steps = 0", "a.toml: steps must be"),
        ("byun2023.toml", "steps = 3", "changes the protocol 'byun2023': give yours another name"),
        ("a.json", '{"name": "poppi2021"}', "changes the protocol 'poppi2021'"),
    ],
)
def test_files_that_are_refused(tmp_path, file, content, message):
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=message):
        Protocol.from_file(tmp_path / file)


def test_a_missing_file_and_a_missing_name(tmp_path):
    with pytest.raises(InputError, match=r"cannot read protocol .*none\.toml: No such file"):
        get_protocol(tmp_path / "none.toml")
    with pytest.raises(InputError, match="needs a name: add"):
        Protocol.from_dict({"steps": 3})


# --- scores -----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_each_pictures_row(protocol):
    a, b = rng().random((2, 4, 2, 3))
    p, o = np.array([0.8, 0.5, 0.2, 0.9]), np.array([0.6, 0.5, 0.3, 0.0])
    images = np.zeros((4, 3, 8, 12), np.float32)
    got = protocol.score_images(images, a, b, p, o)
    if protocol is POPPI:
        a, b = (
            F.interpolate(torch.from_numpy(x)[None], (8, 12), mode="bilinear")[0].numpy()
            for x in (a, b)
        )
    a, b = a.reshape(4, -1), b.reshape(4, -1)
    coherency = (1 + np.array([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)])) / 2
    drop, complexity = np.array([0.25, 0, 0, 1]), a.mean(1)
    terms = np.stack([coherency, 1 - complexity, 1 - drop])[:, :3]
    expected = {
        "p": p,
        "o": o,
        "drop": drop,
        "increase": [0, 0, 1, 0],
        "coherency": coherency,
        "complexity": complexity,
        "adcc": [*(3 / (1 / terms).sum(0)), 0],
    }
    assert list(got) == list(expected)
    for name, column in expected.items():
        np.testing.assert_allclose(got[name], column, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_masked_images_by_the_protocols_upsampling(protocol):
    images, maps = rng().normal(size=(2, 3, 8, 8)), rng().random((2, 2, 2))
    wide = F.interpolate(torch.from_numpy(maps)[:, None], (8, 8), mode=protocol.upsampling)
    np.testing.assert_allclose(protocol.masked_images(images, maps), images * wide.numpy())


@pytest.mark.parametrize("unit", ["patch", "pixel"])
@pytest.mark.parametrize("baseline", ["blur", "black"])
def test_insertion_and_deletion_as_the_protocol_says(unit, baseline):
    protocol = Protocol("mine", steps=5, unit=unit, baseline=baseline)
    preprocess = Preprocess((8, 8), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    images, maps = rng().normal(size=(2, 3, 8, 8)), rng().random((2, 2, 2))
    targets = np.array([1, 0])

    def predict(x):
        seen = 1 / (1 + np.exp(-x.reshape(2, -1) @ np.linspace(-1, 1, 192)))
        return np.stack([1 - seen, seen], axis=-1)

    start = baseline_images(images, baseline, mean=preprocess.mean, std=preprocess.std)
    given = (predict, images, start, maps, targets)
    got = protocol.score_order(predict, images, maps, targets, preprocess)
    options = {"steps": 5, "unit": unit, "mode": "bicubic"}
    np.testing.assert_array_equal(got["insertion"], insertion(*given, **options))
    np.testing.assert_array_equal(got["deletion"], deletion(*given, **options))
    assert list(got) == ["insertion", "deletion"]


COLUMNS = {
    "p": np.array([0.8, 0.5]),
    "o": np.array([0.6, 0.6]),
    "coherency": np.array([0.5, 1.0]),
    "complexity": np.array([0.5, 0.0]),
}


@pytest.mark.parametrize(
    ("protocol", "adcc"),
    [
        # means: coherency .75, complexity .25, drop (.25 + 0) / 2 = .125
        (BYUN, 3 / (1 / 0.75 + 1 / 0.75 + 1 / 0.875)),
        # pictures: 3 / (2 + 2 + 1/.75) = .5625 and 1
        (POPPI, (0.5625 + 1) / 2),
    ],
)
def test_the_summary_by_hand_in_percent(protocol, adcc):
    assert protocol.summary(COLUMNS) == pytest.approx(
        {"drop": 12.5, "increase": 50, "coherency": 75, "complexity": 25, "adcc": 100 * adcc}
    )


def test_the_summary_of_the_papers_means():
    row = {"p": [1.0], "o": [0.7418], "coherency": [0.8861], "complexity": [1 - 0.5365]}
    assert BYUN.summary(row)["adcc"] == pytest.approx(69.1, abs=0.05)


def test_the_summary_of_what_else_is_known():
    more = {
        "insertion": np.array([0.5, 0.25]),
        "deletion": np.array([0.125, 0.25]),
        "pointing_game": np.array([1, np.nan]),
        "mass_accuracy": np.array([np.nan, np.nan]),
        "adcc": np.array([7, 7]),
        "label": np.array([3, 4]),
    }
    row = BYUN.summary(COLUMNS | more)
    added = {k: v for k, v in row.items() if k not in BYUN.summary(COLUMNS)}
    assert added == {
        "insertion": 37.5,
        "deletion": 18.75,
        "insertion_minus_deletion": 18.75,
        "pointing_game": 100,
    }
    assert row["adcc"] == BYUN.summary(COLUMNS)["adcc"]


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_scored_images_can_be_summed_up(protocol):
    a, b = rng().random((2, 5, 3, 3))
    p, o = rng().random((2, 5))
    columns = protocol.score_images(np.zeros((5, 3, 9, 9)), a, b, p, o)
    row = protocol.summary(columns)
    for name in ("drop", "increase", "coherency", "complexity"):
        assert row[name] == pytest.approx(100 * columns[name].mean())
    means = [columns[n].mean() for n in ("coherency", "complexity", "drop")]
    expected = metrics.adcc(*means) if protocol is BYUN else columns["adcc"].mean()
    assert row["adcc"] == pytest.approx(100 * float(expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": np.array([])}, "one shape"),
        ({"complexity": np.array([0.5])}, "one shape"),
        ({"o": np.array([np.nan, 0.5])}, "NaN"),
        ({"coherency": np.array([50.0, 70.0])}, "percentages"),
        ({"insertion": np.array([0.5])}, "p, insertion must have one shape"),
        ({"deletion": np.array([0.5, np.nan])}, "deletion must be numbers"),
        ({"energy_in_box": np.array([3.0, np.nan])}, "energy_in_box must be in"),
    ],
)
def test_columns_that_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        BYUN.summary(COLUMNS | change)


def test_missing_columns_are_named():
    with pytest.raises(InputError, match=r"column coherency, complexity; got \['p', 'o'\]"):
        BYUN.summary({"p": [0.5], "o": [0.5]})
