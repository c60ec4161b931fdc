"""Models from no library, cut at a module that the user names or by the user's own split."""

import dataclasses

import numpy as np
import pytest
import torch

from conftest import tiny_images, tiny_model
from reference import naive_mask
from vit_reciprocam import ReciproCAM
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.libraries.cut_at import cut_at
from vit_reciprocam.libraries.timm.split import split as split_timm

LAYERS = ["norm1", "block"]


class Own(torch.nn.Module):
    """A model from no library, with convolutions and one attention."""

    def __init__(self, grid_output):
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 12, 4, stride=4)
        self.norm = torch.nn.LayerNorm(12)
        self.mix = torch.nn.Linear(12, 12)
        self.attention = torch.nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = torch.nn.Linear(12, 5)
        self.grid_output = grid_output

    def forward(self, images):
        x = self.embed(images).permute(0, 2, 3, 1)
        if not self.grid_output:
            x = x.flatten(1, 2)
        x = (x + self.mix(self.norm(x))).reshape(len(images), -1, 12)
        return self.head(self.attention(x, x, x, need_weights=False)[0].amax(dim=1))


@pytest.mark.parametrize(
    ("target", "grid_output", "shape"),
    [
        ("norm", True, (2, 3, 1)),  # (B, h, w, D)
        ("norm", False, (6, 1)),  # (B, T, D)
        ("embed", True, (2, 3)),  # (B, D, h, w)
    ],
)
def test_own_module_by_target(target, grid_output, shape):
    torch.manual_seed(0)
    model, grid = Own(grid_output).double().eval(), (2, 3)
    module = getattr(model, target)
    images = tiny_images(grid).double()
    explainer = ReciproCAM(model, target=module, score="logit", grid=grid)
    scores = explainer.scores(images, "all")
    expected = torch.empty(2, 5, *grid, dtype=torch.float64)
    for row, column in np.ndindex(*grid):
        mask = naive_mask(grid, row, column, "gaussian", 0, True)
        mask = torch.tensor(mask, dtype=torch.float64).view(shape)
        hook = module.register_forward_hook(lambda _m, _i, out, mask=mask: out * mask)
        expected[:, :, row, column] = model(images).detach()
        hook.remove()
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)
    assert explainer(images).path == "direct"
    assert not any(module._forward_hooks for module in model.modules())


