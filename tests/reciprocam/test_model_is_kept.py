"""The user's model is left as it is, and is looked at anew in each call."""

import numpy as np
import pytest
import torch

from conftest import tiny_images, tiny_model
from vit_reciprocam import ReciproCAM
from vit_reciprocam.errors import InputError

PATHS = ["closed-form", "direct"]
LAYERS = ["norm1", "block"]


def state_of(model):
    return {
        "mode": [m.training for m in model.modules()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        "parameters": [
            (name, p.dtype, p.device, p.requires_grad, p.grad, p.data_ptr())
            for name, p in model.named_parameters()
        ],
        "buffers": [(name, b.data_ptr()) for name, b in model.named_buffers()],
        "values": [p.detach().clone() for p in model.state_dict().values()],
        "attributes": {name: sorted(vars(m)) for name, m in model.named_modules()},
        "grad": torch.is_grad_enabled(),
    }


def assert_same(before, after):
    values = zip(before.pop("values"), after.pop("values"), strict=True)
    assert before == after
    assert all(torch.equal(a, b) for a, b in values)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layer", LAYERS)
def test_model_is_left_as_it_was(path, layer):
    model = tiny_model(qk_norm=True, reg_tokens=1)
    next(model.parameters()).requires_grad_(False)
    model.blocks[0].register_forward_hook(lambda *_: None)
    before = state_of(model)
    ReciproCAM(model, path=path, layer=layer)(tiny_images().requires_grad_())
    assert_same(before, state_of(model))


@pytest.mark.parametrize("path", PATHS)
def test_model_is_left_as_it_was_after_a_failure(path):
    model = tiny_model()
    explainer = ReciproCAM(model, path=path)
    fail = model.head.register_forward_hook(lambda *_: 1 / 0)
    before = state_of(model)
    with pytest.raises(ZeroDivisionError):
        explainer(tiny_images())
    with pytest.raises(InputError):
        explainer(tiny_images() * float("nan"))
    assert_same(before, state_of(model))
    fail.remove()


def test_changed_weights_and_heads_are_seen_by_the_same_explainer():
    model, images = tiny_model(), tiny_images()
    explainer = ReciproCAM(model)
    before = explainer(images, 0).scores
    model.load_state_dict(tiny_model(seed=5).state_dict())
    np.testing.assert_array_equal(explainer(images, 0).scores, ReciproCAM(model)(images, 0).scores)
    assert np.abs(explainer(images, 0).scores - before).max() > 1e-3
    model.reset_classifier(2)
    assert explainer(images, "all").scores.shape[1] == 2


def test_inference_tensors():
    model = tiny_model()
    with torch.inference_mode():
        images = tiny_images()
        e = ReciproCAM(model)(images)
    np.testing.assert_allclose(e.scores, ReciproCAM(model)(tiny_images()).scores, atol=1e-6)
    assert ReciproCAM(model)(images).path == "closed-form"
