"""torchvision's models, tiny and in float64, against whole forward passes under a hook."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.swin_transformer import (
    SwinTransformerBlock,
)
from torchvision.models.vision_transformer import (
    ConvStemConfig,
    EncoderBlock,
    VisionTransformer,
)

from comparison import assert_depth_equals_reference
from conftest import tiny_images, tiny_model
from tiny_torchvision import (
    MASKINGS,
    add_hook,
    assert_exact,
    at_attention,
    at_ln_1,
    at_norm1,
    at_pool,
    give_own_forward,
    naive,
    shake,
    swin,
    swin_v2,
    vit,
)
from vit_reciprocam import ReciproCAM
from vit_reciprocam.core.masks import KERNELS
from vit_reciprocam.errors import (
    ClosedFormError,
    InputError,
    ModelError,
)

VITS = {
    "plain": {},
    "even_heads": {"num_heads": 4},  # MultiheadAttention's fused path wants an even number
    "conv_stem": {"conv_stem_configs": [ConvStemConfig(6, 3, 2), ConvStemConfig(8, 3, 2)]},
    "tanh_head": {"representation_size": 7},
    "dropout": {"dropout": 0.3, "attention_dropout": 0.3},
    "one_block": {"num_layers": 1},
}


@pytest.mark.parametrize(
    "masking", MASKINGS, ids=lambda masking: "-".join(map(str, masking.values()))
)
@pytest.mark.parametrize("name", VITS)
def test_vision_transformers_equal_the_naive_loops(name, masking):
    images = tiny_images((4, 4)).double()
    assert_exact(vit(**VITS[name]), images, (4, 4), at_ln_1, "closed-form", masking)


def test_the_fused_attention_is_what_runs_without_gradients():
    images, masking = tiny_images((4, 4)).double(), MASKINGS[0]
    model = vit(num_heads=4)
    fused = naive(model, images, (4, 4), at_ln_1, **masking)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        slow = naive(model, images, (4, 4), at_ln_1, **masking)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    torch.testing.assert_close(fused, slow, rtol=1e-9, atol=1e-9)


def test_attention_of_unknown_parts_takes_the_direct_path():
    model = give_own_forward(lambda model: model.encoder.layers[-1].self_attention)
    assert_exact(model, tiny_images((4, 4)).double(), (4, 4), at_ln_1, "direct", MASKINGS[0])
    with pytest.raises(ClosedFormError, match="attention is a Own"):
        ReciproCAM(model, path="closed-form")


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 12}])
def test_attention_with_more_than_its_tokens(options):
    model = VisionTransformer(16, 4, 2, 3, 12, 24, num_classes=5)
    attention = nn.MultiheadAttention(12, 3, batch_first=True, **options)
    model.encoder.layers[-1].self_attention = attention
    path = "closed-form" if "kdim" in options else "direct"
    images = tiny_images((4, 4)).double()
    assert_exact(shake(model), images, (4, 4), at_ln_1, path, MASKINGS[0])


def test_attention_without_biases():
    model = VisionTransformer(16, 4, 2, 3, 12, 24, num_classes=5)
    attention = nn.MultiheadAttention(12, 3, batch_first=True, bias=False)
    model.encoder.layers[-1].self_attention = attention
    images = tiny_images((4, 4)).double()
    assert_exact(shake(model), images, (4, 4), at_ln_1, "closed-form", MASKINGS[0])


@pytest.mark.parametrize("find", [lambda m: m.encoder.layers[-1], lambda m: at_ln_1(m)[1][0]])
def test_hooks_in_the_last_block_still_count(find):
    model = vit()

    def twice(_module, _args, output):
        return 2 * output

    find(model).register_forward_hook(twice)
    path = "direct" if isinstance(find(model), EncoderBlock) else "closed-form"
    assert_exact(model, tiny_images((4, 4)).double(), (4, 4), at_ln_1, path, MASKINGS[0])


SWINS = {
    "v1": (swin, (4, 4), at_norm1),
    "v1_windows": (swin, (6, 9), at_norm1),  # several windows, shifted and padded
    "v1_small": (swin, (2, 3), at_norm1),
    "v2": (swin_v2, (4, 4), at_attention),
    "v2_windows": (swin_v2, (6, 9), at_attention),
}


@pytest.mark.parametrize("masking", MASKINGS[::2] + MASKINGS[1::4])
@pytest.mark.parametrize("name", SWINS)
def test_swin_transformers_equal_the_naive_loops(name, masking):
    build, grid, find = SWINS[name]
    images = tiny_images(grid).double()
    assert_exact(build(), images, grid, find, "direct", masking)


def test_a_swin_transformer_says_why_it_is_direct():
    with pytest.raises(ClosedFormError, match="the head averages all tokens"):
        ReciproCAM(swin(), path="closed-form")


# Other cuts


@pytest.mark.parametrize("block", [-1, -2, -3])
@pytest.mark.parametrize("masking", MASKINGS[:2] + MASKINGS[-1:])
def test_earlier_blocks(masking, block):
    for name, (model, grid, find) in {
        "vit": (vit(num_layers=3), (4, 4), at_ln_1),
        "swin": (swin(depths=[1, 3]), (6, 9), at_norm1),
        "swin_v2": (swin_v2(depths=[1, 3]), (6, 9), at_attention),
    }.items():
        path = "closed-form" if name == "vit" and block == -1 else "direct"
        at_block = partial(find, block=block)
        images = tiny_images(grid).double()
        assert_exact(model, images, grid, at_block, path, masking, block=block)


@pytest.mark.parametrize("build", [vit, swin])
def test_blocks_that_do_not_exist(build):
    with pytest.raises(InputError, match=r"-1, the last, to -2.*got -3"):
        ReciproCAM(build(), block=-3)


@pytest.mark.parametrize("kernel", ["gaussian", "dirac"])
@pytest.mark.parametrize(("build", "grid"), [(swin, (4, 4)), (swin, (6, 9)), (swin_v2, (6, 9))])
def test_cut_before_the_pooling(build, grid, kernel):
    masking = {"kernel": kernel, "layer": "pool"}
    assert_exact(build(), tiny_images(grid).double(), grid, at_pool, "closed-form", masking)


def test_pools_that_are_not_there_or_no_mean():
    with pytest.raises(InputError, match="VisionTransformer reads its class token: use layer="):
        ReciproCAM(vit(), layer="pool")
    with pytest.raises(InputError, match="cuts after the last block: leave out block"):
        ReciproCAM(swin(), layer="pool", block=-2)
    model = swin()
    model.avgpool = nn.AdaptiveMaxPool2d(1)
    with pytest.raises(InputError, match=r"the head pools by AdaptiveMaxPool2d\("):
        ReciproCAM(model, layer="pool")
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.avgpool.register_forward_hook(lambda _module, _args, output: 2 * output)
    with pytest.raises(ModelError, match="the AdaptiveAvgPool2d has forward hooks"):
        ReciproCAM(model, layer="pool")


def convert(state):
    """Return a state dict of timm's Vision Transformer with torchvision's names."""
    names = {
        "cls_token": "class_token",
        "pos_embed": "encoder.pos_embedding",
        "patch_embed.proj": "conv_proj",
        "blocks.": "encoder.layers.encoder_layer_",
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attn.qkv.": "self_attention.in_proj_",
        "attn.proj": "self_attention.out_proj",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.3",
        "head": "heads.head",
    }
    result = {}
    for key, value in state.items():
        for old, new in names.items():
            key = key.replace(old, new)
        result["encoder.ln" + key.removeprefix("norm") if key.startswith("norm") else key] = value
    return result


@pytest.mark.parametrize("masking", MASKINGS)
def test_the_same_weights_in_timm_give_the_same_maps(masking):
    timms = tiny_model(grid=(4, 4), mlp_ratio=2).double()
    model = vit()
    model.load_state_dict(convert(timms.state_dict()))
    images = tiny_images((4, 4)).double()
    one, other = ReciproCAM(timms, **masking), ReciproCAM(model, **masking)
    torch.testing.assert_close(
        other.scores(images, "all"), one.scores(images, "all"), rtol=1e-10, atol=1e-12
    )
    np.testing.assert_allclose(other(images, "all").maps, one(images, "all").maps, atol=1e-6)


# What is refused, what is left alone


@pytest.mark.parametrize("build", [vit, swin, swin_v2])
@pytest.mark.parametrize("path", ["auto", "direct"])
def test_the_model_is_left_as_it_was(build, path):
    model = build()
    model.encoder.layers[0].train() if build is vit else model.head.train()
    before = copy.deepcopy(model)
    ReciproCAM(model, path=path).scores(tiny_images((4, 4)).double())
    for one, other in zip(before.modules(), model.modules(), strict=True):
        assert one.training == other.training
        assert not other._forward_hooks
        assert not other._forward_pre_hooks
    for key, value in before.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])


class OwnForward(VisionTransformer):
    def forward(self, x):
        return super().forward(x) / 2


def no_head(**options):
    model = vit()
    model.heads = nn.Sequential(**options)
    return model


def identity_head():
    model = swin()
    model.head = nn.Identity()
    return model


def own_swin_block():
    class Own(SwinTransformerBlock):
        def forward(self, x):
            return super().forward(x)

    return swin(block=Own)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (resnet18, "ResNet is not supported: it is neither"),
        (lambda: OwnForward(16, 4, 1, 3, 12, 24), "OwnForward has a forward of its own"),
        (no_head, "no classification head"),
        (identity_head, "no classification head"),
        (lambda: vit(num_layers=0), "block of this VisionTransformer is a NoneType"),
        (
            lambda: give_own_forward(lambda m: m.encoder.layers[-1]),
            "is a Own, .* must be torchvision's",
        ),
        (own_swin_block, r"is a Own, which is not supported: .* SwinTransformerBlock"),
        (lambda: add_hook(lambda m: m), "the VisionTransformer has forward hooks"),
        (lambda: add_hook(lambda m: m.encoder), "the Encoder has forward hooks"),
        (lambda: add_hook(lambda m: m.encoder.layers), r"hooks \(at encoder.layers\)"),
    ],
)
def test_what_cannot_be_explained_is_refused(build, words):
    with pytest.raises(ModelError, match=words):
        ReciproCAM(build())


@pytest.mark.parametrize(
    ("build", "shape", "words"),
    [
        (vit, (1, 3, 16, 20), r"takes images of 16x16 pixels \(height x width\), got 16x20"),
        (vit, (1, 1, 16, 16), r"takes 3 channel\(s\), got images of 1"),
        (swin, (1, 3, 16, 18), "multiples of 4 by 4 pixels .* got 16x18"),
        (swin, (1, 3, 0, 16), "got 0x16"),
        (swin, (1, 4, 16, 16), r"takes 3 channel\(s\), got images of 4"),
    ],
)
def test_images_that_do_not_fit(build, shape, words):
    with pytest.raises(InputError, match=words):
        ReciproCAM(build())(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_depth_equals_the_naive_loops(kernel, class_token):
    def find_cuts(model):
        return [(layer, [layer.ln_1], "output") for layer in model.encoder.layers]

    masking = {"kernel": kernel, "class_token": class_token, "prefix": 1, "find_cuts": find_cuts}
    model, images = vit(num_layers=3), tiny_images((4, 4)).double()
    for depth in (2, 3):
        assert_depth_equals_reference(model, images, (4, 4), depth=depth, **masking)


def test_swin_transformers_have_no_depth():
    with pytest.raises(ClosedFormError, match=r"head averages all tokens\. Use depth=1"):
        ReciproCAM(swin(), depth=2)
