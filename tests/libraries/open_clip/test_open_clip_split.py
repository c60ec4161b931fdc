"""open_clip's image towers with prompts, tiny and in float64, against whole forward passes."""

import copy
import itertools
import json
from functools import partial

import numpy as np
import open_clip
import pytest
import torch
from open_clip import factory, pretrained
from open_clip.coca_model import CoCa, MultimodalCfg
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import QuickGELU, VisionTransformer
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import vit_reciprocam as vr
from conftest import tiny_images, tiny_model
from reference import naive_logits
from vit_reciprocam import ReciproCAM
from vit_reciprocam.errors import (
    ClosedFormError,
    DownloadError,
    InputError,
    ModelError,
    WeightsError,
)
from vit_reciprocam.libraries.common.zero_shot import ZeroShot
from vit_reciprocam.libraries.open_clip import load as hub
from vit_reciprocam.libraries.open_clip import split as adapter

GRID = (2, 3)
MASKINGS = [
    {"kernel": kernel, "class_token": class_token, "layer": layer}
    for kernel, class_token, layer in itertools.product(
        ["gaussian", "dirac"], [True, False], ["norm1", "block"]
    )
]
PROMPTS = ["a photo of a dog", "a cat", "two birds on a wire"]


def shaken(model, spread=0.3):
    """In float64, with weights large enough for masks to matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += spread * torch.randn_like(parameter)
    return model.double().eval()


def vit(grid=GRID, **options):
    sizes = {
        "image_size": (4 * grid[0], 4 * grid[1]),
        "patch_size": 4,
        "width": 12,
        "layers": 2,
        "heads": 3,
        "mlp_ratio": 2,
        "output_dim": 8,
    }
    return shaken(VisionTransformer(**(sizes | options)))


def around_timm(pool="token", proj="linear"):
    """A tower around a small model of timm, with patches of 16 pixels."""
    tower = TimmModel("test_vit", embed_dim=8, pool=pool, proj=proj)
    tower.set_input_size((16 * GRID[0], 16 * GRID[1]))
    return shaken(tower, spread=0.1)


def images_for(tower):
    scale = 4 if isinstance(tower, TimmModel) else 1
    return tiny_images((scale * GRID[0], scale * GRID[1])).double()


@torch.no_grad()
def zero_shot(tower, images=None):
    generator = torch.Generator().manual_seed(2)
    width = 8 if images is None else tower(images).shape[1]
    prompts = torch.randn(3, width, generator=generator).double()
    return ZeroShot(tower, prompts, scale=7.0, bias=-1.0)


def last_block(tower, block=-1):
    if isinstance(tower, TimmModel):
        return tower.trunk.blocks[block], tower.trunk.blocks[block].norm1
    return tower.transformer.resblocks[block], tower.transformer.resblocks[block].ln_1


def at_block(model, block=-1):
    block, norm = last_block(model.tower, block)
    return block, [norm], "output"


def at_pool(model):
    """What is pooled: the output of the pooler's LayerNorm, the last norm or the last block."""
    tower = model.tower
    if isinstance(tower, TimmModel):
        return None, [tower.trunk.norm], "output"
    if tower.attn_pool is not None:
        return None, [tower.attn_pool.ln_k], "output"
    last = tower.transformer if tower.final_ln_after_pool else tower.ln_post
    return None, [last], "output"


