"""timm's families: each branch of the adapter against the naive loops, tiny and in float64."""

import functools
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from timm.layers import Attention, AttentionPoolLatent, DiffAttention, HybridEmbed
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from torch import nn

from comparison import assert_depth_equals_reference
from conftest import tiny_images, tiny_model
from reference import naive_logits
from vit_reciprocam import ReciproCAM
from vit_reciprocam.core.masks import KERNELS
from vit_reciprocam.errors import ClosedFormError, InputError, ModelError

GRID = (3, 5)
SIZES = {
    "img_size": (4 * GRID[0], 4 * GRID[1]),
    "patch_size": 4,
    "embed_dim": 12,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 5,
}


def shake(model, seed=0, spread=0.3):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += spread * torch.randn_like(parameter)
    return model.double().eval()


def eva(**options):
    rope = {"use_abs_pos_emb": False, "use_rot_pos_emb": True, "global_pool": "token"}
    return shake(Eva(**(SIZES | rope | options)))


def beit(**options):
    return shake(Beit(**(SIZES | {"global_pool": "token"} | options)))


def relpos(**options):
    token = {"class_token": True, "global_pool": "token"}
    return shake(VisionTransformerRelPos(**(SIZES | token | options)))


def vit(**options):
    return shake(VisionTransformer(**(SIZES | options)))


def with_attention(attention):
    model = VisionTransformer(**SIZES)
    model.blocks[-1].attn = attention
    return shake(model)


def naflex(**options):
    sizes = {key: value for key, value in SIZES.items() if key not in ("img_size", "num_classes")}
    settings = {"class_token": True, "global_pool": "token", "pos_embed_grid_size": GRID}
    return shake(NaFlexVit(NaFlexVitCfg(**(sizes | settings | options)), num_classes=5))


def at_attention(model):
    block = model.blocks[-1]
    return block, [block.attn], "input"


def at_in_norm(model):
    block = model.blocks[-1]
    return block, [block.in_norm], "output"


def at_every_norm(model):
    block = model.blocks[-1]
    return block, [branch.norm for branch in block.attns], "output"


def shape_of(find_cut):
    return {} if find_cut is None else {"find_cut": find_cut}


CLOSED = {
    "eva": (eva, None),
    "eva swiglu": (lambda: eva(swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True), None),
    "eva fused qkv off, layer scale": (lambda: eva(qkv_fused=False, init_values=0.4), None),
    "eva qk norm, registers": (lambda: eva(qk_norm=True, num_reg_tokens=2), None),
    "eva post norm": (lambda: eva(use_post_norm=True), at_attention),
    "rope attention, key bias": (lambda: eva(attn_type="rope"), None),
    "rope attention, no bias": (lambda: eva(attn_type="rope", qkv_bias=False), None),
    "rope attention, half turns": (lambda: eva(attn_type="rope", rope_rotate_half=True), None),
    "rope mixed": (lambda: eva(attn_type="rope", rope_type="mixed"), None),
    "rope dinov3": (lambda: eva(rope_type="dinov3", rope_rotate_half=True), None),
    "grouped queries": (
        lambda: eva(attn_type="rope", embed_dim=16, num_heads=4, num_kv_heads=2, qkv_fused=False),
        None,
    ),
    "beit": (lambda: beit(use_rel_pos_bias=True, init_values=0.3), None),
    "beit shared bias": (lambda: beit(use_shared_rel_pos_bias=True), None),
    "beit absolute": (lambda: beit(use_abs_pos_emb=True), None),
    "relpos mlp": (relpos, None),
    "relpos bias, qk norm": (lambda: relpos(rel_pos_type="bias", qk_norm=True), None),
    "relpos shared": (lambda: relpos(shared_rel_pos=True), None),
    "relpos post norm": (lambda: relpos(block_fn=ResPostRelPosBlock), at_attention),
    "vit post norm": (lambda: vit(block_fn=ResPostBlock), at_attention),
    "vit gated": (lambda: with_attention(Attention(12, 3, qkv_bias=True, gated=True)), None),
    "parallel scaling": (lambda: vit(block_fn=ParallelScalingBlock, qk_norm=True), at_in_norm),
    "parallel scaling, biased": (
        lambda: vit(block_fn=ParallelScalingBlock, qkv_bias=True, init_values=0.3),
        at_in_norm,
    ),
    "parallel things": (lambda: vit(block_fn=ParallelThingsBlock, init_values=0.3), at_every_norm),
    "naflex": (naflex, None),
    "naflex rope": (lambda: naflex(rope_type="axial", pos_embed="none"), None),
    "naflex gated": (lambda: naflex(attn_gated=True, reg_tokens=1), None),
}
DIRECT = {
    "eva avg": (lambda: eva(global_pool="avg"), None, "reads all tokens"),
    "eva map": (lambda: eva(global_pool="map"), None, "reads all tokens"),
    "beit avg": (lambda: beit(global_pool="avg", use_rel_pos_bias=True), None, "reads all tokens"),
    "naflex avg": (lambda: naflex(global_pool="avg"), None, "reads all tokens"),
    "differential": (lambda: with_attention(DiffAttention(12, 3)), None, "DiffAttention"),
    "differential parallel": (
        lambda: vit(block_fn=DiffParallelScalingBlock),
        at_in_norm,
        "DiffParallelScalingBlock",
    ),
    "parallel things, qk norm": (
        lambda: vit(block_fn=ParallelThingsBlock, qk_norm=True),
        at_every_norm,
        "query and key norms",
    ),
}
MASKINGS = [
    {"kernel": kernel, "class_token": class_token, "layer": layer}
    for kernel, class_token, layer in itertools.product(KERNELS, (True, False), ("norm1", "block"))
]


