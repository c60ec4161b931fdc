"""Rollout and raw attention against naive loops."""

import pytest
import torch
from timm.models.vision_transformer import ResPostBlock

from baseline_methods import GRID, TARGETS, assert_near, images64, model_of
from conftest import MODELS, tiny_model
from reference_relevance import attention_of, naive_rollout
from vit_reciprocam.methods.baselines import (
    raw_attention,
    relevance,
    rollout,
)


@pytest.mark.parametrize("name", MODELS)
def test_rollout_is_the_product_over_layers(name):
    model, images = model_of(name), images64()
    readouts = 2 if name == "distilled" else 1
    rows = naive_rollout(attention_of(model, images), readouts=readouts)
    maps = rollout(model, images, TARGETS)
    assert maps.shape == (2, 2, *GRID)
    for column in range(2):
        assert_near(maps[:, column], rows[:, model.num_prefix_tokens :].unflatten(1, GRID))


@pytest.mark.parametrize(
    "settings", [{"head_fusion": "max"}, {"head_fusion": "min"}, {"start_layer": 1}]
)
def test_rollout_settings(settings):
    model, images = tiny_model(depth=3).double(), images64()
    wanted = naive_rollout(
        attention_of(model, images),
        fuse=settings.get("head_fusion", "mean"),
        start=settings.get("start_layer", 0),
    )
    assert_near(rollout(model, images, **settings)[:, 0], wanted[:, 1:].unflatten(1, GRID))
    assert not torch.allclose(rollout(model, images, **settings), rollout(model, images))


def test_rollout_discards_the_smallest_weights_of_each_image():
    model, images = model_of("plain"), images64()
    kept = []
    for layer in attention_of(model, images):
        fused = layer.mean(dim=1)
        for image in fused:
            smallest = image.flatten().argsort()[: int(49 * 0.4)]  # 7 tokens
            image.view(-1)[smallest] = 0
        kept.append(fused[:, None])
    assert_near(
        rollout(model, images, discard_ratio=0.4)[:, 0],
        naive_rollout(kept)[:, 1:].unflatten(1, GRID),
    )


@pytest.mark.parametrize("name", MODELS)
def test_raw_attention_is_the_last_layers(name):
    model, images = model_of(name), images64()
    readouts = 2 if name == "distilled" else 1
    rows = attention_of(model, images)[-1].mean(dim=1)[:, :readouts].mean(dim=1)
    wanted = rows[:, model.num_prefix_tokens :].unflatten(1, GRID)
    assert_near(raw_attention(model, images)[:, 0], wanted)


def test_layer_norms_after_attention_and_mlp():
    model = tiny_model(block_fn=ResPostBlock).double()
    images = images64()
    assert_near(
        rollout(model, images)[:, 0],
        naive_rollout(attention_of(model, images))[:, 1:].unflatten(1, GRID),
    )
    assert (relevance(model, images) >= 0).all()
