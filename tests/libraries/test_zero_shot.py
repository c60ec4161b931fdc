"""Prompts as classes, with CLIP models of both libraries."""

import open_clip
import pytest
import torch
import transformers

from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.libraries.open_clip.split import zero_shot as zero_shot_open_clip
from vit_reciprocam.libraries.transformers.split import zero_shot as zero_shot_transformers


def codes(texts, length=8):
    """Return texts as numbers, one per letter, between a start and an end."""
    rows = [[0, *(2 + ord(letter) % 40 for letter in text[: length - 2]), 49] for text in texts]
    return torch.tensor([row + [49] * (length - len(row)) for row in rows])


def clip_of_transformers():
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3}
    text = sizes | {"vocab_size": 50, "max_position_embeddings": 8}
    text |= {"bos_token_id": 0, "eos_token_id": 49}
    vision = sizes | {"intermediate_size": 24, "patch_size": 4, "image_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = transformers.CLIPModel(config).eval()

    def tokenizer(texts, **_options):
        return {"input_ids": codes(texts)}

    def embed(texts):
        return model.get_text_features(**tokenizer(texts)).pooler_output

    return zero_shot_transformers, model, tokenizer, embed


def clip_of_open_clip():
    vision = open_clip.CLIPVisionCfg(layers=1, width=12, head_width=4, patch_size=4, image_size=8)
    text = open_clip.CLIPTextCfg(width=8, heads=2, layers=1, context_length=8, vocab_size=50)
    model = open_clip.CLIP(8, vision_cfg=vision, text_cfg=text).eval()
    return zero_shot_open_clip, model, codes, lambda texts: model.encode_text(codes(texts))


CLIPS = [clip_of_transformers, clip_of_open_clip]


@torch.no_grad()
@pytest.mark.parametrize("build", CLIPS)
def test_only_a_templates_own_place_is_filled(build):
    torch.manual_seed(0)
    zero_shot, model, tokenizer, embed = build()
    made = zero_shot(model, tokenizer, ["ab", "{}"], ["{} {x}"])
    expected = torch.nn.functional.normalize(embed(["ab {x}", "{} {x}"]), dim=-1)
    torch.testing.assert_close(made.prompts, expected)
    assert (made.prompts[0] - made.prompts[1]).abs().max() > 1e-3


@pytest.mark.parametrize("build", CLIPS)
@pytest.mark.parametrize(
    ("prompts", "templates", "words"),
    [
        ("dog", ["{}"], "prompts must be a list of at least one text, got 'dog'"),
        ([], ["{}"], "prompts must be a list"),
        ([3], ["{}"], "prompts must be a list"),
        (3, ["{}"], "prompts must be a list of at least one text, got 3"),
        (["dog"], "{}", "templates must be a list"),
        (["dog"], ["a photo"], "template 'a photo' has no place {} for the prompt"),
        (["dog"], ["{}", "{0}"], r"template '\{0\}' has no place"),
    ],
)
def test_prompts_that_cannot_be_used(build, prompts, templates, words):
    zero_shot, model, tokenizer, _ = build()
    with pytest.raises(InputError, match=words):
        zero_shot(model, tokenizer, prompts, templates)


@pytest.mark.parametrize("build", CLIPS)
def test_prompts_are_not_embedded_in_training_mode(build):
    zero_shot, model, tokenizer, _ = build()
    with pytest.raises(ModelError, match=r"CLIP.* is in training mode: call model\.eval\(\) first"):
        zero_shot(model.train(), tokenizer, ["dog"])
    assert all(module.training for module in model.modules())
