"""The bundled model: what it was exported from, how well it predicts, and where its maps lie."""

import numpy as np
import pytest
import torch

import onnx
from export_demo import PICTURE_SEED
from vit_reciprocam import ReciproCAM, explain, load
from vit_reciprocam.classifier.load import ASSETS
from vit_reciprocam.core.masks import Masking
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.onnx.export.export import export
from vit_reciprocam.onnx.run.explainer import OnnxExplainer
from vit_reciprocam.onnx.run.sessions import open_session
from vit_reciprocam.pictures.scenes import CLASSES, draw_scene

FRESH = range(700_000, 701_000)  # seeds of scenes used neither for training nor for choosing


@pytest.fixture(scope="module")
def demo():
    return load("demo")


def inputs(demo, seeds):
    return np.stack([demo.preprocess(draw_scene(seed).image) for seed in seeds])


@pytest.mark.parametrize("batch", [1, 5])
def test_onnx_equals_pytorch(demo, demo_torch_model, batch):
    images = inputs(demo, FRESH[:batch])
    expected = ReciproCAM(demo_torch_model)(torch.from_numpy(images), "all")
    e = demo.model(images, "all")
    np.testing.assert_allclose(e.logits, expected.logits, rtol=0, atol=1e-4)
    np.testing.assert_allclose(e.scores, expected.scores, rtol=0, atol=1e-5)
    outputs = demo.model.session.run(["logits", "saliency", "scores"], {"images": images})
    np.testing.assert_array_equal(outputs[0], e.logits)
    np.testing.assert_allclose(outputs[1], e.maps, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(outputs[2], e.scores)
    plain = open_session(ASSETS / "demo-plain.onnx").run(["logits"], {"images": images})[0]
    np.testing.assert_allclose(plain, expected.logits, rtol=0, atol=1e-4)


def test_files_are_small_and_hold_standard_operators_only():
    for name in ("demo.onnx", "demo-plain.onnx"):
        model = onnx.load(ASSETS / name)
        onnx.checker.check_model(model, full_check=True)
        assert {opset.domain for opset in model.opset_import} == {""}
        assert {node.domain for node in model.graph.node} <= {""}
        assert not model.functions
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
        assert b".py" not in (ASSETS / name).read_bytes(), "a path of the machine it was made on"
    assert sum(path.stat().st_size for path in ASSETS.glob("*.onnx")) < 8_000_000


def test_on_a_thousand_fresh_scenes_the_top_class_is_present(demo):
    right = 0
    for start in range(0, len(FRESH), 100):
        scenes = [draw_scene(seed) for seed in FRESH[start : start + 100]]
        images = np.stack([demo.preprocess(scene.image) for scene in scenes])
        top = demo.model(images).targets[:, 0]
        right += sum(int(t) in scene.labels for t, scene in zip(top, scenes, strict=True))
    assert right >= 950


def test_in_two_class_scenes_each_maximum_lies_on_its_own_object(demo):
    on_target = 0
    for start in range(0, len(FRESH), 100):
        scenes = [draw_scene(seed, objects=2) for seed in FRESH[start : start + 100]]
        images = np.stack([demo.preprocess(scene.image) for scene in scenes])
        e = demo.model(images, [scene.labels for scene in scenes])
        for maps, scene in zip(e.maps, scenes, strict=True):
            on_target += all(
                peak_is_on(one, mask) for one, mask in zip(maps, scene.masks, strict=True)
            )
    assert on_target >= 900


def peak_is_on(saliency, mask):
    """Tell whether the mask reaches into the patch of the map's maximum."""
    rows, columns = saliency.shape
    row, column = np.unravel_index(saliency.argmax(), saliency.shape)
    tall, wide = mask.shape[0] // rows, mask.shape[1] // columns
    return mask[row * tall : (row + 1) * tall, column * wide : (column + 1) * wide].any()


def test_the_bundled_picture_shows_what_the_demo_finds(demo):
    e = explain(ASSETS / "demo.png", demo, top=3)
    scene = draw_scene(PICTURE_SEED, size=560, objects=3)
    assert set(e.names[0]) == {list(CLASSES)[label] for label in scene.labels}


def test_settings_outside_the_graph_are_refused(demo):
    with pytest.raises(
        InputError, match=r"fixed when its file was written: kernel='gaussian'.*--model timm"
    ):
        demo.backend.make_explainer(kernel="dirac")
    with pytest.raises(InputError, match="fixed when its file was written"):
        demo.backend.make_explainer(score="logit")
    with pytest.raises(InputError, match="path must be one of 'auto', 'closed-form'"):
        demo.backend.make_explainer(path="direct")


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((1, 3, 8, 8), np.float32), r"must be \(B, 3, 112, 112\), got \(1, 3, 8, 8\)"),
        (np.full((1, 3, 112, 112), np.nan, np.float32), "NaN"),
        (np.zeros((0, 3, 112, 112), np.float32), "must be"),
    ],
)
def test_inputs_that_do_not_fit(demo, images, words):
    with pytest.raises(InputError, match=words):
        demo.model(images)


def test_files_that_are_no_explainers(tmp_path):
    with pytest.raises(ModelError, match="no such model file"):
        OnnxExplainer(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="holds no explanation"):
        OnnxExplainer(ASSETS / "demo-plain.onnx")


@pytest.mark.parametrize(
    "masking", [Masking("dirac"), Masking("gaussian", False), Masking("gaussian", True, "block")]
)
def test_export_of_other_settings(tmp_path, demo_torch_model, demo, masking):
    path = tmp_path / "model.onnx"
    export(
        demo_torch_model,
        path,
        class_names=list(CLASSES),
        preprocess=demo.preprocess,
        name="other",
        kernel=masking.kernel,
        class_token=masking.class_token,
        layer=masking.layer,
    )
    images = inputs(demo, FRESH[:3])  # another batch than it was exported with
    explainer = OnnxExplainer(path)
    assert explainer.metadata.masking == masking
    settings = {
        "kernel": masking.kernel,
        "class_token": masking.class_token,
        "layer": masking.layer,
    }
    expected = ReciproCAM(demo_torch_model, **settings)(torch.from_numpy(images), "all")
    np.testing.assert_allclose(explainer(images, "all").scores, expected.scores, rtol=0, atol=1e-5)


def test_export_refuses_a_pooling_that_is_not_there(tmp_path, demo_torch_model, demo):
    settings = {"class_names": list(CLASSES), "preprocess": demo.preprocess, "name": "m"}
    with pytest.raises(InputError, match="reads its class token"):
        export(demo_torch_model, tmp_path / "m.onnx", layer="pool", **settings)
