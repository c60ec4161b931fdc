"""Baselines against naive loops, the public reference arrays, and values worked out by hand."""

import copy
import functools
import re

import numpy as np
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file
from timm.models.vision_transformer import ResPostBlock
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, conv2d, interpolate, pad
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

from conftest import MODELS, tiny_images, tiny_model
from reference_relevance import attention_of, naive_relevance, naive_rollout
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.methods import baselines
from vit_reciprocam.methods.baselines import (
    null_baseline,
    raw_attention,
    relevance,
    rollout,
)
from vit_reciprocam.methods.lrp import add_rule, copy_rule, linear_rule, matmul_rule
from vit_reciprocam.methods.null import NULLS as DRAWN

BY_LAYER = [rollout, raw_attention, relevance]


def null(name):
    method = functools.partial(null_baseline, name)
    method.__name__ = name
    return method


NULLS = list(map(null, ("uniform", "center", "random", "image_edges")))
uniform, center, random, image_edges = NULLS
GRID = (2, 3)
TARGETS = [[0, 3], [4, 1]]


def model_of(name):
    return tiny_model(**MODELS[name]).double()


def images64(count=2, grid=GRID):
    return tiny_images(grid, count).double()


def close(ours, wanted):
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-8 * float(wanted.abs().max()))


# --- attention of every layer -------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_rollout_is_the_product_over_layers(name):
    model, images = model_of(name), images64()
    readouts = 2 if name == "distilled" else 1
    rows = naive_rollout(attention_of(model, images), readouts=readouts)
    maps = rollout(model, images, TARGETS)
    assert maps.shape == (2, 2, *GRID)
    for column in range(2):
        close(maps[:, column], rows[:, model.num_prefix_tokens :].unflatten(1, GRID))


@pytest.mark.parametrize(
    "settings", [{"head_fusion": "max"}, {"head_fusion": "min"}, {"start_layer": 1}]
)
def test_rollout_settings(settings):
    model, images = tiny_model(depth=3).double(), images64()
    wanted = naive_rollout(
        attention_of(model, images),
        fuse=settings.get("head_fusion", "mean"),
        start=settings.get("start_layer", 0),
    )
    close(rollout(model, images, **settings)[:, 0], wanted[:, 1:].unflatten(1, GRID))
    assert not torch.allclose(rollout(model, images, **settings), rollout(model, images))


def test_rollout_discards_the_smallest_weights_of_each_image():
    model, images = model_of("plain"), images64()
    kept = []
    for layer in attention_of(model, images):
        fused = layer.mean(dim=1)
        for image in fused:
            smallest = image.flatten().argsort()[: int(49 * 0.4)]  # 7 tokens
            image.view(-1)[smallest] = 0
        kept.append(fused[:, None])
    close(
        rollout(model, images, discard_ratio=0.4)[:, 0],
        naive_rollout(kept)[:, 1:].unflatten(1, GRID),
    )


@pytest.mark.parametrize("name", MODELS)
def test_raw_attention_is_the_last_layers(name):
    model, images = model_of(name), images64()
    readouts = 2 if name == "distilled" else 1
    rows = attention_of(model, images)[-1].mean(dim=1)[:, :readouts].mean(dim=1)
    wanted = rows[:, model.num_prefix_tokens :].unflatten(1, GRID)
    close(raw_attention(model, images)[:, 0], wanted)


# --- relevance ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "start_layer"),
    [*((name, 0) for name in MODELS), *((name, 1) for name in MODELS if name != "one_block")],
)
def test_relevance_is_the_generic_formula_layer_by_layer(name, start_layer):
    model, images = model_of(name), images64()
    maps = relevance(model, images, TARGETS, start_layer=start_layer)
    for at, (image, targets) in enumerate(zip(images, TARGETS, strict=True)):
        for column, target in enumerate(targets):
            row = naive_relevance(model, image, target, start=start_layer)
            wanted = row[model.num_prefix_tokens :].unflatten(0, GRID)
            assert wanted.max() > 0
            close(maps[at, column], wanted)


