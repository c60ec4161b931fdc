"""open_clip's image towers with prompts, tiny and in float64, against whole forward passes."""

import copy
from functools import partial

import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import nn

from comparison import assert_depth_equals_reference
from conftest import tiny_images, tiny_model
from tiny_open_clip import (
    GRID,
    MASKINGS,
    around_timm,
    assert_exact,
    at_block,
    at_pool,
    images_for,
    last_block,
    vit,
    zero_shot,
)
from vit_reciprocam import ReciproCAM
from vit_reciprocam.core.masks import KERNELS
from vit_reciprocam.errors import (
    ClosedFormError,
    InputError,
    ModelError,
)

TOWERS = {
    "plain": lambda: vit(),
    "even_heads": lambda: vit(heads=4),  # MultiheadAttention's fused path wants an even number
    "quick_gelu": lambda: vit(act_layer=QuickGELU),
    "layer_scale": lambda: vit(ls_init_value=0.5),
    "no_ln_pre": lambda: vit(no_ln_pre=True),
    "ln_after_pool": lambda: vit(final_ln_after_pool=True),
    "patch_dropout": lambda: vit(patch_dropout=0.5),
    "one_block": lambda: vit(layers=1),
    "custom": lambda: vit(block_type="custom"),
    "qk_norm": lambda: vit(qk_norm=True),
    "normformer": lambda: vit(scale_heads=True, scale_attn=True, scale_fc=True),
    "all_custom": lambda: vit(
        qk_norm=True, scale_heads=True, scale_attn_inner=True, scale_attn=True, ls_init_value=0.3
    ),
    "timm": lambda: around_timm(),
    "timm_mlp": lambda: around_timm(proj="mlp"),
    "timm_own_head": lambda: around_timm(proj=None),
    "timm_no_projection": lambda: around_timm(proj="none"),
}
DIRECT = {
    "mean": (lambda: vit(pool_type="avg"), "reads all patches"),
    "attention_pool": (
        lambda: vit(attentional_pool=True, attn_pooler_queries=3, attn_pooler_heads=2),
        "attention pooler reads all tokens",
    ),
    "timm_mean": (lambda: around_timm(pool="avg"), "reads all tokens"),
    "timm_map": (lambda: around_timm(pool="map", proj="none"), "reads all tokens"),
}


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("name", TOWERS)
def test_towers_that_read_the_class_token_equal_the_naive_loops(name, masking):
    assert_exact(TOWERS[name](), "closed-form", masking)


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("name", DIRECT)
def test_towers_that_pool_equal_the_naive_loops(name, masking):
    build, words = DIRECT[name]
    tower = build()
    assert_exact(tower, "direct", masking)
    with pytest.raises(ClosedFormError, match=words):
        ReciproCAM(zero_shot(tower), path="closed-form")


def test_one_query_of_an_attention_pooler():
    tower = vit(attentional_pool=True, attn_pooler_queries=1, attn_pooler_heads=2)
    assert_exact(tower, "direct", MASKINGS[0])


def test_checkpointing_changes_nothing():
    tower = vit()
    tower.set_grad_checkpointing()
    assert_exact(tower, "closed-form", MASKINGS[0])


@pytest.mark.parametrize(
    ("options", "part", "words"),
    [
        ({}, "block", "the last block has forward hooks"),
        ({}, "attn", "the last block's attention has forward hooks"),
        ({"qk_norm": True}, "attn", "the last block's attn has forward hooks"),
    ],
)
def test_hooks_in_the_last_block_still_count(options, part, words):
    tower = vit(**options)
    block = last_block(tower)[0]

    def twice(_module, _args, output):
        return (
            tuple(2 * one for one in output if one is not None)
            if isinstance(output, tuple)
            else 2 * output
        )

    (block if part == "block" else block.attn).register_forward_hook(twice)
    assert_exact(tower, "direct", MASKINGS[0])
    with pytest.raises(ClosedFormError, match=words):
        ReciproCAM(zero_shot(tower), path="closed-form")


