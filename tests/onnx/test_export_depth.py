"""Exported files with evidence, depth and fused settings: what two runtimes compute from them."""

import copy

import numpy as np
import pytest
from architectures import SIZE, TIMM, images_of, near, onnx_runtime, open_vino, shaken
from timm.models.vision_transformer import VisionTransformer

from vit_reciprocam import ReciproCAM
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.methods import PRESETS
from vit_reciprocam.onnx.export.export import export
from vit_reciprocam.onnx.run.explainer import OnnxExplainer


@pytest.fixture(scope="module")
def model():
    return shaken(VisionTransformer(**(TIMM | {"depth": 4, "reg_tokens": 1})))


@pytest.mark.parametrize(
    "settings",
    [
        {"normalize": "evidence", "targets": "top2"},
        {"normalize": "evidence", "depth": 2, "targets": "input"},
        {"kernel": "box", "depth": 4},
        PRESETS["deep"],
    ],
    ids=["evidence", "depth 2", "depth 4, probabilities", "deep"],
)
def test_two_runtimes_agree_with_pytorch(tmp_path, model, settings):
    path = tmp_path / "model.onnx"
    export(model, path, size=SIZE, **settings)
    method = {name: value for name, value in settings.items() if name != "targets"}
    images = images_of(3, SIZE)
    exact = ReciproCAM(copy.deepcopy(model).double(), **method)(images.double(), None)
    targets = exact.targets
    if "fuse" in settings:  # dividing small evidence by its maximum magnifies its rounding
        targets = ReciproCAM(model)(images, "all").logits.argsort(axis=1)[:, -1:]
    assert np.ptp(exact.ranking, axis=(2, 3)).min() > 1e-3, "the masks do not matter"
    for run in (onnx_runtime(path), open_vino(path)):
        named = {"targets": targets} if settings.get("targets") == "input" else {}
        got = run(images=images.numpy(), **named)
        near(got["logits"], exact.logits)
    for backend in ("onnxruntime", "openvino"):
        explainer = OnnxExplainer(path, backend=backend)
        for count in (1, 3):
            found = explainer(images[:count].numpy(), targets[:count])
            values = exact.evidence if "normalize" in settings else exact.scores
            wanted = values[:count]
            got = found.evidence if "normalize" in settings else found.scores
            if "fuse" in settings:  # a quotient whose divisor may be small
                np.testing.assert_allclose(got, wanted, rtol=5e-3, atol=2e-3)
                np.testing.assert_allclose(found.maps, exact.maps[:count], atol=2e-3)
            else:
                near(got, wanted)
            assert found.settings["normalize"] == settings.get("normalize", "minmax")
            assert (found.evidence is None) == ("normalize" not in settings)


def test_a_file_says_its_settings_and_refuses_others(tmp_path, model):
    path = tmp_path / "model.onnx"
    export(model, path, size=SIZE, **PRESETS["deep:fast"])
    explainer = OnnxExplainer(path)
    assert explainer.metadata.masking.depth == 2
    assert explainer.make_explainer(method="deep:fast") is explainer
    assert explainer.make_explainer(depth=2, normalize="evidence") is explainer
    for other in ({"method": "deep"}, {"depth": 3}, {"normalize": "minmax"}, {"kernel": "box"}):
        with pytest.raises(InputError, match="depth=2, normalize='evidence'"):
            explainer.make_explainer(**other)


def test_what_needs_the_closed_form_is_refused_without_it(tmp_path):
    model = shaken(VisionTransformer(**(TIMM | {"global_pool": "avg"})))
    for setting in ({"depth": 2}, {"normalize": "evidence"}):
        with pytest.raises(ModelError, match=r"need the closed form in a file.*reads all tokens"):
            export(model, tmp_path / "model.onnx", size=SIZE, **setting)
    assert not list(tmp_path.iterdir())
