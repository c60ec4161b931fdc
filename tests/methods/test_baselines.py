"""Every baseline: batches, precision, what is refused, and the model left as it is."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from baseline_methods import BY_LAYER, GRID, NULLS, TARGETS, assert_near, images64, model_of
from conftest import tiny_model
from reference_relevance import attention_of, naive_rollout
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.methods import baselines
from vit_reciprocam.methods.baselines import (
    relevance,
    rollout,
)
from vit_reciprocam.methods.null import NULLS as DRAWN


@pytest.mark.parametrize("method", BY_LAYER)
def test_a_batch_is_its_images_one_by_one(method):
    model, images = model_of("plain"), images64(3)
    together = method(model, images, [1, 2, 3])
    for number in range(3):
        alone = method(model, images[number : number + 1], number + 1)
        assert_near(alone, together[number : number + 1])
    assert_near(method(model, images, [1, 2, 3], memory_limit=1), together)
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("method", BY_LAYER)
def test_half_precision_gives_maps_in_float32(method):
    model, images = model_of("plain").half(), images64().half()
    maps = method(model, images, TARGETS)
    exact = method(model.double(), images.double(), TARGETS)
    assert maps.dtype == torch.float32
    assert np.corrcoef(maps.flatten(), exact.flatten())[0, 1] > 0.9


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", BY_LAYER)
def test_callers_without_gradients(method, around):
    model, images = model_of("plain"), images64()
    wanted = method(model, images, 2)
    with around():
        made_here = images + 0
        assert_near(method(model, made_here, 2).clone(), wanted)
    assert not wanted.requires_grad
    assert_near(method(model.requires_grad_(False), images, 2), wanted)


@pytest.mark.parametrize("method", BY_LAYER)
@pytest.mark.parametrize("fused", [True, False])
def test_fused_attention_makes_no_difference(method, fused):
    model, images = model_of("plain"), images64()
    wanted = method(model, images, 1)
    for block in model.blocks:
        block.attn.fused_attn = fused
    assert_near(method(model, images, 1), wanted)


class GatedAttention(timm.layers.Attention):
    def __init__(self, *args, **options):
        super().__init__(*args, **options, gated=True)


REFUSED = {
    "mean": (lambda: tiny_model(global_pool="avg"), "head reads all tokens"),
    "no class token": (
        lambda: tiny_model(class_token=False, global_pool="avg"),
        "head reads all tokens",
    ),
    "eva": (
        lambda: timm.create_model("eva02_tiny_patch14_224", num_classes=5, img_size=28).eval(),
        "architecture",
    ),
    "gate": (lambda: tiny_model(attn_layer=GatedAttention), "its block 0's attention is gated"),
    "no head": (lambda: tiny_model(num_classes=0), "no classification head"),
}


@pytest.mark.parametrize("method", BY_LAYER)
@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_models_are_refused(method, name):
    build, reason = REFUSED[name]
    model = build()
    model.patch_embed.register_forward_hook(lambda *_: pytest.fail("it computed"))
    with pytest.raises(ModelError, match=reason):
        method(model, torch.zeros(1, 3, 28, 28))


def test_what_has_no_rule_has_rollout_but_no_relevance():
    model, images = tiny_model(mlp_layer=timm.layers.GluMlp).double(), images64()
    wanted = naive_rollout(attention_of(model, images))[:, 1:].unflatten(1, GRID)
    assert_near(rollout(model, images)[:, 0], wanted)
    with pytest.raises(ModelError, match="it has a GluMlp, which is not a plain linear"):
        relevance(model, images)


@pytest.mark.parametrize("method", BY_LAYER)
def test_a_model_that_is_not_its_parts_is_refused(method):
    model, images = model_of("plain"), images64()
    mlp = model.blocks[0].mlp

    class Twice(type(mlp)):
        def __call__(self, x):
            return 2 * super().__call__(x)

    mlp.__class__ = Twice
    with pytest.raises(ModelError, match=f"not supported by {method.__name__}: its forward"):
        method(model, images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start_layer": 2}, "start_layer must be from 0 to 1.*got 2"),
        ({"start_layer": -1}, "start_layer must be"),
        ({"head_fusion": "median"}, "head_fusion must be one of 'mean', 'max', 'min'"),
        ({"discard_ratio": 1.0}, "discard_ratio must be"),
        ({"memory_limit": 0}, "memory_limit must be"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(InputError, match=message):
        rollout(model_of("plain"), images64(), **settings)


@pytest.mark.parametrize("method", BY_LAYER + NULLS)
def test_images_and_targets_are_checked(method):
    model = model_of("plain")
    with pytest.raises(InputError, match=r"images must be \(B, 3, H, W\)"):
        method(model, images64()[0])
    with pytest.raises(InputError, match="takes images of 8x12"):
        method(model, torch.zeros(1, 3, 16, 16).double())
    with pytest.raises(InputError, match="class 5 does not exist"):
        method(model, images64(), 5)
    with pytest.raises(ModelError, match="not a supported model"):
        method(nn.Linear(2, 2), images64())
    dropping = tiny_model(attn_drop_rate=0.5).double().train()
    with pytest.raises(ModelError, match=r"call model\.eval"):
        method(dropping, images64())


def state_of(model):
    return [
        (
            name,
            module.training,
            list(module._forward_hooks),
            list(module._forward_pre_hooks),
            getattr(module, "fused_attn", None),
            [(p.requires_grad, p.grad, p.dtype, p.sum().item()) for p in module.parameters()],
        )
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("method", BY_LAYER + NULLS)
def test_the_model_is_left_as_it_was(method):
    model, images = model_of("plain"), images64()
    model.head.weight.requires_grad_(False)
    before = state_of(model)
    method(model, images)
    assert state_of(model) == before

    def fail(*_):
        raise RuntimeError("a hook of the user's")

    hook = model.blocks[0].norm1.register_forward_hook(fail)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="a hook of the user's"):
        method(model, images)
    assert state_of(model) == before
    hook.remove()
    method(model, images)


def test_public_names():
    others = {"null_baseline", "grid_and_targets", "split_and_check", "trace", "traced"}
    assert {*(method.__name__ for method in BY_LAYER), *others} == set(baselines.__all__)
    assert {method.__name__ for method in NULLS} == set(DRAWN)
