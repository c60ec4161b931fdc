"""transformers' models and images that are refused, and changed models that are not."""

import pytest
import torch
import transformers
from torch import nn

from tiny_transformers import (
    CASES,
    COMMON,
    NESTED,
    SQUARE,
    WIDE,
    assert_equal,
    images_of,
    model_of,
    naive,
)
from vit_reciprocam.errors import (
    InputError,
    ModelError,
)
from vit_reciprocam.libraries.transformers.split import split
from vit_reciprocam.reciprocam import ReciproCAM


@pytest.mark.parametrize(
    ("kind", "config", "words"),
    [
        ("ViTModel", WIDE, "no classification head"),
        ("BeitForSemanticSegmentation", SQUARE, "made for semantic segmentation"),
        ("ViTForMaskedImageModeling", SQUARE, "made for masked image modeling"),
        ("Dinov2Backbone", SQUARE, "no classification head"),
        ("BertForSequenceClassification", COMMON | {"vocab_size": 9}, "sequence classification"),
        ("CLIPVisionModel", COMMON | {"image_size": 16}, "zero_shot"),
        ("Siglip2ForImageClassification", NESTED, "patches of images of any shape"),
        (
            "ResNetForImageClassification",
            {"hidden_sizes": [4, 8, 8, 8]},
            "not a Vision Transformer",
        ),
        ("ViTForImageClassification", WIDE | {"num_labels": 0}, "num_labels=0"),
        ("DeiTForImageClassificationWithTeacher", WIDE | {"num_labels": 0}, "num_labels=0"),
    ],
)
def test_refused_models(kind, config, words):
    cls = getattr(transformers, kind)
    config = {key: value for key, value in config.items() if key != "patch_size" or "ViT" in kind}
    if kind == "BeitForSemanticSegmentation":
        config |= {"num_hidden_layers": 12, "out_indices": [3, 5, 7, 11], "patch_size": 4}
    with pytest.raises(ModelError, match=words):
        ReciproCAM(cls(cls.config_class(**config)))


def test_refuses_detection_without_running_it():
    config = transformers.YolosConfig(
        **COMMON | {"image_size": [16, 16], "num_detection_tokens": 2}
    )
    with pytest.raises(ModelError, match="made for object detection, not to classify whole images"):
        split(transformers.YolosForObjectDetection(config))


def test_refuses_bypassed_code_and_hooks():
    class Mine(transformers.ViTForImageClassification):
        def forward(self, pixel_values):
            return super().forward(pixel_values * 2)

    config = transformers.ViTConfig(**WIDE)
    with pytest.raises(ModelError, match="Mine has a forward of its own"):
        ReciproCAM(Mine(config))
    model = transformers.ViTForImageClassification(config)
    for module in (model, model.vit):
        hook = module.register_forward_hook(lambda *_: None)
        with pytest.raises(ModelError, match=f"the {type(module).__name__} has forward hooks"):
            ReciproCAM(model)
        hook.remove()
    model.vit.forward = model.vit.forward
    with pytest.raises(ModelError, match="ViTModel has a forward of its own"):
        ReciproCAM(model)


def test_refuses_another_layout():
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**WIDE))
    del model.vit.layers
    with pytest.raises(ModelError, match=r"no attribute 'layers'.*: use transformers 5\.10"):
        ReciproCAM(model)


def test_a_subclass_with_the_library_s_forward_is_supported():
    class Mine(transformers.ViTForImageClassification):
        pass

    assert not split(Mine(transformers.ViTConfig(**WIDE))).direct_because


def test_unknown_parts_take_the_direct_path():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    one = CASES["vit"]
    model, images = model_of(one), images_of(one.size)
    attention = model.vit.layers[1].attention
    hook = attention.register_forward_hook(lambda *_: None)
    assert "attention has forward hooks" in split(model).direct_because
    hook.remove()
    doubled = Doubled(12, 12).double()
    doubled.load_state_dict(attention.v_proj.state_dict())
    attention.v_proj = doubled
    assert "value projection is a Doubled, not a plain Linear" in split(model).direct_because
    ours = ReciproCAM(model, score="logit").scores(images, "all")
    assert_equal(ours, naive(model, images, one))


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("vit", (3, 8, 8), "takes images of 8x12 pixels"),
        ("pvt", (3, 16, 16), "takes images of 32x32 pixels"),
        ("clip", (3, 8, 8), "takes images of 16x16 pixels"),
        ("vit", (1, 8, 12), "takes 3 channel"),
        ("dinov2", (3, 2, 12), "smaller than a patch"),
        ("swin", (3, 32, 32), "windows of 2x2 patches and these images have 4x4"),
        ("swinv2", (3, 16, 32), "windows of 2x2 patches and these images have 2x4"),
    ],
)
def test_refused_images(name, shape, words):
    one = CASES[name]
    with pytest.raises(InputError, match=words):
        ReciproCAM(model_of(one))(torch.zeros(1, *shape, dtype=torch.float64))