def test_relevance_of_targets_in_every_form():
    model, images = model_of("plain"), images64()
    every = relevance(model, images, "all")
    assert every.shape == (2, 5, *GRID)
    assert not torch.allclose(every[:, 0], every[:, 1])
    close(relevance(model, images, 3), every[:, 3:4])
    close(relevance(model, images, torch.tensor([1, 4])), every[[0, 1], [1, 4]][:, None])
    close(relevance(model, images, [[2, 0]]), every[:, [2, 0]])
    with torch.no_grad():
        best = model(images).argmax(dim=1)
    close(relevance(model, images), every[[0, 1], best][:, None])
    by_rule = relevance(model, images, lambda logits: logits.argmin(axis=1))
    with torch.no_grad():
        worst = model(images).argmin(dim=1)
    close(by_rule, every[[0, 1], worst][:, None])


@pytest.mark.parametrize("method", BY_LAYER)
def test_a_batch_is_its_images_one_by_one(method):
    model, images = model_of("plain"), images64(3)
    together = method(model, images, [1, 2, 3])
    for number in range(3):
        alone = method(model, images[number : number + 1], number + 1)
        close(alone, together[number : number + 1])
    close(method(model, images, [1, 2, 3], memory_limit=1), together)
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("method", BY_LAYER)
def test_half_precision_gives_maps_in_float32(method):
    model, images = model_of("plain").half(), images64().half()
    maps = method(model, images, TARGETS)
    exact = method(model.double(), images.double(), TARGETS)
    assert maps.dtype == torch.float32
    assert np.corrcoef(maps.flatten(), exact.flatten())[0, 1] > 0.9


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", BY_LAYER)
def test_callers_without_gradients(method, around):
    model, images = model_of("plain"), images64()
    wanted = method(model, images, 2)
    with around():
        made_here = images + 0
        close(method(model, made_here, 2).clone(), wanted)
    assert not wanted.requires_grad
    close(method(model.requires_grad_(False), images, 2), wanted)


# --- the rules ----------------------------------------------------------------------------------


def test_rules_by_hand():
    # 2 = 1*2 counts for output 0, 3 = -1*-3 and 6 = 2*3 for output 1; -1*4 and 2*-1 do not
    x, weight = torch.tensor([[1.0, -1, 2]]), torch.tensor([[2.0, 4, -1], [0, -3, 3]])
    shares = linear_rule(x, weight, torch.tensor([[5.0, 9]]))
    torch.testing.assert_close(shares, torch.tensor([[5.0, 3, 6]]))
    # the product is 1*3 + 2*4 = 11; each factor gets half of what each term has of it
    a, b = torch.tensor([[1.0, 2]]), torch.tensor([[3.0], [4]])
    of_a, of_b = matmul_rule(a, b, torch.tensor([[22.0]]))
    torch.testing.assert_close(of_a, torch.tensor([[3.0, 8]]))
    torch.testing.assert_close(of_b, of_a.T)
    # by the formula 6 and -4 of 2: sizes in the ratio 6 to 4 that sum to 2
    of_a, of_b = add_rule(torch.tensor([[3.0]]), torch.tensor([[-2.0]]), torch.tensor([[2.0]]))
    torch.testing.assert_close(torch.cat([of_a, of_b]), torch.tensor([[1.2], [0.8]]))
    copied = copy_rule(torch.tensor([2.0, 0]), torch.tensor([1.0, 1]), torch.tensor([3.0, 1]))
    torch.testing.assert_close(copied, torch.tensor([4.0, 0]))


def test_ratios_to_nothing_are_nothing():
    zeros = torch.zeros(1, 2, 2)
    for part in (*add_rule(zeros, zeros, zeros + 1), linear_rule(zeros, zeros[0], zeros + 1)):
        assert torch.equal(part, zeros)