def assert_exact(tower, path, masking, find_cut=at_block, **cut):
    images = images_for(tower)
    model = zero_shot(tower, images)
    where = masking | {"layer": "norm1"} if find_cut is at_pool else masking
    expected, _ = naive_logits(model, images, GRID, prefix=1, find_cut=find_cut, **where)
    assert expected.std(dim=(2, 3)).min() > 1e-4, "the masks make no difference: nothing was tested"
    explainer = ReciproCAM(model, score="logit", **masking, **cut)
    explanation = explainer(images, "all")
    assert explanation.path == path
    torch.testing.assert_close(explainer.scores(images, "all"), expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        np.testing.assert_allclose(explanation.logits, model(images).float(), rtol=1e-6)
    other = ReciproCAM(model, score="logit", path="direct", **masking, **cut)
    torch.testing.assert_close(other.scores(images, "all"), expected, rtol=1e-9, atol=1e-9)


# --- exactness -------------------------------------------------------------------------------

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


# --- other cuts ------------------------------------------------------------------------------


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
        tower = hooked(pooler(), find)
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


# --- what is refused, what is left alone -----------------------------------------------------


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


def hooked(tower, find):
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
        (lambda: hooked(vit(), lambda tower: tower), "the VisionTransformer has forward hooks"),
        (lambda: hooked(vit(), lambda tower: tower.transformer), r"hooks \(at transformer\)"),
        (lambda: hooked(around_timm(), lambda tower: tower), "the TimmModel has forward hooks"),
        (lambda: hooked(around_timm(), lambda tower: tower.trunk), "has forward hooks"),
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


# --- prompts as classes ----------------------------------------------------------------------

VISION = {"layers": 2, "width": 12, "head_width": 4, "patch_size": 4, "image_size": 16}
TEXT = {"width": 8, "heads": 2, "layers": 1, "context_length": 16}


def whole(kind=CLIP, vision=None, **options):
    vision = CLIPVisionCfg(**(VISION | (vision or {})))
    return shaken(kind(8, vision_cfg=vision, text_cfg=CLIPTextCfg(**TEXT), **options))


def tokenize(texts):
    return open_clip.get_tokenizer("ViT-B-32", context_length=16)(texts)


@pytest.mark.parametrize(
    "options",
    [{}, {"init_logit_bias": -3.0}, {"nonscalar_logit_scale": True, "init_logit_bias": 1.0}],
)
@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
def test_zero_shot_gives_open_clips_logits(kind, options):
    model, images = whole(kind, **options), tiny_images((4, 4)).double()
    shot = adapter.zero_shot(model, tokenize, PROMPTS)
    with torch.no_grad():
        expected, _ = model.get_logits(images, tokenize(PROMPTS))
        torch.testing.assert_close(shot(images), expected, rtol=1e-10, atol=1e-10)
    explanation = ReciproCAM(shot)(images, "all")
    assert (explanation.maps.shape, explanation.path) == ((2, 3, 4, 4), "closed-form")
    np.testing.assert_allclose(explanation.logits, expected.float(), rtol=1e-6)


@torch.no_grad()
def test_templates_are_averaged_after_normalisation():
    model, templates = whole(), ["a photo of a {}.", "{} in the rain"]
    shot = adapter.zero_shot(model, tokenize, ["dog", "cat"], templates)
    for number, name in enumerate(["dog", "cat"]):
        texts = tokenize([template.format(name) for template in templates])
        mean = nn.functional.normalize(model.encode_text(texts), dim=-1).mean(dim=0)
        torch.testing.assert_close(shot.prompts[number], mean / mean.norm())


def test_coca_gives_its_features_alone():
    decoder = MultimodalCfg(context_length=16, width=8, heads=2, layers=1)
    vision = {"output_tokens": True, "attentional_pool": True, "attn_pooler_heads": 2}
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    model = shaken(CoCa(8, decoder, CLIPTextCfg(**text), CLIPVisionCfg(**(VISION | vision))))
    images = tiny_images((4, 4)).double()
    shot = adapter.zero_shot(model, tokenize, PROMPTS)
    assert model.visual.output_tokens
    with torch.no_grad():
        cosine = model.encode_image(images) @ model.encode_text(tokenize(PROMPTS)).T
        torch.testing.assert_close(shot(images), model.logit_scale.exp() * cosine)
    explanation = ReciproCAM(shot)(images)
    assert explanation.path == "direct"
    with torch.no_grad():
        np.testing.assert_allclose(explanation.logits, shot(images).float(), rtol=1e-6)


@pytest.mark.parametrize(
    ("prompts", "templates", "words"),
    [
        ("a dog", ["{}"], "prompts must be a list of at least one text, got 'a dog'"),
        ([], ["{}"], "prompts must be a list"),
        ([3], ["{}"], "prompts must be a list"),
        (["dog"], [], "templates must be a list"),
        (["dog"], ["a photo"], "template 'a photo' has no place {} for the prompt"),
    ],
)
def test_prompts_that_cannot_be_used(prompts, templates, words):
    with pytest.raises(InputError, match=words):
        adapter.zero_shot(whole(), tokenize, prompts, templates)


def test_models_that_zero_shot_cannot_take():
    with pytest.raises(ModelError, match="VisionTransformer is not a CLIP model"):
        adapter.zero_shot(vit(), tokenize, PROMPTS)
    with pytest.raises(ModelError, match=r"CLIP is in training mode: call model\.eval"):
        adapter.zero_shot(whole().train(), tokenize, PROMPTS)


@pytest.mark.parametrize("build", [whole, vit])
def test_without_prompts_there_are_no_classes(build):
    words = r"no classes until it is given prompts: .*zero_shot\(model, tokenizer, \['a photo"
    with pytest.raises(ModelError, match=words):
        adapter.split(build())


# --- models by name --------------------------------------------------------------------------

HEAD = {"resize_mode": "squash", "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}


@pytest.fixture
def tiny_name(monkeypatch):
    """A tiny model registered with open_clip, of two tags."""
    config = {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT}
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", config)
    gelu = {"hf_hub": "nobody/nothing/", "quick_gelu": True}
    tags = {"mine": {"hf_hub": "nobody/nothing/", **HEAD}, "old": gelu}
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny", tags)
    return "tiny"


def saved(path, **options):
    torch.manual_seed(0)
    model = CLIP(8, CLIPVisionCfg(**VISION), CLIPTextCfg(**TEXT), **options).eval()
    if path.suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    return model


def named(name, tag):
    return f"{name}/{tag}" if tag else name


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("tag", [None, "mine", "old"])
def test_local_weights(tiny_name, tmp_path, tag, suffix):
    path = tmp_path / f"weights{suffix}"
    model = saved(path, quick_gelu=tag == "old")
    shot, preprocess, names = hub.load_open_clip(
        named(tiny_name, tag), prompts=PROMPTS, weights=path, options={}
    )
    images = tiny_images((4, 4))
    with torch.no_grad():
        torch.testing.assert_close(shot(images), model.get_logits(images, tokenize(PROMPTS))[0])
    assert names == tuple(PROMPTS)
    assert not any(module.training for module in shot.tower.modules())
    assert (preprocess.size, preprocess.crop_pct) == ((16, 16), 1.0)
    assert preprocess.resize == ("squash" if tag == "mine" else "shortest")
    assert preprocess.mean[0] == (0.5 if tag == "mine" else 0.48145466)
    assert ReciproCAM(shot)(images).path == "closed-form"


def test_load_by_spec_and_explain(tiny_name, tmp_path):
    path = tmp_path / "weights.safetensors"
    saved(path, quick_gelu=True)
    spec = f"open_clip:{tiny_name}/old"
    classifier = vr.load(spec, weights=path, prompts=PROMPTS)
    e = vr.explain(np.zeros((20, 30, 3), np.uint8), classifier, targets="all")
    assert (e.maps.shape, e.path) == ((1, len(PROMPTS), 4, 4), "closed-form")
    assert e.class_names == tuple(PROMPTS)
    with pytest.raises(InputError, match="give its classes with prompts="):
        vr.load(spec)


def test_published_weights(tiny_name, tmp_path, monkeypatch):
    model = saved(tmp_path / "weights.pt", quick_gelu=True)
    fetched = str(tmp_path / "weights.pt")
    monkeypatch.setattr(factory, "download_pretrained", lambda config, cache_dir: fetched)
    shot, _, _ = hub.load_open_clip(named(tiny_name, "old"), prompts=PROMPTS, options={})
    images = tiny_images((4, 4))
    with torch.no_grad():
        torch.testing.assert_close(shot(images), model.get_logits(images, tokenize(PROMPTS))[0])


def test_a_folder_of_ones_own(tmp_path):
    config = {
        "model_cfg": {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT},
        "preprocess_cfg": HEAD,
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    model = saved(tmp_path / "open_clip_model.safetensors")
    name = f"local-dir:{tmp_path}"
    shot, preprocess, _ = hub.load_open_clip(
        name, prompts=["dog"], templates=["a {}"], options={"force_image_size": (8, 12)}
    )
    assert preprocess.size == (8, 12)
    assert preprocess.resize == "squash"
    assert shot.scale == pytest.approx(model.logit_scale.exp().item())
    assert ReciproCAM(shot)(tiny_images(GRID)).maps.shape == (2, 1, *GRID)
    with pytest.raises(ModelError, match="has weights of its own"):
        hub.load_open_clip(name, prompts=["dog"], weights="x.pt", options={})


@pytest.mark.parametrize(
    ("name", "tag", "options", "words"),
    [
        ("ViT-B-33", "openai", {}, r"no model 'ViT-B-33'\. Closest: ViT-B-32"),
        ("RN50", "openai", {}, "ModifiedResNet is not supported"),
        ("ViT-B-32", "mine", {}, r"no weights 'mine' for 'ViT-B-32': it publishes openai, "),
        ("ViT-B-32", None, {}, r"needs a tag for 'ViT-B-32': it publishes openai, "),
        ("coca_base", None, {}, "it publishes none"),
        ("tiny", "mine", {"colour": 3}, r"(?s)cannot create 'tiny' with options .*colour"),
    ],
)
def test_names_that_cannot_be_loaded(tiny_name, monkeypatch, tmp_path, name, tag, options, words):
    saved(tmp_path / "weights.pt")
    fetched = str(tmp_path / "weights.pt")
    monkeypatch.setattr(factory, "download_pretrained", lambda config, cache_dir: fetched)
    with pytest.raises(ModelError, match=words):
        hub.load_open_clip(named(name, tag), prompts=PROMPTS, options=options)


def test_no_network_says_what_to_do(tiny_name, monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name, words in [
        (tiny_name, "the weights of 'tiny' could not be fetched: .*pass a local file"),
        ("ViT-B-16-SigLIP", "the tokenizer of 'ViT-B-16-SigLIP' could not be fetched: "),
        ("hf-hub:nobody/nothing", "the configuration of 'hf-hub:nobody/nothing' could not be"),
    ]:
        tag = {"tiny": "mine", "ViT-B-16-SigLIP": "webli"}.get(name)
        with pytest.raises(DownloadError, match=words):
            hub.load_open_clip(named(name, tag), prompts=PROMPTS, options={})


def test_local_weights_that_do_not_fit(tiny_name, tmp_path):
    torch.save({"logit_scale": torch.zeros(())}, tmp_path / "few.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for file, words in [
        ("few.pt", "few.pt does not fit 'tiny': .*Missing key"),
        ("broken.safetensors", "broken.safetensors does not fit"),
        ("none.pt", "no such weights file"),
    ]:
        with pytest.raises(WeightsError, match=words):
            hub.load_open_clip(tiny_name, prompts=PROMPTS, weights=tmp_path / file, options={})


CONFIGS = [
    {"size": size, "resize_mode": resize, "interpolation": interpolation, "mean": mean}
    for size, resize, interpolation, mean in itertools.product(
        [24, (24, 24), (16, 40), (40, 16)],
        ["shortest", "squash"],
        ["bicubic", "bilinear", "random"],
        [0.5, (0.1, 0.2, 0.3)],
    )
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(map(str, config.values())))
def test_preprocessing_is_open_clips(config):
    pixels = np.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=np.uint8)
    config = PreprocessCfg(**config)
    ours = hub._preprocess(vars(config))
    for size in [(80, 60), (41, 97)]:
        image = Image.fromarray(pixels).resize(size)
        expected = image_transform_v2(config, is_train=False)(image)
        np.testing.assert_allclose(ours(image), expected, rtol=0, atol=1e-6)


def test_padding_is_refused():
    with pytest.raises(ModelError, match="resize mode 'longest' is not supported"):
        hub._preprocess(vars(PreprocessCfg(resize_mode="longest")))
