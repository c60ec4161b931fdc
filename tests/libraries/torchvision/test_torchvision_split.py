"""torchvision's models, tiny and in float64, against whole forward passes under a hook."""

import copy
import itertools
import math
import urllib.error
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.models import _api as registry
from torchvision.models import get_model_weights, resnet18
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerBlockV2,
)
from torchvision.models.vision_transformer import (
    ConvStemConfig,
    EncoderBlock,
    VisionTransformer,
    ViT_B_16_Weights,
)
from torchvision.transforms._presets import ImageClassification
from torchvision.transforms.functional import InterpolationMode

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
from vit_reciprocam.libraries.torchvision.load import _preprocess, load_torchvision

MASKINGS = [
    {"kernel": kernel, "class_token": class_token, "layer": layer}
    for kernel, class_token, layer in itertools.product(
        ["gaussian", "dirac"], [True, False], ["norm1", "block"]
    )
]


def shaken(model, spread=0.3):
    """In float64, with weights large enough for masks to matter."""
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
    return shaken(VisionTransformer(**(sizes | options)))


def swin(**options):
    sizes = {
        "patch_size": [2, 2],
        "embed_dim": 8,
        "depths": [1, 2],
        "num_heads": [1, 2],
        "window_size": [4, 4],
        "num_classes": 5,
    }
    return shaken(SwinTransformer(**(sizes | options)))


def swin_v2(**options):
    return swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2, **options)


def own_forward(find):
    """A ViT, one module of which has a forward of its own, which does the same."""
    model = vit()
    module = find(model)
    kind = type(module)

    def forward(self, *args, **options):
        return kind.forward(self, *args, **options)

    module.__class__ = type("Own", (kind,), {"forward": forward})
    return model


def hooked(find):
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


# --- exactness -------------------------------------------------------------------------------

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
    model = own_forward(lambda model: model.encoder.layers[-1].self_attention)
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
    assert_exact(shaken(model), images, (4, 4), at_ln_1, path, MASKINGS[0])


def test_attention_without_biases():
    model = VisionTransformer(16, 4, 2, 3, 12, 24, num_classes=5)
    attention = nn.MultiheadAttention(12, 3, batch_first=True, bias=False)
    model.encoder.layers[-1].self_attention = attention
    images = tiny_images((4, 4)).double()
    assert_exact(shaken(model), images, (4, 4), at_ln_1, "closed-form", MASKINGS[0])


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


# --- other cuts ------------------------------------------------------------------------------


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


def converted(state):
    """A state dict of timm's Vision Transformer as torchvision's."""
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
    model.load_state_dict(converted(timms.state_dict()))
    images = tiny_images((4, 4)).double()
    one, other = ReciproCAM(timms, **masking), ReciproCAM(model, **masking)
    torch.testing.assert_close(
        other.scores(images, "all"), one.scores(images, "all"), rtol=1e-10, atol=1e-12
    )
    np.testing.assert_allclose(other(images, "all").maps, one(images, "all").maps, atol=1e-6)


# --- what is refused, what is left alone -------------------------------------------------------


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
        (lambda: own_forward(lambda m: m.encoder.layers[-1]), "is a Own, .* must be torchvision's"),
        (own_swin_block, r"is a Own, which is not supported: .* SwinTransformerBlock"),
        (lambda: hooked(lambda m: m), "the VisionTransformer has forward hooks"),
        (lambda: hooked(lambda m: m.encoder), "the Encoder has forward hooks"),
        (lambda: hooked(lambda m: m.encoder.layers), r"hooks \(at encoder.layers\)"),
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


# --- models by name --------------------------------------------------------------------------


@pytest.fixture
def tiny_name(monkeypatch):
    """A tiny model registered with torchvision, with the published weights of vit_b_16."""

    def tiny(*, weights: ViT_B_16_Weights | None = None, progress: bool = True, **options):
        if weights is not None and options.get("num_classes", 1000) != 1000:
            raise ValueError("The parameter 'num_classes' expected value 1000")
        sizes = {"image_size": 16, "num_classes": 1000} | options
        model = VisionTransformer(
            patch_size=4, num_layers=1, num_heads=3, hidden_dim=12, mlp_dim=24, **sizes
        )
        if weights is not None:
            model.load_state_dict(weights.get_state_dict(progress=progress, check_hash=True))
        return model

    tiny.__module__ = VisionTransformer.__module__
    monkeypatch.setitem(registry.BUILTIN_MODELS, "tiny_vit", tiny)
    return "tiny_vit"


def saved(path, **options):
    model = VisionTransformer(16, 4, 1, 3, 12, 24, **options)
    nn.init.normal_(model.heads.head.weight)
    if path.suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    return model.eval()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_local_weights(tiny_name, tmp_path, suffix):
    path = tmp_path / f"mine{suffix}"
    original = saved(path)
    model, preprocess, names = load_torchvision(tiny_name, weights=path, options={})
    assert not model.training
    images = tiny_images((4, 4))
    torch.testing.assert_close(model(images), original(images))
    assert (len(names), names[:2]) == (1000, ("tench", "goldfish"))
    assert preprocess.size == (16, 16)
    assert preprocess.interpolation == "bilinear"
    assert ReciproCAM(model)(images).path == "closed-form"