def test_rules_keep_the_sum_of_each_image():
    torch.manual_seed(0)
    r, x, y = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    weight = torch.randn(4, 6, dtype=torch.float64)
    close(linear_rule(torch.randn(2, 5, 6).double(), weight, r).sum((1, 2)), r.sum((1, 2)))
    for parts in (add_rule(x, y, r), matmul_rule(x, torch.randn(2, 4, 4).double(), r)):
        close(sum(part.sum((1, 2)) for part in parts), r.sum((1, 2)))
    close(copy_rule(x, r, r), 2 * r)


# --- the public reference -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def deit(deit_tiny_weights):
    model = timm.create_model("deit_tiny_patch16_224")
    model.load_state_dict(load_file(deit_tiny_weights))
    return model.eval()


@pytest.fixture(scope="module")
def reference(shared_data):
    with np.load(shared_data / "reference" / "chefer2021.npz") as data:
        return {name: torch.from_numpy(data[name]) for name in ("relevance", "rollout")}


def off(ours, wanted):
    """Differences (8, N), in each map's maximum."""
    ours, wanted = ours.double().flatten(1), wanted.double().flatten(1)
    return (ours - wanted).abs() / wanted.amax(dim=1, keepdim=True)


def test_rollout_of_deit_tiny_is_the_references(deit, reference, reference_images):
    images, labels = reference_images
    assert off(rollout(deit, images, labels)[:, 0], reference["rollout"]).max() <= 1e-4


def test_relevance_of_deit_tiny_is_the_references_but_for_rounding(
    deit, reference, reference_images
):
    """Its rules magnify rounding errors about a million times on some pictures, in any code.

    The reference was computed in float32. On the three pictures where that harms least, it must be
    met closely; the naive loops in the next test are met to nine digits.
    """
    images, labels = reference_images
    ours = relevance(copy.deepcopy(deit).double(), images.double(), labels)[:, 0]
    difference = off(ours, reference["relevance"])
    steady = [0, 1, 6]
    assert difference[steady].median(dim=1).values.max() <= 2e-4
    assert difference[steady].max() <= 1e-2
    assert difference.median(dim=1).values.max() <= 3e-2
    for one, other in zip(ours, reference["relevance"], strict=True):
        assert np.corrcoef(one.flatten(), other.flatten())[0, 1] > 0.98


def test_relevance_of_deit_tiny_is_that_of_the_naive_loops(deit, reference_images):
    images, labels = (part[[0, 3]] for part in reference_images)
    model, images = copy.deepcopy(deit).double(), images.double()
    ours = relevance(model, images, labels)[:, 0]
    naive = torch.stack([naive_relevance(model, *one) for one in zip(images, labels, strict=True)])
    assert off(ours, naive[:, 1:]).max() <= 1e-6


# --- other libraries ----------------------------------------------------------------------------


def renamed(state, rules):
    """A state dict by other names; a rule whose name is a list takes equal shares."""
    found = {}
    for key, value in state.items():
        for pattern, name in rules:
            if re.fullmatch(pattern, key):
                names = [name] if isinstance(name, str) else name
                for one, share in zip(names, value.chunk(len(names)), strict=True):
                    found[re.sub(pattern, one, key)] = share
                break
        else:
            raise KeyError(key)
    return found


def transformers_names(body):
    block = rf"{body}.layers.\1"
    return [
        ("cls_token", f"{body}.embeddings.cls_token"),
        ("dist_token", f"{body}.embeddings.distillation_token"),
        ("pos_embed", f"{body}.embeddings.position_embeddings"),
        (r"patch_embed\.proj(.*)", rf"{body}.embeddings.patch_embeddings.projection\1"),
        (r"blocks\.(\d)\.norm1(.*)", rf"{block}.layernorm_before\2"),
        (r"blocks\.(\d)\.norm2(.*)", rf"{block}.layernorm_after\2"),
        (
            r"blocks\.(\d)\.attn\.qkv(.*)",
            [rf"{block}.attention.{one}_proj\2" for one in "qkv"],
        ),
        (r"blocks\.(\d)\.attn\.proj(.*)", rf"{block}.attention.o_proj\2"),
        (r"blocks\.(\d)\.mlp(.*)", rf"{block}.mlp\2"),
        (r"norm(.*)", rf"{body}.layernorm\1"),
        (r"head_dist(.*)", r"distillation_classifier\1"),
        (r"head(.*)", r"classifier\1" if body == "vit" else r"cls_classifier\1"),
    ]


