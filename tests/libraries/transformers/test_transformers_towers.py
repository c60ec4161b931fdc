"""Image towers of transformers with text prompts as classes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from conftest import tiny_images
from tiny_transformers import TEXT, VISION, WIDE, assert_equal, build, images_of, naive
from vit_reciprocam.errors import (
    ClosedFormError,
    InputError,
    ModelError,
)
from vit_reciprocam.libraries.common.zero_shot import ZeroShot
from vit_reciprocam.libraries.transformers.families import image_tower
from vit_reciprocam.libraries.transformers.split import split_tower, zero_shot
from vit_reciprocam.onnx.export.export import export
from vit_reciprocam.onnx.run.explainer import OnnxExplainer
from vit_reciprocam.pictures.preprocess import Preprocess
from vit_reciprocam.reciprocam import ReciproCAM


class Letters:
    """A tokenizer of nine letters."""

    def __call__(self, texts, *, return_tensors, padding, max_length=None):
        ids = [[1 + "abcdefg".index(letter) for letter in text] + [8] for text in texts]
        longest = max_length if padding == "max_length" else max(map(len, ids))
        longest = max(longest, *map(len, ids))
        return {"input_ids": torch.tensor([row + [8] * (longest - len(row)) for row in ids])}


TOWERS = {"CLIPModel": 1, "MetaClip2Model": 1, "SiglipModel": 0}


def two_towers(kind, attention="sdpa"):
    config = {"text_config": TEXT, "vision_config": VISION}
    return build(kind, config | ({} if kind == "SiglipModel" else {"projection_dim": 8}), attention)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", TOWERS)
def test_zero_shot(kind, attention):
    model, images = two_towers(kind, attention), images_of(16)
    prompts = ["ab", "c", "gfe"]
    classifier = zero_shot(model, SimpleNamespace(tokenizer=Letters()), prompts)
    texts = Letters()(prompts, return_tensors="pt", padding="max_length", max_length=6)
    with torch.no_grad():
        wanted = model(pixel_values=images, **texts).logits_per_image
        torch.testing.assert_close(classifier(images), wanted, rtol=1e-6, atol=1e-6)
    one = SimpleNamespace(
        block="tower.vision.encoder.layers.1",
        cut="layer_norm1",
        prefix=TOWERS[kind],
        grid=(4, 4),
    )
    explainer = ReciproCAM(classifier, score="logit")
    assert explainer(images).path == ("direct" if kind == "SiglipModel" else "closed-form")
    tolerance = 1e-9 if attention == "sdpa" else 1e-6
    ours = explainer.scores(images, "all")
    assert_equal(ours, naive(classifier, images, one), tolerance)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", TOWERS)
def test_other_cuts_of_towers(kind, attention):
    classifier = zero_shot(two_towers(kind, attention), Letters(), ["ab", "c", "gfe"])
    images, one = images_of(16), SimpleNamespace(grid=(4, 4), prefix=TOWERS[kind])
    one.block, one.cut = "tower.vision.encoder.layers.0", "layer_norm1"
    earlier = ReciproCAM(classifier, score="logit", block=-2)
    assert_equal(earlier.scores(images, "all"), naive(classifier, images, one))
    if kind != "SiglipModel":
        with pytest.raises(InputError, match="VisionModel reads its class token: use layer="):
            ReciproCAM(classifier, layer="pool")
        return
    for kernel in ("gaussian", "dirac"):
        pooled = "tower.vision.post_layernorm"
        wanted = naive(classifier, images, one, kernel=kernel, pooled=pooled)
        for path in ("closed-form", "direct"):
            settings = {"layer": "pool", "kernel": kernel, "path": path}
            explainer = ReciproCAM(classifier, score="logit", **settings)
            assert_equal(explainer.scores(images, "all"), wanted)


def test_the_attention_pool_is_exported_for_any_batch(tmp_path):
    classifier = zero_shot(two_towers("SiglipModel"), Letters(), ["ab", "c"]).float().eval()
    settings = {"resize": "squash", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    export(
        classifier,
        tmp_path / "model.onnx",
        class_names=["ab", "c"],
        preprocess=Preprocess(size=(16, 16), interpolation="bicubic", **settings),
        name="siglip",
        layer="pool",
    )
    images = tiny_images((4, 4), count=3)
    ours = OnnxExplainer(tmp_path / "model.onnx")(images.numpy(), "all")
    wanted = ReciproCAM(classifier, layer="pool")(images, "all")
    np.testing.assert_allclose(ours.scores, wanted.scores, rtol=0, atol=1e-5)


def test_hooks_on_the_attention_pool_still_count():
    classifier = zero_shot(two_towers("SiglipModel"), Letters(), ["ab", "c"])
    images, one = images_of(16), SimpleNamespace(grid=(4, 4), prefix=0, block="tower")
    head = classifier.tower.vision.head
    for module, double, words in (
        (head, lambda *args: 2 * args[2], "the head's attention pool has forward hooks"),
        (head.attention, lambda *args: (2 * args[2][0],), "the head's attention has forward hooks"),
    ):
        hook = module.register_forward_hook(double)
        wanted = naive(classifier, images, one, pooled="tower.vision.post_layernorm")
        explainer = ReciproCAM(classifier, score="logit", layer="pool")
        assert_equal(explainer.scores(images, "all"), wanted)
        with pytest.raises(ClosedFormError, match=words):
            ReciproCAM(classifier, layer="pool", path="closed-form")
        hook.remove()


def test_templates_are_averaged():
    model = two_towers("CLIPModel")
    single = zero_shot(model, Letters(), ["ab", "ac", "db", "dc"]).prompts
    both = zero_shot(model, Letters(), ["b", "c"], ["a{}", "d{}"]).prompts
    wanted = torch.nn.functional.normalize((single[:2] + single[2:]) / 2, dim=-1)
    torch.testing.assert_close(both, wanted)


def test_zero_shot_refusals():
    model = two_towers("CLIPModel")
    for prompts in ("ab", []):
        with pytest.raises(InputError, match="prompts must be a list of at least one text"):
            zero_shot(model, Letters(), prompts)
    with pytest.raises(InputError, match="a prompt has 8 tokens, the model takes 6: 'abcdefg'"):
        zero_shot(model, Letters(), ["a", "abcdefg"])
    with pytest.raises(ModelError, match="no text encoder"):
        zero_shot(model.vision_model, Letters(), ["a"])


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("CLIPVisionModelWithProjection", VISION | {"projection_dim": 8}),
        ("CLIPVisionModel", VISION),
        ("SiglipVisionModel", VISION),
    ],
)
def test_towers_of_their_own(kind, config):
    model, images = build(kind, config), images_of(16)
    tower, prompts = image_tower(model), torch.randn(3, 8 if "Projection" in kind else 12)
    with torch.no_grad():
        output = model(images)
        wanted = output.image_embeds if "Projection" in kind else output.pooler_output
        assert tower(images).equal(wanted)
    explainer = ReciproCAM(ZeroShot(tower, prompts.double(), scale=10))
    assert explainer(images).maps.shape == (2, 1, 4, 4)
    assert split_tower(model).direct_because == split_tower(tower).direct_because


def test_refused_towers():
    with pytest.raises(ModelError, match="is not a supported model"):
        ReciproCAM(image_tower(two_towers("CLIPModel")))
    with pytest.raises(ModelError, match="gives image features, no class scores"):
        ReciproCAM(two_towers("CLIPModel"))
    with pytest.raises(ModelError, match="ViTModel is not a supported image tower"):
        split_tower(transformers.ViTModel(transformers.ViTConfig(**WIDE)))
    with pytest.raises(ModelError, match="no pooling head"):
        split_tower(build("SiglipVisionModel", VISION | {"vision_use_head": False}))
