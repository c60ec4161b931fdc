"""timm's other transformers against a naive loop: whole forward passes with one module masked."""

import contextlib
import itertools

import pytest
import timm
import torch
from timm import models

from reference import naive_mask
from tiny_hierarchical import CASES, shake, swin
from vit_reciprocam import ReciproCAM
from vit_reciprocam.errors import ClosedFormError, InputError, ModelError
from vit_reciprocam.libraries.timm.hierarchical import split


@torch.no_grad()
def naive(model, images, grid, prefix, where, kernel):
    scores = []
    for row, column in itertools.product(*map(range, grid)):
        mask = torch.tensor(naive_mask(grid, row, column, kernel, prefix, True)).double()

        def change(x, mask=mask):
            if x.ndim == 3:
                return x * mask[:, None]
            laid = mask.view(grid)
            return x * (laid if x.shape[2:] == laid.shape else laid[..., None])

        hook = where(model, change)
        scores.append(model(images))
        hook.remove()
    return torch.stack(scores, dim=-1).unflatten(-1, grid)


def assert_equal_naive(model, size, grid, prefix, where):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, *size, generator=generator).double()
    for kernel in ("gaussian", "dirac"):
        expected = naive(model, images, grid, prefix, where, kernel)
        explainer = ReciproCAM(model, score="logit", kernel=kernel)
        scores = explainer.scores(images, "all")
        single = isinstance(model, models.deepseek_vit.DeepseekVitClassifier)  # norms in float32
        close = 1e-6 if single else 1e-9
        torch.testing.assert_close(scores, expected, rtol=10 * close, atol=close)
        if grid != (1, 1):
            assert (expected.amax((-2, -1)) - expected.amin((-2, -1))).max() > 1e-3, "masks matter"
    plain = model(images).detach().float().numpy()
    assert explainer(images).logits == pytest.approx(plain, rel=1e-5, abs=1e-5)
    with pytest.raises(ClosedFormError):
        ReciproCAM(model, path="closed-form")
    ReciproCAM(model, layer="block").scores(images[:1])


@pytest.mark.parametrize("case", CASES)
def test_equals_the_naive_loop(case):
    build, *rest = CASES[case]
    assert_equal_naive(shake(build()), *rest)


REFUSED = {
    "crossvit_tiny_240": "two token grids",
    "edgenext_xx_small": "between channels",
    "mobilevit_xxs": "interleaved grids",
    "poolformer_s12": "MetaFormerBlock, has no attention",
    "convformer_s18": "MetaFormerBlock, has no attention",
    "fastvit_t8": "RepMixerBlock, has no attention",
    "coat_tiny": "three token grids",
    "focalnet_tiny_srf": "has no attention",
    "mixer_s16_224": "has no attention",
    "resnet18": "has no attention",
    "densenet121": "no attention between patch tokens is known",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name):
    model = timm.create_model(name, device="meta", num_classes=5)
    with pytest.raises(
        ModelError, match=f"{type(model).__name__} is not supported.*{REFUSED[name]}"
    ):
        split(model)


@pytest.mark.parametrize(
    ("cls", "options", "reason"),
    [
        (
            models.xcit.Xcit,
            {"cls_attn_layers": 0, "embed_dim": 32, "depth": 1},
            "no class attention",
        ),
        (
            models.davit.DaVit,
            {
                "attn_types": ("channel",),
                "depths": (1, 1),
                "embed_dims": (8, 8),
                "num_heads": (2, 2),
            },
            "between channels",
        ),
    ],
)
def test_members_of_supported_classes_without_token_attention(cls, options, reason):
    with pytest.raises(ModelError, match=reason):
        split(cls(num_classes=5, **options))


def test_code_of_its_own_is_refused():
    class Own(models.swin_transformer.SwinTransformer):
        def forward_features(self, x):
            return super().forward_features(x) * 2

    with pytest.raises(ModelError, match="forward_features of its own"):
        ReciproCAM(swin(Own)())


def test_sizes_that_a_model_cannot_take():
    for case, size in (("SwinTransformer", (32, 32)), ("TinyVit", (64, 64))):
        model = shake(CASES[case][0]())
        with pytest.raises(InputError, match="images"):
            split(model).cut(torch.zeros(1, 3, *size).double())


def test_nothing_is_left_on_the_model_when_the_head_fails():
    model = shake(CASES["SwinTransformerV2"][0]())
    part = split(model)
    with contextlib.suppress(RuntimeError), part.tap.changed(lambda x, _: x[..., :1]):
        model(torch.zeros(1, 3, 24, 40).double())
    assert "_attn" not in vars(part.block)
