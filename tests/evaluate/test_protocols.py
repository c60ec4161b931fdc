import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision import transforms as T

from vit_reciprocam.errors import InputError
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


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_masked_images_by_the_protocols_upsampling(protocol):
    images, maps = rng().normal(size=(2, 3, 8, 8)), rng().random((2, 2, 2))
    wide = F.interpolate(torch.from_numpy(maps)[:, None], (8, 8), mode=protocol.upsampling)
    np.testing.assert_allclose(protocol.masked_images(images, maps), images * wide.numpy())
