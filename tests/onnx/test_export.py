"""Exported files: what two runtimes compute, compared with PyTorch and the naive loops."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from architectures import (
    ARCHITECTURES,
    DIRECT,
    SIZE,
    TIMM,
    images_of,
    near,
    onnx_runtime,
    open_vino,
    shaken,
    size_of,
)
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

import onnx
import vit_reciprocam as vr
from conftest import tiny_model
from export_demo import export_prediction
from reference import naive_logits
from vit_reciprocam import ReciproCAM
from vit_reciprocam.errors import ModelError
from vit_reciprocam.onnx.export.export import export


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_two_runtimes_agree_with_pytorch_for_any_batch(tmp_path, name):
    model, size = ARCHITECTURES[name](), size_of(name)
    path = tmp_path / "model.onnx"
    done = export(model, path, size=size)
    assert done.metadata.path == ("direct" if name in DIRECT else "closed-form")
    onnx.checker.check_model(path, full_check=True)
    images = images_of(5, size)
    exact = ReciproCAM(copy.deepcopy(model).double())(images.double(), "all")
    assert np.ptp(exact.scores, axis=(2, 3)).max() > 1e-3, "the masks do not matter"
    for run in (onnx_runtime(path), open_vino(path)):
        for start, stop in ((0, 1), (1, 3), (2, 5), (0, 5)):
            got = run(images=images[start:stop].numpy())
            near(got["logits"], exact.logits[start:stop])
            near(got["scores"], exact.scores[start:stop])
            # scaling to [0, 1] enlarges the rounding of scores that lie close together
            spread = np.ptp(exact.scores[start:stop], axis=(2, 3), keepdims=True)
            error = abs(got["saliency"] - exact.maps[start:stop])
            assert (error <= np.maximum(1e-4, 2e-6 / spread)).all(), error.max()


@pytest.fixture(scope="module")
def model():
    return shaken(VisionTransformer(**TIMM))


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel": "dirac", "layer": "block"},
        {"class_token": False, "opset": 17},
        {"class_token": False, "layer": "block", "opset": 21},
    ],
)
def test_settings_are_those_of_the_naive_loops(tmp_path, model, settings):
    export(model, tmp_path / "model.onnx", size=SIZE, **settings)
    masking = {"kernel": "gaussian", "class_token": True, "layer": "norm1"} | settings
    masking.pop("opset", None)
    images = images_of(3, SIZE)
    wanted, plain = naive_logits(model, images, (3, 5), **masking)
    for run in (onnx_runtime(tmp_path / "model.onnx"), open_vino(tmp_path / "model.onnx")):
        got = run(images=images.numpy())
        near(got["logits"], plain.numpy())
        near(got["scores"], wanted.softmax(dim=1).numpy())


@pytest.mark.parametrize("kind", ["closed form", "direct"])
def test_the_most_probable_classes(tmp_path, model, kind):
    if kind == "direct":
        model = ARCHITECTURES["timm vit, mean pool"]()
    done = export(model, tmp_path / "model.onnx", size=SIZE, targets="top2", raw=True)
    assert done.outputs == ("logits", "scores", "classes")
    images = images_of(3, SIZE)
    exact = ReciproCAM(model)(images, "all")
    wanted = exact.logits.argsort(axis=1)[:, ::-1][:, :2]
    for run in (onnx_runtime(tmp_path / "model.onnx"), open_vino(tmp_path / "model.onnx")):
        got = run(images=images.numpy())
        assert "saliency" not in got
        np.testing.assert_array_equal(got["classes"], wanted)
        near(got["scores"], np.take_along_axis(exact.scores, wanted[:, :, None, None], axis=1))


def test_classes_named_by_an_input(tmp_path, model):
    done = export(model, tmp_path / "model.onnx", size=SIZE, targets="input")
    assert (done.inputs, done.outputs) == (
        ("images", "targets"),
        ("logits", "saliency", "scores"),
    )
    images = images_of(2, SIZE)
    exact = ReciproCAM(model)(images, "all")
    for run in (onnx_runtime(tmp_path / "model.onnx"), open_vino(tmp_path / "model.onnx")):
        for targets in ([[3], [0]], [[1, 1, 4], [0, 2, 3]]):
            targets = np.array(targets)
            got = run(images=images.numpy(), targets=targets)
            wanted = np.take_along_axis(exact.scores, targets[:, :, None, None], axis=1)
            near(got["scores"], wanted)


def test_constant_scores_give_a_map_of_zeros(tmp_path):
    model = VisionTransformer(**TIMM)
    with torch.no_grad():
        model.head.weight.zero_()
    export(model.eval(), tmp_path / "model.onnx", size=SIZE)
    got = onnx_runtime(tmp_path / "model.onnx")(images=images_of(2, SIZE).numpy())
    np.testing.assert_array_equal(got["saliency"], 0)


@pytest.mark.parametrize("factor", [20, 40])
def test_attention_scores_far_apart(tmp_path, factor):
    """Hundreds apart they are exact; thousands apart two of a window blur: the file is refused."""
    model = tiny_model(grid=(3, 5))
    with torch.no_grad():
        model.blocks[-1].attn.qkv.weight[:24] *= factor  # queries and keys
    if factor == 40:
        with pytest.raises(ModelError, match="scores differ from PyTorch's"):
            export(model, tmp_path / "model.onnx", size=SIZE)
        return
    export(model, tmp_path / "model.onnx", size=SIZE)
    images = images_of(3, SIZE)
    exact = ReciproCAM(copy.deepcopy(model).double())(images.double(), "all")
    near(onnx_runtime(tmp_path / "model.onnx")(images=images.numpy())["scores"], exact.scores)


def test_any_size_where_the_model_takes_it(tmp_path):
    model = shaken(timm.create_model("test_vit", dynamic_img_size=True), spread=0.02)
    weights, path = tmp_path / "model.safetensors", tmp_path / "model.onnx"
    save_file(model.state_dict(), weights)
    arguments = ["timm:test_vit", path, "--weights", weights, "--dynamic-size"]
    line = ["-m", "vit_reciprocam", "export", *map(str, arguments)]
    # In a process of its own, since the tests' check of shapes cannot handle open sizes.
    subprocess.run([sys.executable, *line, "--option", "dynamic_img_size=true"], check=True)
    run = onnx_runtime(path)
    for size in ((160, 160), (32, 48), (192, 128)):
        images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
        exact = ReciproCAM(model)(images, "all")
        got = run(images=images.numpy())
        near(got["logits"], exact.logits)
        near(got["scores"], exact.scores)


def test_float16_weights(tmp_path):
    model = tiny_model(grid=(3, 5), embed_dim=48)
    whole = export(model, tmp_path / "whole.onnx", size=SIZE)
    half = export(model, tmp_path / "half.onnx", size=SIZE, half=True)
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert whole.bytes - half.bytes > 1.8 * weights
    images = images_of(2, SIZE)
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in rounded.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.half())
    exact = ReciproCAM(rounded)(images, "all")
    for run in (onnx_runtime(tmp_path / "half.onnx"), open_vino(tmp_path / "half.onnx")):
        got = run(images=images.numpy())
        near(got["logits"], exact.logits)
        near(got["scores"], exact.scores)


def test_weights_in_a_file_of_their_own(tmp_path, model):
    path = tmp_path / "model.onnx"
    export(model, path, size=SIZE)
    done = export(model, path, size=SIZE, external_data=True)
    data = tmp_path / "model.onnx.data"
    assert done.files == (path, data)
    assert set(tmp_path.iterdir()) == {path, data}
    assert data.stat().st_size > 10_000
    images = images_of(2, SIZE)
    exact = ReciproCAM(model)(images, "all")
    for run in (onnx_runtime(path), open_vino(path)):
        near(run(images=images.numpy())["scores"], exact.scores)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_become_float32(tmp_path, model, dtype):
    other = copy.deepcopy(model).to(dtype)
    export(other, tmp_path / "model.onnx", size=SIZE)
    assert {parameter.dtype for parameter in other.parameters()} == {dtype}
    images = images_of(2, SIZE)
    exact = ReciproCAM(copy.deepcopy(other).float())(images, "all")
    near(onnx_runtime(tmp_path / "model.onnx")(images=images.numpy())["scores"], exact.scores)


def test_what_load_returns_brings_the_rest(tmp_path):
    classifier = vr.load("timm:test_vit", weights="random")
    done = vr.export(classifier, tmp_path / "model.onnx", targets="top1")
    assert done.metadata.name == "timm:test_vit"
    assert done.metadata.preprocess == classifier.preprocess
    assert done.metadata.class_names == classifier.class_names


def test_the_plain_model(tmp_path, model):
    export_prediction(model, tmp_path / "model.onnx", size=SIZE)
    images = images_of(3, SIZE)
    got = onnx_runtime(tmp_path / "model.onnx")(images=images.numpy())
    assert list(got) == ["logits"]
    near(got["logits"], model(images).numpy())
