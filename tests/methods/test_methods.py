"""METHODS: one signature, maps in [0, 1], settings checked before anything runs."""

import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import vit_reciprocam as vr
from conftest import tiny_images, tiny_model
from vit_reciprocam import methods
from vit_reciprocam.classifier.load import ASSETS
from vit_reciprocam.cli import app
from vit_reciprocam.core.maps import min_max, positive_part
from vit_reciprocam.errors import InputError, MissingDependencyError
from vit_reciprocam.methods import METHODS, MethodSpec, baselines, null, peers


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_one_signature(name):
    model, images = tiny_model(seed=1, depth=4), tiny_images()
    maps = METHODS[name](model, images, targets=[[0, 3]])
    assert maps.shape == (2, 2, 2, 3)
    assert maps.dtype == torch.float32
    assert not maps.requires_grad
    if name == "uniform":
        assert torch.equal(maps, torch.ones_like(maps))
        return
    scale = min_max
    if name in null.NULLS:
        own = baselines.null_baseline(name, model, images, [[0, 3]])
    elif name in methods.SIGNED:
        scale = positive_part
        settings = methods.PRESETS.get(name)
        method = vr.reciprocam.reciprocam if settings else getattr(baselines, name)
        own = method(model, images, [[0, 3]], **(settings or {}))
        assert own.min() < 0
    else:
        home = peers if hasattr(peers, name) else baselines
        home = vr.reciprocam if name == "reciprocam" else home
        own = getattr(home, name)(model, images, [[0, 3]])
    assert np.array_equal(maps.numpy(), scale(own.numpy())[0])
    assert maps.amin() == 0
    assert maps.amax() == 1


def test_scaling_on_the_device_is_that_of_arrays_to_the_bit():
    scores = np.random.default_rng(0).normal(size=(8, 2, 5, 7)).astype(np.float32)
    scores[1] = 0.999 + 1e-7 * scores[1]  # constant but for rounding
    scores[2] = [[[0.3]], [[-2.0]]]
    scores[3] = 0
    scores[4] = 0.999 + 1e-5 * scores[4]  # nearly constant
    scores[5] = 1e-30 * abs(scores[5])
    scores[6] = 1e30 * scores[6]
    scores[7, :, 1:] = scores[7, 0, 0, 0]
    expected, degenerate = min_max(scores)
    assert degenerate.any(axis=1).tolist() == [False, True, True, True, *[False] * 4]
    maps = methods._min_max(torch.from_numpy(scores)).numpy()
    np.testing.assert_array_equal(maps.view(np.int32), expected.view(np.int32))


def test_reciprocam_is_the_explainers():
    model, images = tiny_model(), tiny_images()
    maps = METHODS["reciprocam"](model, images, 2, kernel="dirac", class_token=False)
    e = vr.ReciproCAM(model, kernel="dirac", class_token=False)(images, 2)
    assert np.array_equal(maps.numpy(), e.maps)


@pytest.mark.parametrize(
    ("text", "name", "settings", "again"),
    [
        ("rollout", "rollout", {}, "rollout"),
        (
            "reciprocam:kernel=dirac,class_token=False",
            "reciprocam",
            {"kernel": "dirac", "class_token": False},
            "reciprocam:class_token=false,kernel=dirac",
        ),
        ("random:seed=3,cells=5", "random", {"seed": 3, "cells": 5}, "random:cells=5,seed=3"),
        ("center:sigma=0.25", "center", {"sigma": 0.25}, "center:sigma=0.25"),
    ],
)
def test_a_method_as_text(text, name, settings, again):
    spec = MethodSpec.parse(text)
    assert (spec.name, spec.settings, str(spec)) == (name, settings, again)
    assert MethodSpec.parse(again) == spec


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gradcam", "method must be one of .*'grad_cam'.* got 'gradcam'"),
        ("reciprocam:kernel", "expected NAME:KEY=VALUE"),
        ("reciprocam:=dirac", "expected NAME:KEY=VALUE"),
        ("reciprocam:kernel=", "expected NAME:KEY=VALUE"),
    ],
)
def test_bad_text(text, words):
    with pytest.raises(InputError, match=words):
        MethodSpec.parse(text)


def test_bad_settings_are_refused_before_computing():
    images = "never looked at"
    with pytest.raises(InputError, match=r"of rollout must be .*'head_fusion'.* got 'fuse'"):
        METHODS["rollout"](tiny_model(), images, fuse="max")
    with pytest.raises(InputError, match="method uniform has no settings; got 'size'"):
        METHODS["uniform"](tiny_model(), images, size=3)
    with pytest.raises(InputError, match=r"setting of reciprocam must be .*'kernel'"):
        METHODS["reciprocam"](tiny_model(), images, kernal="dirac")


def test_null_baselines_are_the_same_everywhere():
    for baseline in null.NULLS.values():
        assert baseline.clause.startswith("which ")  # for the sentences of reports
    model, images = tiny_model(), tiny_images()
    for name, settings in (("random", {"seed": 3, "cells": 5}), ("center", {"sigma": 0.3})):
        maps = METHODS[name](model, images, 2, **settings)
        drawn = null.null_maps(name, images.numpy(), maps.shape[-2:], **settings)
        assert np.array_equal(maps[:, 0].numpy(), drawn)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "vit_reciprocam.methods.peers")
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(MissingDependencyError, match=r"occlusion.*vit-reciprocam\[compare\]"):
        METHODS["occlusion"](tiny_model(), tiny_images())


def test_explain_by_another_method(tmp_path):
    torch.manual_seed(0)
    import timm

    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "w.pth")
    classifier = vr.load("timm:test_vit", weights=tmp_path / "w.pth")
    e = vr.explain(ASSETS / "demo.png", classifier, top=2, method="rollout", head_fusion="max")
    assert e.settings["method"] == "rollout"
    assert e.settings["head_fusion"] == "max"
    assert e.maps.shape == (1, 2, 10, 10)
    assert e.maps.max() == 1
    with pytest.raises(InputError, match=r"ONNX file must be .*'reciprocam', .*'center', .* got"):
        vr.explain(ASSETS / "demo.png", vr.load("demo"), method="rollout")
    command = ["explain", str(ASSETS / "demo.png"), "--model", "timm:test_vit"]
    command += ["--weights", str(tmp_path / "w.pth"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, "--method", "raw_attention"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "demo" / "grid.png").exists()
    result = CliRunner().invoke(app, [*command, "--method", "rollout", "--layer", "block"])
    assert result.exit_code == 2
    assert "--layer: for method reciprocam only, not for rollout" in result.output