TORCHVISION_NAMES = [
    ("cls_token", "class_token"),
    ("pos_embed", "encoder.pos_embedding"),
    (r"patch_embed\.proj(.*)", r"conv_proj\1"),
    (r"blocks\.(\d)\.norm(\d)(.*)", r"encoder.layers.encoder_layer_\1.ln_\2\3"),
    (
        r"blocks\.(\d)\.attn\.qkv\.(.*)",
        r"encoder.layers.encoder_layer_\1.self_attention.in_proj_\2",
    ),
    (
        r"blocks\.(\d)\.attn\.proj(.*)",
        r"encoder.layers.encoder_layer_\1.self_attention.out_proj\2",
    ),
    (r"blocks\.(\d)\.mlp\.fc1(.*)", r"encoder.layers.encoder_layer_\1.mlp.0\2"),
    (r"blocks\.(\d)\.mlp\.fc2(.*)", r"encoder.layers.encoder_layer_\1.mlp.3\2"),
    (r"norm(.*)", r"encoder.ln\1"),
    (r"head(.*)", r"heads.head\1"),
]
CONFIG = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "patch_size": 4,
    "image_size": 16,
    "num_labels": 5,
    "layer_norm_eps": 1e-6,
}


def of_transformers(kind, config, attention, state, body):
    config._attn_implementation = attention
    model = getattr(transformers, kind)(config).double().eval()
    model.load_state_dict(renamed(state, transformers_names(body)))
    return model


def twins(name):
    """A model of another library, and timm's with the same weights."""
    library, _, attention = name.partition(" ")
    theirs = tiny_model(grid=(4, 4), distilled=library == "deit").double()
    state = theirs.state_dict()
    if library == "torchvision":
        model = TorchvisionViT(16, 4, 2, 3, 12, 48, num_classes=5).double().eval()
        model.load_state_dict(renamed(state, TORCHVISION_NAMES))
    elif library == "vit":
        config = transformers.ViTConfig(**CONFIG)
        model = of_transformers("ViTForImageClassification", config, attention, state, "vit")
    else:
        config = transformers.DeiTConfig(**CONFIG)
        kind = "DeiTForImageClassificationWithTeacher"
        model = of_transformers(kind, config, attention, state, "deit")
    return model, theirs


@pytest.mark.parametrize("name", ["torchvision", "vit sdpa", "vit eager", "deit sdpa"])
@pytest.mark.parametrize("method", BY_LAYER)
def test_the_same_weights_in_other_libraries_give_the_same_maps(method, name):
    model, theirs = twins(name)
    images = images64(2, (4, 4))
    maps = method(model, images, TARGETS)
    assert maps.shape == (2, 2, 4, 4)
    close(maps, method(theirs, images, TARGETS))


@pytest.mark.parametrize("method", BY_LAYER)
@pytest.mark.parametrize("fused", [True, False])
def test_fused_attention_makes_no_difference(method, fused):
    model, images = model_of("plain"), images64()
    wanted = method(model, images, 1)
    for block in model.blocks:
        block.attn.fused_attn = fused
    close(method(model, images, 1), wanted)