def assert_equal_naive(model, find_cut, path):
    images = tiny_images(GRID).double()
    for masking in MASKINGS:
        expected, plain = naive_logits(model, images, GRID, **masking, **shape_of(find_cut))
        explainer = ReciproCAM(model, score="logit", path=path, **masking)
        e = explainer(images, "all")
        scores = explainer.scores(images, "all")
        assert (expected.amax((-2, -1)) - expected.amin((-2, -1))).max() > 1e-3, "masks matter"
        torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9, msg=f"{masking}")
        torch.testing.assert_close(torch.tensor(e.logits), plain.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", CLOSED)
def test_closed_form_equals_the_naive_loops(family):
    build, find_cut = CLOSED[family]
    assert_equal_naive(build(), find_cut, "closed-form")


@pytest.mark.parametrize("family", ["eva", "beit", "parallel things", "vit post norm"])
def test_direct_path_equals_the_naive_loops_too(family):
    build, find_cut = CLOSED[family]
    assert_equal_naive(build(), find_cut, "direct")


@pytest.mark.parametrize("family", DIRECT)
def test_direct_path_where_the_closed_form_does_not_hold(family):
    build, find_cut, because = DIRECT[family]
    model = build()
    with pytest.raises(ClosedFormError, match=because):
        ReciproCAM(model, path="closed-form")
    assert_equal_naive(model, find_cut, "auto")


def test_class_attention_of_cait():
    model = shake(Cait(**SIZES, init_values=0.5))
    images = tiny_images(GRID).double()
    for kernel, class_token in itertools.product(KERNELS, (True, False)):
        masking = {"kernel": kernel, "class_token": class_token, "layer": "norm1"}

        def at_class_attention(model):
            block = model.blocks_token_only[-1]
            return block, [block.norm1], "output"

        expected, _ = naive_logits(model, images, GRID, **masking, find_cut=at_class_attention)
        for path in ("closed-form", "direct"):
            explainer = ReciproCAM(model, score="logit", path=path, **masking)
            torch.testing.assert_close(
                explainer.scores(images, "all"), expected, rtol=1e-9, atol=1e-9
            )
    model.global_pool = "avg"
    with pytest.raises(ModelError, match="class attention never changes"):
        ReciproCAM(model)


@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_position_matters_outside_the_window_even_with_extreme_scores(spread):
    for build in (eva, beit):
        model = build(**({"attn_type": "rope"} if build is eva else {"use_rel_pos_bias": True}))
        model = shake(model, spread=spread)
        images = tiny_images(GRID).double()
        expected, _ = naive_logits(
            model, images, GRID, kernel="gaussian", class_token=True, layer="block"
        )
        explainer = ReciproCAM(model, score="logit", path="closed-form", layer="block")
        scores = explainer.scores(images, "all")
        torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_rotated_keys_on_grids_smaller_than_the_window(grid):
    model = eva(img_size=(4 * grid[0], 4 * grid[1]), attn_type="rope")
    images = tiny_images(grid).double()
    masking = {"kernel": "gaussian", "class_token": True, "layer": "norm1"}
    expected, _ = naive_logits(model, images, grid, **masking)
    scores = ReciproCAM(model, score="logit", path="closed-form").scores(images, "all")
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)


