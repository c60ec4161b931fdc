"""Images, settings and models that cannot be used are refused with the reason."""

import warnings

import numpy as np
import pytest
import timm
import torch

from conftest import tiny_images, tiny_model
from vit_reciprocam import ReciproCAM
from vit_reciprocam.errors import InputError, ModelError


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(3, 8, 12), r"\(B, 3, H, W\), got \(3, 8, 12\); add the batch dimension"),
        (torch.zeros(1, 3, 8, 8), "takes images of 8x12 pixels .*, got 8x8. Resize them"),
        (torch.zeros(1, 1, 8, 12), r"takes 3 channel\(s\), got images of 1"),
        (torch.zeros(0, 3, 8, 12), "empty batch"),
        (torch.zeros(1, 3, 8, 12).double(), "images are torch.float64 and the model torch.float32"),
        (torch.zeros(1, 3, 8, 12, device="meta"), "images are on the meta device"),
        (np.zeros((1, 3, 8, 12)), "must be a torch.Tensor .* got ndarray"),
    ],
)
def test_images_that_do_not_fit(images, words):
    with pytest.raises(InputError, match=words):
        ReciproCAM(tiny_model())(images)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_the_input_names_the_image(value):
    images = tiny_images(count=3)
    images[1, 0, 2, 2] = value
    with pytest.raises(InputError, match=r"NaN or infinity: image\(s\) 1 of the batch"):
        ReciproCAM(tiny_model())(images)


def test_nan_in_the_weights():
    model = tiny_model()
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="logits hold NaN or infinity"):
        ReciproCAM(model)(tiny_images())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kernel": "disk"}, "kernel must be one of"),
        ({"layer": "norm2"}, "layer must be one of"),
        (
            {"score": "softmax"},
            "score must be one of 'probability', 'log-probability', 'logit'; got 'softmax'",
        ),
        ({"path": "fast"}, "path must be one of 'auto', 'closed-form', 'direct'; got 'fast'"),
        ({"memory_limit": 0}, "memory_limit must be a positive"),
    ],
)
def test_settings_that_do_not_exist(settings, words):
    with pytest.raises(InputError, match=words):
        ReciproCAM(tiny_model(), **settings)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            timm.create_model("test_resnet"),
            "ResNet is not supported: it has no attention",
        ),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear is not a supported model"),
        (timm.create_model("test_vit", features_only=True), "not a classifier but gives features"),
        (None, "must be a torch.nn.Module, got NoneType"),
        ("deit", "must be a torch.nn.Module, got str"),
        (tiny_model(num_classes=0), "no classification head.*reset_classifier"),
        (tiny_model(global_pool="", class_token=True), "no pooling"),
    ],
)
def test_models_that_cannot_be_explained(model, words):
    with pytest.raises(ModelError, match=words):
        ReciproCAM(model)


def test_blocks_without_a_norm_are_refused_by_name():
    model = tiny_model()
    model.blocks.append(torch.nn.Linear(12, 12))
    with pytest.raises(ModelError, match="last encoder block is a Linear"):
        ReciproCAM(model)


def test_code_and_hooks_that_running_the_parts_would_bypass_are_refused():
    class Mine(type(tiny_model())):
        def forward(self, x):
            return super().forward(x) * 2

    model = tiny_model()
    model.__class__ = Mine
    with pytest.raises(ModelError, match="Mine has a forward of its own"):
        ReciproCAM(model)
    model = tiny_model()
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError, match="has forward hooks"):
        ReciproCAM(model)


def test_scripted_and_compiled_models_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, but traced models are still around
        traced = torch.jit.trace(tiny_model(), tiny_images(), check_trace=False)
    with pytest.raises(ModelError, match=r"scripted.*pass the original"):
        ReciproCAM(traced)
    with pytest.raises(ModelError, match=r"compiled.*_orig_mod"):
        ReciproCAM(torch.compile(tiny_model()))


def test_a_distilled_model_in_distilled_training():
    model = tiny_model(distilled=True).train()
    model.set_distilled_training(True)
    with pytest.raises(ModelError, match=r"two outputs in distilled training: call model\.eval"):
        ReciproCAM(model)


def test_one_module_in_training_mode_is_enough():
    model = tiny_model(drop_path_rate=0.2)
    explainer = ReciproCAM(model)
    model.blocks[-1].train()
    with pytest.raises(ModelError, match="training mode"):
        explainer(tiny_images())


def test_training_mode_matters_only_where_it_changes_the_output():
    images = tiny_images()
    without_dropout = tiny_model().train()
    assert ReciproCAM(without_dropout)(images).path == "closed-form"
    model = tiny_model(drop_path_rate=0.2)
    explainer = ReciproCAM(model)
    model.train()
    with pytest.raises(
        ModelError, match=r"training mode and its blocks\.1\.drop_path1.*model\.eval\(\)"
    ):
        explainer(images)
    assert model.training