@pytest.mark.parametrize("gated", [False, True])
def test_rollout_of_dinov2_is_that_of_transformers_own_attention(gated):
    options = CONFIG | {"use_swiglu_ffn": gated, "layerscale_value": 0.5}
    del options["intermediate_size"]
    torch.manual_seed(0)
    config = transformers.Dinov2Config(**options, attn_implementation="eager")
    model = transformers.Dinov2ForImageClassification(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    images = images64(2, (4, 4))
    with torch.no_grad():
        attentions = model(images, output_attentions=True).attentions
    wanted = naive_rollout(attentions)[:, 1:].unflatten(1, (4, 4))
    close(rollout(model, images)[:, 0], wanted)
    with pytest.raises(ModelError, match=r"relevance is not supported for this Dinov2.*rollout"):
        relevance(model, images)


def test_layer_norms_after_attention_and_mlp():
    model = tiny_model(block_fn=ResPostBlock).double()
    images = images64()
    close(
        rollout(model, images)[:, 0],
        naive_rollout(attention_of(model, images))[:, 1:].unflatten(1, GRID),
    )
    assert (relevance(model, images) >= 0).all()


# --- what is refused, what is left alone ----------------------------------------------------------


class GatedAttention(timm.layers.Attention):
    def __init__(self, *args, **options):
        super().__init__(*args, **options, gated=True)


REFUSED = {
    "mean": (lambda: tiny_model(global_pool="avg"), "head reads all tokens"),
    "no class token": (
        lambda: tiny_model(class_token=False, global_pool="avg"),
        "head reads all tokens",
    ),
    "eva": (
        lambda: timm.create_model("eva02_tiny_patch14_224", num_classes=5, img_size=28).eval(),
        "architecture",
    ),
    "gate": (lambda: tiny_model(attn_layer=GatedAttention), "its block 0's attention is gated"),
    "no head": (lambda: tiny_model(num_classes=0), "no classification head"),
}


@pytest.mark.parametrize("method", BY_LAYER)
@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_models_are_refused(method, name):
    build, reason = REFUSED[name]
    model = build()
    model.patch_embed.register_forward_hook(lambda *_: pytest.fail("it computed"))
    with pytest.raises(ModelError, match=reason):
        method(model, torch.zeros(1, 3, 28, 28))


def test_what_has_no_rule_has_rollout_but_no_relevance():
    model, images = tiny_model(mlp_layer=timm.layers.GluMlp).double(), images64()
    wanted = naive_rollout(attention_of(model, images))[:, 1:].unflatten(1, GRID)
    close(rollout(model, images)[:, 0], wanted)
    with pytest.raises(ModelError, match="it has a GluMlp, which is no plain linear"):
        relevance(model, images)


@pytest.mark.parametrize("method", BY_LAYER)
def test_a_model_that_is_not_its_parts_is_refused(method):
    model, images = model_of("plain"), images64()
    mlp = model.blocks[0].mlp

    class Twice(type(mlp)):
        def __call__(self, x):
            return 2 * super().__call__(x)

    mlp.__class__ = Twice
    with pytest.raises(ModelError, match=f"not supported by {method.__name__}: its forward"):
        method(model, images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start_layer": 2}, "start_layer must be from 0 to 1.*got 2"),
        ({"start_layer": -1}, "start_layer must be"),
        ({"head_fusion": "median"}, "head_fusion must be one of 'mean', 'max', 'min'"),
        ({"discard_ratio": 1.0}, "discard_ratio must be"),
        ({"memory_limit": 0}, "memory_limit must be"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(InputError, match=message):
        rollout(model_of("plain"), images64(), **settings)


@pytest.mark.parametrize("method", BY_LAYER + NULLS)
def test_images_and_targets_are_checked(method):
    model = model_of("plain")
    with pytest.raises(InputError, match=r"images must be \(B, 3, H, W\)"):
        method(model, images64()[0])
    with pytest.raises(InputError, match="takes images of 8x12"):
        method(model, torch.zeros(1, 3, 16, 16).double())
    with pytest.raises(InputError, match="class 5 does not exist"):
        method(model, images64(), 5)
    with pytest.raises(ModelError, match="not a supported model"):
        method(nn.Linear(2, 2), images64())
    dropping = tiny_model(attn_drop_rate=0.5).double().train()
    with pytest.raises(ModelError, match=r"call model\.eval"):
        method(dropping, images64())


def state_of(model):
    return [
        (
            name,
            module.training,
            list(module._forward_hooks),
            list(module._forward_pre_hooks),
            getattr(module, "fused_attn", None),
            [(p.requires_grad, p.grad, p.dtype, p.sum().item()) for p in module.parameters()],
        )
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("method", BY_LAYER + NULLS)
def test_the_model_is_left_as_it_was(method):
    model, images = model_of("plain"), images64()
    model.head.weight.requires_grad_(False)
    before = state_of(model)
    method(model, images)
    assert state_of(model) == before

    def fail(*_):
        raise RuntimeError("a hook of the user's")

    hook = model.blocks[0].norm1.register_forward_hook(fail)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="a hook of the user's"):
        method(model, images)
    assert state_of(model) == before
    hook.remove()
    method(model, images)


# --- null baselines -------------------------------------------------------------------------------


def test_uniform():
    maps = uniform(model_of("plain"), images64(), TARGETS)
    assert torch.equal(maps, torch.ones(2, 2, *GRID, dtype=torch.float64))


def test_center_is_a_gaussian_that_never_looks():
    model = tiny_model(grid=(3, 4))
    images = tiny_images((3, 4))
    maps = center(model, images, sigma=0.8)
    assert maps.shape == (2, 1, 3, 4)
    assert torch.equal(maps, center(model, torch.zeros_like(images), sigma=0.8))
    middle, corner = maps[0, 0, 1, 1], maps[0, 0, 0, 3]  # at (0, -1/4) and (-2/3, 3/4)
    wanted = np.exp([-(1 / 16) / 1.28, -(4 / 9 + 9 / 16) / 1.28])
    np.testing.assert_allclose([middle, corner], wanted, rtol=1e-6)
    for wrong in (0, -1.0, np.nan, "wide"):
        with pytest.raises(InputError, match="sigma must be positive"):
            center(model, images, sigma=wrong)


def test_random_depends_on_the_seed_and_the_picture_alone():
    model, images = model_of("plain"), images64(3)
    maps = random(model, images, [[0, 1]])
    assert torch.equal(maps[:, 0], maps[:, 1])
    assert torch.equal(maps[2:], random(model, images[2:], [[0, 1]]))
    assert not torch.allclose(maps[0], maps[1])
    assert not torch.allclose(maps, random(model, images, [[0, 1]], seed=1))
    masked = images.clone()
    masked[:, :, 0, 0] = 0
    assert not torch.allclose(maps, random(model, masked, [[0, 1]]))
    for wrong in (1, 2.5, "many"):
        with pytest.raises(InputError, match="cells must be at least 2"):
            random(model, images, cells=wrong)


def test_random_is_smooth():
    model = tiny_model(grid=(14, 14))
    maps = random(model, tiny_images((14, 14), 16))[:, 0]
    step = (maps[:, 1:] - maps[:, :-1]).std()
    assert step < 0.5 * maps.std()  # white noise: 1.4
    rough = random(model, tiny_images((14, 14), 16), cells=14)[:, 0]
    assert (rough[:, 1:] - rough[:, :-1]).std() > 1.2 * rough.std()


def test_image_edges_stand_where_the_picture_changes():
    model = tiny_model(grid=(2, 4))
    images = torch.zeros(2, 3, 8, 16)
    images[0, :, :, 8:] = 1  # one edge between the second and third column of patches
    images[1, 0, 4:] = 1  # red alone, between the rows
    maps = image_edges(model, images)[:, 0]
    # a step of 1 has the gradient 1/2 on either side of it, one column of a patch's four
    torch.testing.assert_close(maps[0], torch.tensor([[0.0, 0.125, 0.125, 0.0]] * 2))
    torch.testing.assert_close(maps[1], torch.full((2, 4), 0.299 / 8))


@pytest.mark.parametrize("grid", [(14, 14), (7, 9), (40, 90)])
def test_image_edges_are_pooled_sobel_gradients(grid):
    """Also on grids that do not divide the picture, and finer ones than it."""
    images = torch.rand(2, 3, 30, 71, dtype=torch.float64)
    red, green, blue = images.unbind(dim=1)
    luminance = (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]
    sobel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]).double() / 8
    kernels = torch.stack([sobel, sobel.T])[:, None]
    gradient = conv2d(pad(luminance, (1, 1, 1, 1), mode="replicate"), kernels)
    wanted = adaptive_avg_pool2d(gradient.square().sum(dim=1).sqrt(), grid).numpy()
    for dtype, digits in (("float64", 1e-12), ("float32", 1e-6)):
        maps = DRAWN["image_edges"].draw(images.numpy().astype(dtype), grid)
        assert maps.dtype == dtype
        np.testing.assert_allclose(maps, wanted, rtol=0, atol=digits)


@pytest.mark.parametrize("grid", [(14, 14), (7, 1), (3, 11)])
def test_random_is_noise_upsampled_from_corner_to_corner(grid):
    images = torch.rand(3, 3, 8, 8).numpy()
    noise = DRAWN["random"].draw(images, (5, 5), cells=5)  # each cell on a patch
    assert noise.min() >= 0
    assert noise.max() < 1
    wanted = interpolate(
        torch.from_numpy(noise)[:, None], grid, mode="bicubic", align_corners=True
    )[:, 0]
    np.testing.assert_allclose(
        DRAWN["random"].draw(images, grid, cells=5), wanted, rtol=0, atol=1e-6
    )


def test_random_is_uniform_noise_of_every_picture():
    drawn = DRAWN["random"].draw(torch.rand(400, 1, 2, 2).numpy(), (4, 4))
    quarters, _ = np.histogram(drawn, bins=4, range=(0, 1))
    assert np.all(abs(quarters / drawn.size - 0.25) < 0.03)  # 5 standard deviations


def test_image_edges_of_one_channel():
    model = tiny_model(in_chans=1)
    images = torch.zeros(1, 1, 8, 12)
    images[..., 4:] = 1
    wanted = torch.tensor([[0.125, 0.125, 0.0]] * 2)
    torch.testing.assert_close(image_edges(model, images)[0, 0], wanted)


@pytest.mark.parametrize("method", NULLS)
def test_nulls_run_the_model_on_one_image_only(method):
    model, images, seen = model_of("plain"), images64(3), []
    model.blocks[0].register_forward_pre_hook(lambda _m, args: seen.append(len(args[0])))
    assert method(model, images, [[0, 1]]).shape == (3, 2, *GRID)
    assert method(model, images, "all").shape == (3, 5, *GRID)
    assert method(model, images).shape == (3, 1, *GRID)
    assert set(seen) == {1}
    method(model, images, lambda logits: logits.argmax(axis=1))
    assert seen[-1] == 3


@pytest.mark.parametrize("method", NULLS)
def test_nulls_of_a_model_are_those_of_its_grid(method):
    images = images64()
    maps = method(model_of("plain"), images, TARGETS)
    drawn = DRAWN[method.__name__].draw(images.numpy(), GRID)
    assert drawn.dtype == np.float64
    assert np.array_equal(maps, np.stack([drawn, drawn], axis=1))


@pytest.mark.parametrize("method", NULLS)
def test_nulls_take_any_supported_model(method):
    mean_pooled = tiny_model(global_pool="avg").bfloat16()
    maps = method(mean_pooled, images64().bfloat16())
    assert maps.dtype == torch.float32
    assert maps.shape == (2, 1, *GRID)


def test_public_names():
    assert {*(method.__name__ for method in BY_LAYER), "null_baseline"} == set(baselines.__all__)
    assert {method.__name__ for method in NULLS} == set(DRAWN)