@pytest.mark.parametrize("part", ["block", "attn"])
def test_blocks_of_unknown_parts_take_the_direct_path(part):
    tower = vit()
    block = last_block(tower)[0]
    module = block if part == "block" else block.attn
    kind = type(module)

    def forward(self, *args, **options):
        return kind.forward(self, *args, **options)

    module.__class__ = type("Own", (kind,), {"forward": forward})
    assert_exact(tower, "direct", MASKINGS[0])
    with pytest.raises(ClosedFormError, match="is a Own, whose parts are not known"):
        ReciproCAM(zero_shot(tower), path="closed-form")


def test_scaled_cosine_attention_has_no_closed_form():
    with pytest.raises(ClosedFormError, match="attention is a scaled cosine"):
        ReciproCAM(zero_shot(vit(scaled_cosine_attn=True)), path="closed-form")


# Other cuts


@pytest.mark.parametrize("masking", MASKINGS[:3])
@pytest.mark.parametrize("block", [-1, -2, -3])
@pytest.mark.parametrize("options", [{}, {"pool_type": "avg"}, {"qk_norm": True}])
def test_earlier_blocks(options, block, masking):
    path = "closed-form" if block == -1 and "pool_type" not in options else "direct"
    find_cut = partial(at_block, block=block)
    assert_exact(vit(layers=3, **options), path, masking, find_cut, block=block)


def test_blocks_that_do_not_exist():
    with pytest.raises(InputError, match=r"-1, the last, to -2.*got -3"):
        ReciproCAM(zero_shot(vit()), block=-3)
    with pytest.raises(ClosedFormError, match="the cut is not in the last block"):
        ReciproCAM(zero_shot(vit()), block=-2, path="closed-form")


def test_the_earlier_blocks_of_a_timm_tower():
    find_cut = partial(at_block, block=-2)
    assert_exact(around_timm(), "direct", MASKINGS[0], find_cut, block=-2)


def pooler(**options):
    settings = {"attentional_pool": True, "attn_pooler_queries": 3, "attn_pooler_heads": 2}
    return vit(**(settings | options))


POOLS = {
    "mean": lambda: vit(pool_type="avg"),
    "mean, norm after": lambda: vit(pool_type="avg", final_ln_after_pool=True),
    "attention": pooler,  # tokens are wider than the queries
    "attention, as wide": lambda: pooler(output_dim=12),
    "attention, the mean of many": lambda: pooler(pool_type="avg", attn_pooler_queries=9),
    "attention, one query": lambda: pooler(attn_pooler_queries=1),
    "timm mean": lambda: around_timm(pool="avg"),
    "timm attention": lambda: around_timm(pool="map", proj="none"),
}


@pytest.mark.parametrize("kernel", ["gaussian", "dirac"])
@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("name", POOLS)
def test_cut_before_the_pooling(name, class_token, kernel):
    masking = {"kernel": kernel, "class_token": class_token, "layer": "pool"}
    assert_exact(POOLS[name](), "closed-form", masking, at_pool)


def test_pools_that_are_not_there_or_of_unknown_parts():
    with pytest.raises(InputError, match="VisionTransformer reads its class token: use layer="):
        ReciproCAM(zero_shot(vit()), layer="pool")
    masking = {"kernel": "gaussian", "class_token": True, "layer": "pool"}
    for find, words in (
        (lambda tower: tower.attn_pool, "the attention pooler has forward hooks"),
        (lambda tower: tower.attn_pool.attn, "the attention pooler's attention has forward hooks"),
    ):
        tower = add_hook(pooler(), find)
        assert_exact(tower, "direct", masking, at_pool)
        with pytest.raises(ClosedFormError, match=words):
            ReciproCAM(zero_shot(tower), layer="pool", path="closed-form")


@pytest.mark.parametrize("masking", MASKINGS)
def test_the_same_weights_in_timm_give_the_same_maps(masking):
    timms = around_timm(proj=None)
    timms.trunk = tiny_model(
        grid=GRID, num_classes=8, pre_norm=True, norm_layer="layernorm", mlp_ratio=2
    ).double()
    with torch.no_grad():
        timms.trunk.head.bias.zero_()
    names = {
        "norm_pre": "ln_pre",
        "patch_embed.proj": "conv1",
        "blocks": "transformer.resblocks",
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attn.qkv.": "attn.in_proj_",
        "attn.proj": "attn.out_proj",
        "fc1": "c_fc",
        "fc2": "c_proj",
    }
    state = {}
    for key, value in timms.trunk.state_dict().items():
        for old, new in names.items():
            key = key.replace(old, new)
        state["ln_post" + key.removeprefix("norm") if key.startswith("norm.") else key] = value
    state["class_embedding"] = state.pop("cls_token").flatten()
    state["positional_embedding"] = state.pop("pos_embed")[0]
    state["proj"] = state.pop("head.weight").T
    del state["head.bias"]
    tower = vit(norm_layer=partial(nn.LayerNorm, eps=timms.trunk.norm.eps))
    tower.load_state_dict(state)
    images = tiny_images(GRID).double()
    one, other = ReciproCAM(zero_shot(timms), **masking), ReciproCAM(zero_shot(tower), **masking)
    torch.testing.assert_close(
        other.scores(images, "all"), one.scores(images, "all"), rtol=1e-10, atol=1e-12
    )