def hybrid(**options):
    """Return a ViT on patches of 2x2 numbers of a backbone that halves the image, rounding up."""
    embed = functools.partial(HybridEmbed, backbone=nn.Conv2d(3, 6, 3, stride=2, padding=1))
    return vit(embed_layer=embed, patch_size=2, **options)


@pytest.mark.parametrize("size", [(12, 20), (8, 12), (11, 19)])
@pytest.mark.parametrize("layer", ["norm1", "pool"])
@pytest.mark.parametrize(
    "options",
    [
        {"pos_embed": "none"},
        {"pos_embed": "none", "dynamic_img_pad": True},
        {"dynamic_img_size": True},
    ],
)
def test_a_hybrid_takes_every_size_that_its_positions_take(options, layer, size):
    if layer == "pool":
        options = options | {"global_pool": "avg"}
    model = hybrid(**options)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)).double()
    round_up = math.ceil if model.patch_embed.dynamic_img_pad else math.floor
    grid = tuple(round_up(math.ceil(side / 2) / 2) for side in size)
    masking = {"kernel": "gaussian", "class_token": True}

    def at_pool(model):
        return model.norm, [model.norm], "output"

    where = {"find_cut": at_pool} if layer == "pool" else {}
    expected, _ = naive_logits(model, images, grid, layer="norm1", **masking, **where)
    scores = ReciproCAM(model, score="logit", layer=layer, **masking).scores(images, "all")
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)


def test_a_hybrid_with_positions_of_one_size_takes_that_size():
    with pytest.raises(InputError, match=r"takes images of 12x20 pixels.* got 8x12"):
        ReciproCAM(hybrid())(tiny_images((2, 3)).double())


# Other cuts


@pytest.mark.parametrize("block", [-1, -2, -3])
def test_earlier_blocks(block):
    def at_block(model):
        return model.blocks[block], [model.blocks[block].norm1], "output"

    images = tiny_images(GRID).double()
    for model in (vit(depth=3), eva(depth=3, attn_type="rope", rope_type="mixed")):
        masking = {"kernel": "gaussian", "class_token": True, "layer": "norm1"}
        expected, _ = naive_logits(model, images, GRID, **masking, find_cut=at_block)
        explainer = ReciproCAM(model, score="logit", block=block)
        torch.testing.assert_close(explainer.scores(images, "all"), expected, rtol=1e-9, atol=1e-9)
        e = explainer(images)
        assert e.path == ("closed-form" if block == -1 else "direct")
        assert e.settings.get("block", -1) == block


def test_blocks_that_do_not_exist():
    for block in (0, 1, -3):
        with pytest.raises(InputError, match=f"-1, the last, to -2.*got {block}"):
            ReciproCAM(tiny_model(), block=block)


