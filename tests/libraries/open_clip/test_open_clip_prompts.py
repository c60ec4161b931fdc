"""Text prompts as classes of open_clip's models."""

import numpy as np
import pytest
import torch
from open_clip.coca_model import CoCa, MultimodalCfg
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from torch import nn

from conftest import tiny_images
from tiny_open_clip import PROMPTS, TEXT, VISION, shake, tokenize, vit, whole
from vit_reciprocam import ReciproCAM
from vit_reciprocam.errors import (
    InputError,
    ModelError,
)
from vit_reciprocam.libraries.open_clip import split as adapter


@pytest.mark.parametrize(
    "options",
    [{}, {"init_logit_bias": -3.0}, {"nonscalar_logit_scale": True, "init_logit_bias": 1.0}],
)
@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
def test_zero_shot_gives_open_clips_logits(kind, options):
    model, images = whole(kind, **options), tiny_images((4, 4)).double()
    shot = adapter.zero_shot(model, tokenize, PROMPTS)
    with torch.no_grad():
        expected, _ = model.get_logits(images, tokenize(PROMPTS))
        torch.testing.assert_close(shot(images), expected, rtol=1e-10, atol=1e-10)
    explanation = ReciproCAM(shot)(images, "all")
    assert (explanation.maps.shape, explanation.path) == ((2, 3, 4, 4), "closed-form")
    np.testing.assert_allclose(explanation.logits, expected.float(), rtol=1e-6)


@torch.no_grad()
def test_templates_are_averaged_after_normalisation():
    model, templates = whole(), ["a photo of a {}.", "{} in the rain"]
    shot = adapter.zero_shot(model, tokenize, ["dog", "cat"], templates)
    for number, name in enumerate(["dog", "cat"]):
        texts = tokenize([template.format(name) for template in templates])
        mean = nn.functional.normalize(model.encode_text(texts), dim=-1).mean(dim=0)
        torch.testing.assert_close(shot.prompts[number], mean / mean.norm())


def test_coca_gives_its_features_alone():
    decoder = MultimodalCfg(context_length=16, width=8, heads=2, layers=1)
    vision = {"output_tokens": True, "attentional_pool": True, "attn_pooler_heads": 2}
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    model = shake(CoCa(8, decoder, CLIPTextCfg(**text), CLIPVisionCfg(**(VISION | vision))))
    images = tiny_images((4, 4)).double()
    shot = adapter.zero_shot(model, tokenize, PROMPTS)
    assert model.visual.output_tokens
    with torch.no_grad():
        cosine = model.encode_image(images) @ model.encode_text(tokenize(PROMPTS)).T
        torch.testing.assert_close(shot(images), model.logit_scale.exp() * cosine)
    explanation = ReciproCAM(shot)(images)
    assert explanation.path == "direct"
    with torch.no_grad():
        np.testing.assert_allclose(explanation.logits, shot(images).float(), rtol=1e-6)


@pytest.mark.parametrize(
    ("prompts", "templates", "words"),
    [
        ("a dog", ["{}"], "prompts must be a list of at least one text, got 'a dog'"),
        ([], ["{}"], "prompts must be a list"),
        ([3], ["{}"], "prompts must be a list"),
        (["dog"], [], "templates must be a list"),
        (["dog"], ["a photo"], "template 'a photo' has no place {} for the prompt"),
    ],
)
def test_prompts_that_cannot_be_used(prompts, templates, words):
    with pytest.raises(InputError, match=words):
        adapter.zero_shot(whole(), tokenize, prompts, templates)


def test_models_that_zero_shot_cannot_take():
    with pytest.raises(ModelError, match="VisionTransformer is not a CLIP model"):
        adapter.zero_shot(vit(), tokenize, PROMPTS)
    with pytest.raises(ModelError, match=r"CLIP is in training mode: call model\.eval"):
        adapter.zero_shot(whole().train(), tokenize, PROMPTS)


@pytest.mark.parametrize("build", [whole, vit])
def test_without_prompts_there_are_no_classes(build):
    words = r"no classes until it is given prompts: .*zero_shot\(model, tokenizer, \['a photo"
    with pytest.raises(ModelError, match=words):
        adapter.split(build())