# What is refused, what is left alone


@pytest.mark.parametrize(
    ("build", "cut"),
    [
        (vit, {}),
        (vit, {"block": -2}),
        (around_timm, {}),
        (lambda: vit(pool_type="avg"), {}),
        (pooler, {"layer": "pool"}),
        (pooler, {"layer": "pool", "path": "direct"}),
    ],
)
def test_the_tower_is_left_as_it_was(build, cut):
    tower = build()
    last_block(tower)[1].train()
    before = copy.deepcopy(tower)
    ReciproCAM(zero_shot(tower), **cut).scores(images_for(tower))
    for one, other in zip(before.modules(), tower.modules(), strict=True):
        assert type(one) is type(other)
        assert one.training == other.training
        assert not other._forward_hooks
        assert not other._forward_pre_hooks
    assert vars(before).keys() == vars(tower).keys()


class OwnForward(VisionTransformer):
    def forward(self, x):
        return super().forward(x) / 2


def add_hook(tower, find):
    find(tower).register_forward_hook(lambda _m, _i, output: output)
    return tower


def sequence_first():
    tower = vit()
    tower.transformer.batch_first = False
    return tower


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ModifiedResNet((1, 1, 1, 1), 8, 2, width=8), "ModifiedResNet is not supported"),
        (lambda: OwnForward(8, 4, 12, 1, 3, 2), "OwnForward has a forward of its own"),
        (lambda: TimmModel("test_convnext", 8), "timm's ConvNeXt is not supported"),
        (lambda: vit(pool_type="none"), "does not pool its tokens"),
        (
            lambda: vit(attentional_pool="parallel", attn_pooler_heads=2),
            "does not pool its tokens .*cascade",
        ),
        (lambda: vit(layers=0), "last block is a NoneType"),
        (sequence_first, "Transformer is not open_clip's own"),
        (lambda: add_hook(vit(), lambda tower: tower), "the VisionTransformer has forward hooks"),
        (lambda: add_hook(vit(), lambda tower: tower.transformer), r"hooks \(at transformer\)"),
        (lambda: add_hook(around_timm(), lambda tower: tower), "the TimmModel has forward hooks"),
        (lambda: add_hook(around_timm(), lambda tower: tower.trunk), "has forward hooks"),
        (lambda: vit(patch_dropout=0.5).train(), r"training mode .*PatchDropout"),
    ],
)
def test_towers_that_cannot_be_explained(build, words):
    with pytest.raises(ModelError, match=words):
        ReciproCAM(zero_shot(build()))


@pytest.mark.parametrize("shape", [(1, 3, 12, 8), (1, 1, 8, 12)])
def test_images_that_do_not_fit(shape):
    words = r"takes images of 3 channel\(s\) of 8x12 pixels .* got . of .*force_image_size="
    with pytest.raises(InputError, match=words):
        ReciproCAM(zero_shot(vit()))(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("name", ["plain", "layer_scale", "all_custom", "timm"])
def test_depth_equals_the_naive_loops(name, class_token):
    tower = TOWERS[name]()
    images = images_for(tower)

    def find_cuts(model):
        return [at_block(model, block) for block in (-2, -1)]

    for kernel in KERNELS:
        assert_depth_equals_reference(
            zero_shot(tower, images),
            images,
            GRID,
            kernel=kernel,
            class_token=class_token,
            depth=2,
            prefix=1,
            find_cuts=find_cuts,
            expect_range=-1.0 if kernel == "box5" else 1e-4,  # it may keep the whole grid
        )