POOLED = {
    "avg": lambda: vit(global_pool="avg"),
    "avg with prefix": lambda: vit(global_pool="avg", pool_include_prefix=True, reg_tokens=1),
    "no class token": lambda: vit(global_pool="avg", class_token=False),
    "max": lambda: vit(global_pool="max"),
    "map": lambda: vit(global_pool="map"),
    "map, no class token": lambda: vit(global_pool="map", class_token=False),
    "eva avg": lambda: eva(global_pool="avg"),
    "eva map": lambda: eva(global_pool="map"),
    "beit avg": lambda: beit(global_pool="avg"),
    "naflex map": lambda: naflex(global_pool="map"),
}


@pytest.mark.parametrize("family", POOLED)
def test_cut_before_the_pooling(family):
    model = POOLED[family]()
    images = tiny_images(GRID).double()

    def at_pool(model):
        return model.norm, [model.norm], "output"

    for kernel, class_token in itertools.product(KERNELS, (True, False)):
        masking = {"kernel": kernel, "class_token": class_token}
        expected, _ = naive_logits(model, images, GRID, layer="norm1", **masking, find_cut=at_pool)
        for path in ("auto", "direct"):
            explainer = ReciproCAM(model, score="logit", layer="pool", path=path, **masking)
            torch.testing.assert_close(
                explainer.scores(images, "all"), expected, rtol=1e-9, atol=1e-9
            )
    because = ReciproCAM(model, layer="pool")(images).path
    assert because == ("direct" if family == "max" else "closed-form")


def test_other_cuts_of_hierarchical_models_are_refused():
    model = SwinTransformer(img_size=32, embed_dim=8, depths=(1, 1), num_heads=(2, 2))
    for cut in ({"block": -2}, {"layer": "pool"}):
        with pytest.raises(InputError, match="plain ViTs, and this is a SwinTransformer"):
            ReciproCAM(model.eval(), **cut)


def test_pools_that_are_not_there_or_not_linear():
    with pytest.raises(InputError, match="reads its class token: use layer='norm1'"):
        ReciproCAM(tiny_model(), layer="pool")
    with pytest.raises(ClosedFormError, match="global_pool='max', which is not linear"):
        ReciproCAM(vit(global_pool="max"), layer="pool", path="closed-form")
    model = vit(global_pool="map")
    model.attn_pool = shake(AttentionPoolLatent(12, num_heads=3, pos_embed="abs", feat_size=15))
    with pytest.raises(ClosedFormError, match="adds a position embedding"):
        ReciproCAM(model, layer="pool", path="closed-form")


@pytest.mark.parametrize("family", CLOSED)
def test_depth_equals_the_naive_loops(family):
    build, find_cut = CLOSED[family]
    cuts = {}
    if find_cut is not None:

        def find_cuts(model):
            return [find_cut(SimpleNamespace(blocks=[block])) for block in model.blocks]

        cuts = {"find_cuts": find_cuts}
    images = tiny_images(GRID).double()
    for kernel, class_token in itertools.product(KERNELS, (True, False)):
        masking = {"kernel": kernel, "class_token": class_token, "depth": 2}
        assert_depth_equals_reference(build(), images, GRID, **masking, **cuts)


def test_depth_of_cait_is_that_of_its_class_attention():
    def find_cuts(model):
        return [(block, [block.norm1], "output") for block in model.blocks_token_only]

    model, images = shake(Cait(**SIZES, init_values=0.5)), tiny_images(GRID).double()
    for kernel, class_token in itertools.product(KERNELS, (True, False)):
        masking = {"kernel": kernel, "class_token": class_token, "depth": 2}
        assert_depth_equals_reference(model, images, GRID, **masking, find_cuts=find_cuts)
    with pytest.raises(InputError, match="depth=3, but the model has 2 blocks that its readout"):
        ReciproCAM(model, depth=3)


def test_depth_of_hierarchical_models_is_refused():
    model = SwinTransformer(img_size=32, embed_dim=8, depths=(1, 1), num_heads=(2, 2))
    with pytest.raises(InputError, match=r"depth .* plain ViTs, and this is a SwinTransformer"):
        ReciproCAM(model.eval(), depth=2)