def test_load_by_spec_and_explain(tiny_name, tmp_path):
    saved(tmp_path / "mine.pth", num_classes=7)
    classifier = vr.load(f"torchvision:{tiny_name}", weights=tmp_path / "mine.pth")
    e = vr.explain(np.zeros((20, 30, 3), np.uint8), classifier)
    assert (e.maps.shape, e.path, classifier.num_classes) == ((1, 1, 4, 4), "closed-form", 7)
    with pytest.raises(InputError, match="has classes of its own"):
        vr.load(f"torchvision:{tiny_name}", prompts=["a dog"])


def test_local_weights_say_their_classes_and_image_size(tiny_name, tmp_path):
    model = VisionTransformer(24, 4, 1, 3, 12, 24, num_classes=7)
    torch.save({"model": model.state_dict()}, tmp_path / "mine.pth")
    loaded, preprocess, names = load_torchvision(
        tiny_name, weights=tmp_path / "mine.pth", options={}
    )
    assert (loaded.num_classes, loaded.image_size, names) == (7, 24, None)
    assert preprocess.size == (24, 24)


def test_a_file_of_published_name_is_prepared_for_as_published(tiny_name, tmp_path):
    path = tmp_path / "vit_b_16_swag-9ac1b537.pth"
    saved(path)
    assert path.name == ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1.url.rpartition("/")[2]
    _, preprocess, _ = load_torchvision(tiny_name, weights=path, options={})
    assert (preprocess.crop_pct, preprocess.interpolation) == (1.0, "bicubic")


@pytest.mark.parametrize(
    ("weights", "chosen"), [(None, "IMAGENET1K_V1"), ("IMAGENET1K_SWAG_LINEAR_V1",) * 2]
)
def test_published_weights(tiny_name, tmp_path, monkeypatch, weights, chosen):
    original = saved(tmp_path / "fetched.pth")
    asked = []

    def fetch(self, **_options):
        asked.append(self.name)
        return original.state_dict()

    monkeypatch.setattr(registry.WeightsEnum, "get_state_dict", fetch)
    model, _, names = load_torchvision(tiny_name, weights=weights, options={})
    assert asked == [chosen]
    assert len(names) == 1000
    assert torch.equal(model.class_token, original.class_token)


def test_no_network_says_what_to_do(tiny_name, monkeypatch):
    def fetch(self, **_options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(registry.WeightsEnum, "get_state_dict", fetch)
    words = r"'tiny_vit' could not be fetched: no route to host\. .*pass a local file: --weights"
    with pytest.raises(DownloadError, match=words):
        load_torchvision(tiny_name, weights=None, options={})


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("vit_b_17", {}, r"no model 'vit_b_17'\. Closest: vit_b_16"),
        ("resnet18", {}, "resnet18 is not supported: it is neither"),
        ("fasterrcnn_resnet50_fpn", {}, "is not supported"),  # would fetch its backbone
        ("swin3d_t", {}, "is not supported"),  # videos
        ("tiny_vit", {"colour": 3}, "cannot create 'tiny_vit' with options"),
        ("tiny_vit", {"image_size": 15}, "indivisible by patch size"),
        ("tiny_vit", {"num_classes": 3}, "do not go with options"),
    ],
)
@pytest.mark.usefixtures("tiny_name")
def test_names_that_cannot_be_loaded(name, options, words):
    with pytest.raises(ModelError, match=words):
        load_torchvision(name, weights=None, options=options)


def test_local_weights_that_do_not_fit(tiny_name, tmp_path):
    torch.save({"class_token": torch.zeros(1, 1, 12)}, tmp_path / "few.pth")
    with pytest.raises(
        WeightsError, match=r"few\.pth does not fit 'tiny_vit': Missing key.*variant"
    ):
        load_torchvision(tiny_name, weights=tmp_path / "few.pth", options={})
    with pytest.raises(WeightsError, match="no such weights file"):
        load_torchvision(tiny_name, weights=tmp_path / "none.pth", options={})


NAMES = [f"vit_{size}" for size in ("b_16", "b_32", "l_16", "l_32", "h_14")]
NAMES += [f"swin_{size}" for size in ("t", "s", "b", "v2_t", "v2_s", "v2_b")]
PUBLISHED = [weights for name in NAMES for weights in get_model_weights(name)]


@pytest.mark.parametrize("weights", PUBLISHED, ids=repr)
@pytest.mark.parametrize("size", [(300, 400), (641, 427)])
def test_preprocessing_is_torchvisions(weights, size):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (size[1] // 9, size[0] // 9, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size)
    transform = weights.transforms()
    ours = _preprocess(transform, None)(image)
    np.testing.assert_allclose(ours, transform(image), rtol=0, atol=1e-6)


def test_preprocessing_of_any_crop():
    for crop, resize in itertools.product(range(200, 520, 3), range(200, 600, 7)):
        if resize >= crop:
            transform = ImageClassification(crop_size=crop, resize_size=resize)
            assert math.floor(crop / _preprocess(transform, None).crop_pct) == resize


@pytest.mark.parametrize(
    "transform",
    [
        partial(ImageClassification, crop_size=224, resize_size=200),  # pads
        partial(ImageClassification, crop_size=224, interpolation=InterpolationMode.BOX),
        nn.Identity,
    ],
)
def test_other_preprocessing_is_refused(transform):
    with pytest.raises(ModelError, match="is not supported"):
        _preprocess(transform(), None)
