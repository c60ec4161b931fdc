"""Peers' methods on token grids against their formulas; the model is left as it was."""

import pytest
import torch
import torchvision
from torch.nn.functional import adaptive_avg_pool2d
from torchvision.models.swin_transformer import SwinTransformerBlockV2

from conftest import tiny_images, tiny_model
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.methods import METHODS, peers

CAMS = [peers.grad_cam, peers.layer_cam, peers.eigen_cam, peers.score_cam]
ALL = [*CAMS, peers.integrated_gradients, peers.occlusion]


def scaled(maps):
    low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-12)


def layer(model, images, targets):
    """Return activations (B, h, w, D) of the last block's first norm, and their gradient."""
    kept = []

    def keep(_module, _args, output):
        output.retain_grad()
        kept.append(output)

    hook = model.blocks[-1].norm1.register_forward_hook(keep)
    logits = model(images)
    hook.remove()
    logits.gather(1, targets).sum().backward()
    gradient = kept[0].grad
    model.zero_grad()
    prefix = model.num_prefix_tokens
    return tuple(t[:, prefix:].detach().unflatten(1, (2, 3)) for t in (kept[0], gradient))


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 3}, {"global_pool": "avg"}])
def test_grad_cam_and_layer_cam_are_their_formulas(options):
    model, images = tiny_model(**options), tiny_images(count=4)
    targets = torch.tensor([[3], [1], [0], [2]])
    activation, gradient = layer(model, images, targets)
    # a channel's weight is its mean gradient over all patches; the map is the sum's positive part
    weighted = (activation * gradient.mean(dim=(1, 2), keepdim=True)).sum(dim=3).relu()
    assert (weighted.flatten(1).amax(dim=1) > 0).sum() >= 2  # else there is little to compare
    found = peers.grad_cam(model, images, targets)[:, 0]
    torch.testing.assert_close(found, scaled(weighted), atol=1e-4, rtol=0)
    weighted = (activation * gradient.relu()).sum(dim=3).relu()
    found = peers.layer_cam(model, images, targets)[:, 0]
    torch.testing.assert_close(found, scaled(weighted), atol=1e-4, rtol=0)


@torch.no_grad()
def test_occlusion_is_the_fall_of_the_probability():
    model, images = tiny_model(), tiny_images()
    found = peers.occlusion(model, images, [[0, 4]])
    whole = model(images).softmax(dim=1)
    for row in range(2):
        for column in range(3):
            hidden = images.clone()
            hidden[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 0
            fall = (whole - model(hidden).softmax(dim=1))[:, [0, 4]]
            torch.testing.assert_close(found[:, :, row, column], fall, atol=1e-6, rtol=1e-5)


def test_integrated_gradients_is_the_integral():
    model, images = tiny_model().double(), tiny_images().double()
    found = peers.integrated_gradients(model, images, 2, steps=200)[:, 0]
    total = torch.zeros_like(images)
    for step in range(2000):  # the midpoint rule, fine enough for both to agree
        x = (images * (step + 0.5) / 2000).requires_grad_()
        total += torch.autograd.grad(model(x)[:, 2].sum(), x)[0] / 2000
    wanted = adaptive_avg_pool2d((images * total).abs().sum(dim=1), (2, 3))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def test_score_cam_weighs_channels_by_the_scores_of_masked_pictures():
    model, images = tiny_model(seed=1), tiny_images(count=1)
    found = peers.score_cam(model, images, 1, batch_size=5)[0, 0]
    activation, _ = layer(model, images, torch.tensor([[1]]))
    channels = activation[0].permute(2, 0, 1)
    up = torch.nn.UpsamplingBilinear2d(size=images.shape[-2:])(channels[None])[0]
    low, high = up.amin(dim=(1, 2), keepdim=True), up.amax(dim=(1, 2), keepdim=True)
    with torch.no_grad():
        scores = model(images * ((up - low) / (high - low + 1e-8))[:, None])[:, 1]
    weighted = (scores.softmax(dim=0)[:, None, None] * channels).sum(dim=0).relu()
    assert weighted.max() > 0
    torch.testing.assert_close(found, scaled(weighted), atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(method, fails, monkeypatch):
    model, images = tiny_model(), tiny_images()
    model.train()  # without effect, as its dropout rates are zero
    first, second = model.blocks[0].norm1.weight, model.head.weight
    first.requires_grad_(False)
    second.grad = torch.ones_like(second)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    kept = images.clone()
    if fails:

        def fail(*_args, **_options):
            raise RuntimeError("in the middle")

        monkeypatch.setattr(peers, "ClassifierOutputTarget", fail)
        monkeypatch.setattr(peers.captum.attr.IntegratedGradients, "attribute", fail)
        monkeypatch.setattr(peers.captum.attr.Occlusion, "attribute", fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            method(model, images)
    else:
        assert method(model, images).shape == (2, 1, 2, 3)
    assert model.training
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert not first.requires_grad
    assert torch.equal(second.grad, torch.ones_like(second))
    assert all(p.grad is None for p in model.parameters() if p is not second)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(images, kept)
    assert not images.requires_grad


@pytest.mark.parametrize("method", ALL)
def test_targets_are_those_of_reciprocam(method):
    model, images = tiny_model(), tiny_images()
    both = method(model, images, [[0, 2]])
    assert both.shape == (2, 2, 2, 3)
    for number, target in enumerate((0, 2)):
        each = method(model, images, target)[:, 0]
        torch.testing.assert_close(both[:, number], each, atol=1e-5, rtol=1e-4)
    top = model(images).argmax(dim=1)
    torch.testing.assert_close(method(model, images), method(model, images, top))


def test_a_model_without_one_layer_of_tokens_is_refused():
    model = torchvision.models.swin_transformer.SwinTransformer(
        [2, 2], 8, [1, 1], [1, 1], [2, 2], num_classes=5, block=SwinTransformerBlockV2
    ).eval()
    images = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ModelError, match=r"no single layer .* occlusion or reciprocam"):
        peers.grad_cam(model, images)
    assert peers.occlusion(model, images).shape == (1, 1, 4, 4)


def test_bad_input():
    model, images = tiny_model(), tiny_images()
    with pytest.raises(InputError, match=r"must be a torch\.Tensor"):
        peers.grad_cam(model, images.numpy())
    with pytest.raises(InputError, match="steps and batch_size must be 1 or more"):
        peers.integrated_gradients(model, images, steps=0)
    with torch.inference_mode(), pytest.raises(InputError, match=r"leave torch\.inference_mode"):
        peers.grad_cam(model, images)
    with pytest.raises(InputError, match="method grad_cam has no settings; got 'layer'"):
        METHODS["grad_cam"](model, images, layer=1)
    with pytest.raises(InputError, match="a setting of occlusion must be one of 'batch_size'"):
        METHODS["occlusion"](model, images, size=1)
