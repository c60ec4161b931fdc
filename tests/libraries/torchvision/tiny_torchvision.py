"""Tiny models of torchvision in float64, and their scores by whole forward passes under a hook."""

import itertools

import numpy as np
import torch
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)
from torchvision.models.vision_transformer import (
    VisionTransformer,
)

from reference import naive_logits
from vit_reciprocam import ReciproCAM

MASKINGS = [
    {"kernel": kernel, "class_token": class_token, "layer": layer}
    for kernel, class_token, layer in itertools.product(
        ["gaussian", "dirac"], [True, False], ["norm1", "block"]
    )
]


def shake(model, spread=0.3):
    """Return the model in float64, with weights large enough for masks to matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += spread * torch.randn_like(parameter)
    return model.double().eval()


def vit(**options):
    sizes = {
        "image_size": 16,
        "patch_size": 4,
        "num_layers": 2,
        "num_heads": 3,
        "hidden_dim": 12,
        "mlp_dim": 24,
        "num_classes": 5,
    }
    return shake(VisionTransformer(**(sizes | options)))


def swin(**options):
    sizes = {
        "patch_size": [2, 2],
        "embed_dim": 8,
        "depths": [1, 2],
        "num_heads": [1, 2],
        "window_size": [4, 4],
        "num_classes": 5,
    }
    return shake(SwinTransformer(**(sizes | options)))


def swin_v2(**options):
    return swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2, **options)


def give_own_forward(find):
    """Return a ViT with one module whose forward is its own but does the same."""
    model = vit()
    module = find(model)
    kind = type(module)

    def forward(self, *args, **options):
        return kind.forward(self, *args, **options)

    module.__class__ = type("Own", (kind,), {"forward": forward})
    return model


def add_hook(find):
    model = vit()
    find(model).register_forward_hook(lambda _m, _i, output: output)
    return model


def at_ln_1(model, block=-1):
    block = model.encoder.layers[block]
    return block, [block.ln_1], "output"


def at_norm1(model, block=-1):
    block = model.features[-1][block]
    return block, [block.norm1], "output"


def at_attention(model, block=-1):
    block = model.features[-1][block]
    return block, [block.attn], "input"


def at_pool(model):
    return None, [model.norm], "output"


def naive(model, images, grid, find, *, kernel, class_token=True, layer="norm1"):
    return naive_logits(
        model,
        images,
        grid,
        find_cut=find,
        prefix=1 if isinstance(model, VisionTransformer) else 0,
        kernel=kernel,
        class_token=class_token,
        layer="norm1" if layer == "pool" else layer,
    )[0]


def assert_exact(model, images, grid, find, path, masking, **cut):
    expected = naive(model, images, grid, find, **masking)
    assert expected.std(dim=(2, 3)).min() > 1e-4, "the masks make no difference: nothing was tested"
    explainer = ReciproCAM(model, score="logit", **masking, **cut)
    explanation = explainer(images, "all")
    assert explanation.path == path
    torch.testing.assert_close(explainer.scores(images, "all"), expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        np.testing.assert_allclose(explanation.logits, model(images).float(), rtol=1e-6)
    other = ReciproCAM(model, score="logit", path="direct", **masking, **cut)
    torch.testing.assert_close(other.scores(images, "all"), expected, rtol=1e-9, atol=1e-9)