def test_target_equals_the_adapter_on_a_vit():
    model, images = tiny_model(grid=(2, 3), reg_tokens=2), tiny_images((2, 3))
    expected = ReciproCAM(model).scores(images, "all")
    by_hand = ReciproCAM(model, target=model.blocks[-1].norm1, grid=(2, 3), prefix_tokens=3)
    torch.testing.assert_close(by_hand.scores(images, "all"), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"grid": (2, 2)},
            r"grid=\(2, 2\) is 4 patches, but the target LayerNorm gives \(2, 6, 12\): 6 tokens",
        ),
        ({}, r"gives \(2, 6, 12\): say how the patches lie with grid=\(h, w\)"),
        ({"target": "embed"}, r"Conv2d gives \(2, 12, 2, 3\): say how the patches lie with grid="),
        (
            {"target": "embed", "grid": (3, 2)},
            r"\(2, 12, 2, 3\), in which grid=\(3, 2\) is neither of \(B, h, w, D\) nor of",
        ),
        ({"target": "embed", "grid": (2, 3), "prefix_tokens": 1}, "has no prefix"),
        ({"grid": 6}, r"grid must be \(h, w\), two positive whole numbers of patches, got 6"),
        ({"grid": (6,)}, r"grid must be .* got \(6,\)"),
        ({"grid": (-2, -3)}, r"grid must be .* got \(-2, -3\)"),
        ({"grid": (1.5, 4)}, r"grid must be .* got \(1\.5, 4\)"),
        ({"grid": (2, 3), "prefix_tokens": -1}, "whole number and not negative, got -1"),
        ({"grid": (2, 3), "prefix_tokens": "1"}, "whole number and not negative, got '1'"),
        ({"grid": (2, 3), "layer": "block"}, "leave out layer and block"),
        ({"target": torch.nn.Linear(1, 1)}, "one of the model's own modules"),
        ({"target": "head", "grid": (1, 1)}, "must give tokens"),
        ({"target": None, "grid": (2, 3)}, "go with target"),
        ({"grid": (2, 3), "split": split_timm}, "leave out one"),
        (
            {"target": None, "split": split_timm, "layer": "pool"},
            "leave out layer='pool' and block",
        ),
        ({"target": None, "split": split_timm, "block": -2}, "leave out layer='pool' and block"),
        ({"target": None, "split": split_timm, "grid": (2, 3)}, "go with target"),
        ({"target": None, "split": "timm"}, "split must be a function, got str"),
        ({"target": None, "split": lambda model: model}, "Split, but gave VisionTransformer"),
    ],
)
def test_targets_that_make_no_sense(settings, words):
    model = Own(grid_output=False).eval()
    target = settings.get("target", model.norm)
    target = getattr(model, target) if isinstance(target, str) else target
    explained = tiny_model() if target is None else model
    with pytest.raises(InputError, match=words):
        ReciproCAM(explained, **(settings | {"target": target}))(tiny_images())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layout_that_may_be_two_is_refused():
    class Square(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Conv2d(3, 2, 4, stride=4)

        def forward(self, images):
            return self.embed(images).mean(dim=(2, 3))

    model = Square().eval()
    explainer = ReciproCAM(model, target=model.embed, grid=(2, 2))
    with pytest.raises(InputError, match=r"may be \(B, h, w, D\) or \(B, D, h, w\)"):
        explainer(tiny_images((2, 2)))


class TokensFirst(torch.nn.Module):
    """A model around torch's encoder layer with its defaults, which takes (T, B, D)."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 12, 4, stride=4)
        self.encoder = torch.nn.TransformerEncoderLayer(12, 3, 24)
        self.head = torch.nn.Linear(12, 5)

    def forward(self, images):
        return self.head(self.encoder(self.embed(images).flatten(2).permute(2, 0, 1)).mean(dim=0))


class Windows(torch.nn.Module):
    """A model with two windows per image, in the batch dimension."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 12, 4, stride=4)
        self.encoder = torch.nn.LayerNorm(12)
        self.head = torch.nn.Linear(12, 5)

    def forward(self, images):
        windows = self.embed(images).flatten(2).mT.reshape(-1, 3, 12)
        return self.head(self.encoder(windows).view(len(images), 6, 12).amax(dim=1))


@pytest.mark.parametrize(
    ("build", "grid", "count", "words"),
    [
        (TokensFirst, (2, 3), 6, r"gives 6 rows for 7 image\(s\), \(6, 7, 12\): .* \(T, B, D\)"),
        (TokensFirst, (2, 3), 4, r"gives 6 rows for 4 image\(s\)"),
        (TokensFirst, (1, 1), 1, r"gives 6 rows for 1 image\(s\)"),
        (Windows, (1, 3), 2, r"gives 4 rows for 2 image\(s\), .* windows in its batch"),
    ],
)
def test_tokens_without_one_row_per_image_are_refused(build, grid, count, words):
    model = build().eval()
    # one mask at a time: with six images and six tokens no shape would be wrong
    explainer = ReciproCAM(model, target=model.encoder, grid=grid, memory_limit=1)
    with pytest.raises(InputError, match=words):
        explainer(tiny_images(count=count))


def test_as_many_tokens_as_images_is_no_mistake():
    torch.manual_seed(0)
    model = Own(grid_output=False).double().eval()
    explainer = ReciproCAM(model, target=model.norm, grid=(2, 3))
    images = tiny_images(count=6).double()
    torch.testing.assert_close(
        explainer.scores(images, "all")[:2], explainer.scores(images[:2], "all")
    )


def test_a_model_that_joins_its_images_is_refused():
    model = Own(grid_output=False).eval()
    model.head.register_forward_hook(lambda _module, _args, output: output.mean(0, keepdim=True))
    explainer = ReciproCAM(model, target=model.norm, grid=(2, 3))
    with pytest.raises(ModelError, match="one row of logits per image, but gave 1 for 2 images"):
        explainer(tiny_images())


class DropsOnItsOwn(Own):
    def forward(self, images):
        return torch.nn.functional.dropout(super().forward(images), 0.5, self.training)


@pytest.mark.parametrize("how", ["target", "split"])
def test_own_code_in_training_mode_is_refused(how):
    model = DropsOnItsOwn(grid_output=False).eval()
    cut = {"target": model.norm, "grid": (2, 3)}
    if how == "split":
        made = cut_at(model.norm, grid=(2, 3))(model)
        cut = {"split": lambda _model: made}
    explainer = ReciproCAM(model, **cut)
    assert explainer(tiny_images()).path == "direct"
    model.training = True  # the model itself, but no module inside it
    with pytest.raises(ModelError, match=r"the model is in training mode, .*call model\.eval\(\)"):
        explainer(tiny_images())
    model.eval().mix.train()
    with pytest.raises(ModelError, match=r"its mix \(Linear\) is in training mode"):
        ReciproCAM(model, **cut)
    assert model.mix.training
    assert not model.training


@pytest.mark.parametrize("layer", LAYERS)
def test_own_split(layer):
    model, images = tiny_model(reg_tokens=1), tiny_images()
    called = []

    def split(given):
        called.append(given)
        return split_timm(given)

    explainer = ReciproCAM(model, split=split, layer=layer)
    expected = ReciproCAM(model, layer=layer)(images, "all")
    e = explainer(images, "all")
    np.testing.assert_array_equal(e.scores, expected.scores)
    assert e.path == expected.path == "closed-form"
    model.load_state_dict(tiny_model(seed=5, reg_tokens=1).state_dict())
    np.testing.assert_array_equal(
        explainer(images, "all").scores, ReciproCAM(model, layer=layer)(images, "all").scores
    )
    assert all(one is model for one in called)


def test_a_split_that_promises_a_closed_form_without_a_readout():
    model = Own(grid_output=False).eval()
    made = cut_at(model.norm, grid=(2, 3))(model)
    made = dataclasses.replace(made, direct_because="")
    with pytest.raises(ModelError, match="no readout: say so in its direct_because"):
        ReciproCAM(model, split=lambda _model: made)(tiny_images())
