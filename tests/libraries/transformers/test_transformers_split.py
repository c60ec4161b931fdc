"""transformers' models against naive loops: whole forward passes, with one hook at the cut."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from comparison import assert_depth_equals_reference
from conftest import tiny_images, tiny_model
from tiny_transformers import (
    CASES,
    RUNS,
    SQUARE,
    assert_equal,
    build,
    case,
    images_of,
    model_of,
    naive,
)
from vit_reciprocam.core.closed_form import closed_form_rows
from vit_reciprocam.core.masks import KERNELS, Masking
from vit_reciprocam.errors import (
    ClosedFormError,
    InputError,
    ModelError,
)
from vit_reciprocam.libraries.dispatch import split_model
from vit_reciprocam.reciprocam import ReciproCAM


@pytest.mark.parametrize(("name", "attention"), RUNS)
def test_scores_are_those_of_whole_passes(name, attention):
    one = CASES[name]
    model, images = model_of(one, attention), images_of(one.size)
    explainer = ReciproCAM(model, score="logit")
    result = explainer(images, "all")
    assert result.path == one.path
    with torch.no_grad():
        np.testing.assert_allclose(result.logits, model(images).logits.numpy(), rtol=1e-4)
    # most families' eager attention takes its softmax in float32 whatever the model's dtype
    rounds = attention == "eager" and one.path == "closed-form"
    ours, wanted = explainer.scores(images, "all"), naive(model, images, one)
    assert_equal(
        ours, wanted, 1e-6 if rounds and one.kind not in ("Data2VecVision", "Pvt") else 1e-9
    )


@pytest.mark.parametrize("layer", ["norm1", "block"])
@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("kernel", ["gaussian", "dirac"])
@pytest.mark.parametrize("name", ["vit", "deit_teacher", "beit_class", "pvt", "dinov2", "swinv2"])
def test_every_setting(name, kernel, class_token, layer):
    one = CASES[name]
    settings = {"kernel": kernel, "class_token": class_token, "layer": layer}
    model = model_of(one)
    images = images_of(one.size)
    ours = ReciproCAM(model, score="logit", **settings).scores(images, "all")
    assert_equal(ours, naive(model, images, one, **settings))


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].path == "closed-form"])
def test_both_paths_agree(name):
    one = CASES[name]
    model, images = model_of(one), images_of(one.size)
    direct = ReciproCAM(model, score="logit", path="direct", memory_limit=1).scores(images, "all")
    assert_equal(ReciproCAM(model, score="logit").scores(images, "all"), direct)


class Export(nn.Module):
    """What an exporter sees: H of tokens and of halved tokens, and the closed form if it holds."""

    def __init__(self, model):
        super().__init__()
        self.training = False
        self.model = model

    def forward(self, images):
        split = split_model(self.model)
        cut = split.cut(images)
        normed = cut.norm(cut.x)
        both = cut.rest(torch.cat([normed, normed / 2]), torch.cat([cut.x, cut.x]))
        if cut.readout is None:
            return (both,)
        rows = closed_form_rows(cut, split.prefix_tokens, [Masking()])
        return both, rows(0, 1 + cut.grid[0] * cut.grid[1])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit", {}),
        ("ijepa", {}),
        ("beit_class", {}),
        ("beit_class", {"use_shared_relative_position_bias": False}),
        ("beit_class", {"use_relative_position_bias": False}),
        ("beit_plain", {}),
        ("beit_mean", {}),
        ("data2vec_class", {}),
    ],
)
def test_a_tracer_sees_the_same(name, changes, attention):
    one = CASES[name]
    model = build(f"{one.kind}ForImageClassification", one.config | changes, attention)
    module, images = Export(model), torch.cat([images_of(one.size)] * 2)[:3]
    with torch.no_grad():
        program = torch.export.export(
            module, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
        )
        for got, wanted in zip(program.module()(images), module(images), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


# Other cuts


def one_block_earlier(one):
    """Return the case with the block before its last."""
    return SimpleNamespace(**vars(one) | {"block": f"{one.block[:-1]}{int(one.block[-1]) - 1}"})


@pytest.mark.parametrize(("name", "attention"), RUNS)
def test_the_block_before_the_last(name, attention):
    one = CASES[name]
    model, images = model_of(one, attention), images_of(one.size)
    explainer = ReciproCAM(model, score="logit", block=-2)
    assert_equal(explainer.scores(images, "all"), naive(model, images, one_block_earlier(one)))
    with pytest.raises(ClosedFormError, match=r"not in the last block|the head reads"):
        ReciproCAM(model, block=-2, path="closed-form")


@pytest.mark.parametrize("block", [-1, -2, -3])
@pytest.mark.parametrize("layer", ["norm1", "block"])
def test_every_block(block, layer):
    for kind in ("ViT", "Dinov2"):
        model = build(f"{kind}ForImageClassification", SQUARE | {"num_hidden_layers": 3})
        path = "vit.layers" if kind == "ViT" else "dinov2.encoder.layer"
        norm = "layernorm_before" if kind == "ViT" else "norm1"
        one = case(kind, SQUARE, f"{path}.{3 + block}", norm, prefix=1)
        settings = {"class_token": False, "layer": layer}
        explainer = ReciproCAM(model, score="logit", block=block, **settings)
        images = images_of(16)
        assert_equal(explainer.scores(images, "all"), naive(model, images, one, **settings))


def test_blocks_that_do_not_exist():
    for block in (0, -3):
        with pytest.raises(InputError, match=f"-1, the last, to -2.*got {block}"):
            ReciproCAM(model_of(CASES["vit"]), block=block)


POOLED = {  # The module whose output is pooled.
    "ijepa": "ijepa.layernorm",
    "dinov2": "dinov2.layernorm",
    "dinov2_registers": "dinov2_with_registers.layernorm",
    "beit_mean": "beit.layernorm",
    "data2vec_mean": "data2vec_vision.layernorm",
    "clip": "vision_model.encoder.layers.1",
    "metaclip": "vision_model.encoder.layers.1",
    "siglip": "vision_model.post_layernorm",
    "swin": "swin.layernorm",
    "swinv2": "swinv2.layernorm",
    "pvt_v2": "pvt_v2.encoder.layers.1.layer_norm",
}


@pytest.mark.parametrize("name", POOLED)
def test_cut_before_the_pooling(name):
    one = CASES[name]
    for attention in one.attentions:
        model, images = model_of(one, attention), images_of(one.size)
        for kernel in ("gaussian", "dirac"):
            for class_token in (True, False):
                settings = {"kernel": kernel, "class_token": class_token}
                wanted = naive(model, images, one, pooled=POOLED[name], **settings)
                for path in ("closed-form", "direct"):
                    explainer = ReciproCAM(
                        model, score="logit", layer="pool", path=path, **settings
                    )
                    assert_equal(explainer.scores(images, "all"), wanted)
        with torch.no_grad():
            np.testing.assert_allclose(
                explainer(images).logits, model(images).logits.numpy(), rtol=1e-4
            )


def test_swin_with_several_windows_before_the_pooling():
    one = SimpleNamespace(**vars(CASES["swin"]) | {"grid": (3, 4), "size": (24, 32)})
    model, images = model_of(one), images_of(one.size)
    ours = ReciproCAM(model, score="logit", layer="pool").scores(images, "all")
    assert_equal(ours, naive(model, images, one, pooled="swin.layernorm"))


def test_pools_that_are_not_there_or_no_mean():
    for name in CASES.keys() - POOLED:
        with pytest.raises(InputError, match="reads its class token: use layer='norm1'"):
            ReciproCAM(model_of(CASES[name]), layer="pool")
    model = model_of(CASES["beit_mean"])
    model.beit.pooler.register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError, match="the BeitPooler has forward hooks"):
        ReciproCAM(model, layer="pool")
    model = model_of(CASES["swin"])
    model.swin.pooler = nn.AdaptiveMaxPool1d(1)
    with pytest.raises(InputError, match=r"the head pools all patches by AdaptiveMaxPool1d\("):
        ReciproCAM(model, layer="pool")


def test_the_reason_for_the_direct_path_is_told():
    one = CASES["dinov2"]
    with pytest.raises(ClosedFormError, match="reads the class token and the mean of all patches"):
        ReciproCAM(model_of(one), path="closed-form")


# What is left alone


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_the_model_is_left_as_it_was(name):
    one = CASES[name]
    model, images = model_of(one), images_of(one.size)
    model(images)  # Swin fits its windows to the first images
    before = {key: value.clone() for key, value in model.state_dict().items()}
    seen = []
    hook = model.get_submodule(one.block).mlp.register_forward_hook(lambda *_: seen.append(1))
    ReciproCAM(model)(images)
    assert seen
    hook.remove()
    assert not model.training
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_hooks_of_transformers_own_do_not_matter():
    one = CASES["vit"]
    model, images = model_of(one), images_of(one.size)
    wanted = ReciproCAM(model).scores(images)
    model(images, output_hidden_states=True, output_attentions=True)
    assert model.vit.layers[1]._forward_hooks
    assert ReciproCAM(model, path="closed-form").scores(images).equal(wanted)


def test_timm_and_transformers_agree_on_the_same_weights():
    theirs = tiny_model(grid=(4, 4), depth=2).double()
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SQUARE | {"intermediate_size": 48, "layer_norm_eps": 1e-6})
    model = transformers.ViTForImageClassification(config).double().eval()
    names = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
        "head": "classifier",
    }
    for number in range(2):
        names |= {
            f"blocks.{number}.{ours}": f"vit.layers.{number}.{name}"
            for ours, name in {
                "norm1": "layernorm_before",
                "norm2": "layernorm_after",
                "attn.proj": "attention.o_proj",
                "mlp.fc1": "mlp.fc1",
                "mlp.fc2": "mlp.fc2",
            }.items()
        }
    state = {}
    for key, value in theirs.state_dict().items():
        stem, _, kind = key.rpartition(".")
        if stem.endswith("attn.qkv"):
            block = f"vit.layers.{stem.split('.')[1]}.attention"
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                state[f"{block}.{part}_proj.{kind}"] = rows
        else:
            state[names.get(key) or f"{names[stem]}.{kind}"] = value
    model.load_state_dict(state)
    images = tiny_images((4, 4)).double()
    ours, wanted = (ReciproCAM(one)(images, "all") for one in (model, theirs))
    assert ours.path == wanted.path == "closed-form"
    np.testing.assert_allclose(ours.maps, wanted.maps, atol=1e-6)
    np.testing.assert_allclose(ours.logits, wanted.logits, rtol=1e-6)


DEEP = [name for name, one in CASES.items() if one.path == "closed-form" and name != "pvt"]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", DEEP)
def test_depth_equals_the_naive_loops(name, kernel):
    one = CASES[name]
    model, images = model_of(one), images_of(one.size)
    stack, _, _ = one.block.rpartition(".")
    side = "output" if "norm" in one.cut else "input"

    def find_cuts(model):
        blocks = model.get_submodule(stack)
        return [(block, [block.get_submodule(one.cut)], side) for block in blocks]

    for class_token in (True, False):
        assert_depth_equals_reference(
            model,
            images,
            one.grid,
            kernel=kernel,
            class_token=class_token,
            depth=2,
            readers=2 if "+" in one.kind else 1,
            prefix=one.prefix,
            find_cuts=find_cuts,
            expect_range=-1.0 if kernel == "box5" else 1e-4,  # it may keep the whole grid
        )
