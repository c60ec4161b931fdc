"""Whatever is changed in a model, its scores are the changed model's own, or it is refused."""

import copy
import types

import open_clip
import pytest
import torch
import transformers
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import nn
from torchvision import models as torchvision_models

from conftest import tiny_images, tiny_model
from reference import naive_logits
from vit_reciprocam import ReciproCAM
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.libraries.common.zero_shot import ZeroShot
from vit_reciprocam.libraries.dispatch import split_model

SMALL = {"img_size": (8, 12), "patch_size": 4, "embed_dim": 12, "num_heads": 3, "num_classes": 5}


def shake(model):
    """Return the model in float64, with weights large enough for masks to matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    model = model.double().eval()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # only then is its attn_drop called
    return model


def hugging_face():
    sizes = {"hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 24}
    more = {"num_hidden_layers": 2, "patch_size": 4, "image_size": (8, 12), "num_labels": 5}
    config = transformers.ViTConfig(**sizes, **more)
    return transformers.ViTForImageClassification(config)


def clip(**options):
    sizes = {"image_size": (8, 12), "patch_size": 4, "width": 12, "layers": 2, "heads": 3}
    tower = open_clip.transformer.VisionTransformer(**sizes, mlp_ratio=2, output_dim=8, **options)
    return ZeroShot(tower, torch.randn(5, 8), scale=7.0)


def torchvision_swin():
    return torchvision_models.SwinTransformer([4, 4], 6, [1, 2], [1, 3], [4, 4], num_classes=5)


# A row is (builder, path, where its tokens are masked, number of prefix tokens, grid).
MODELS = {
    "timm": (
        lambda: tiny_model(init_values=0.5, qk_norm=True),
        "closed-form",
        ("blocks.1.norm1", "output"),
        1,
        (2, 3),
    ),
    "timm avg": (
        lambda: tiny_model(global_pool="avg"),
        "direct",
        ("blocks.1.norm1", "output"),
        1,
        (2, 3),
    ),
    "timm avg pool": (
        lambda: tiny_model(global_pool="avg"),
        "closed-form",
        ("norm", "output"),
        1,
        (2, 3),
    ),
    "timm parallel": (
        lambda: tiny_model(block_fn=ParallelScalingBlock),
        "closed-form",
        ("blocks.1.in_norm", "output"),
        1,
        (2, 3),
    ),
    "timm attention pool": (
        lambda: tiny_model(global_pool="map", class_token=False),
        "closed-form",
        ("norm", "output"),
        0,
        (2, 3),
    ),
    "timm eva": (
        lambda: Eva(**SMALL, depth=2, global_pool="token", use_rot_pos_emb=True, qkv_fused=False),
        "closed-form",
        ("blocks.1.norm1", "output"),
        1,
        (2, 3),
    ),
    "timm swin": (
        lambda: SwinTransformer(
            img_size=16,
            patch_size=4,
            embed_dim=6,
            depths=(1, 2),
            num_heads=(1, 2),
            window_size=2,
            num_classes=5,
        ),
        "direct",
        ("layers.1.blocks.1.norm1", "output"),
        0,
        (2, 2),
    ),
    "torchvision": (
        lambda: torchvision_models.VisionTransformer(8, 4, 2, 3, 12, 24, num_classes=5),
        "closed-form",
        ("encoder.layers.encoder_layer_1.ln_1", "output"),
        1,
        (2, 2),
    ),
    "torchvision swin": (
        torchvision_swin,
        "direct",
        ("features.3.1.norm1", "output"),
        0,
        (2, 2),
    ),
    "torchvision swin pool": (
        torchvision_swin,
        "closed-form",
        ("norm", "output"),
        0,
        (2, 2),
    ),
    "transformers": (
        hugging_face,
        "closed-form",
        ("vit.layers.1.layernorm_before", "output"),
        1,
        (2, 3),
    ),
    "open_clip": (
        clip,
        "closed-form",
        ("tower.transformer.resblocks.1.ln_1", "output"),
        1,
        (2, 3),
    ),
    "open_clip qk norm": (
        lambda: clip(qk_norm=True),
        "closed-form",
        ("tower.transformer.resblocks.1.ln_1", "output"),
        1,
        (2, 3),
    ),
}


class Adapted(nn.Linear):
    """A linear layer with something added, as parameter-efficient fine-tuning does."""

    def forward(self, x):
        return super().forward(x) + x.mean(dim=-1, keepdim=True)


def change_value(value):
    """Return a tensor, or a tuple whose first is one, that is not what it was."""
    if isinstance(value, tuple):
        return (change_value(value[0]), *value[1:])
    if not isinstance(value, torch.Tensor):  # an output object of transformers
        key = next(iter(value))
        value = copy.copy(value)
        value[key] = change_value(value[key])
        return value
    return 2 * value + value.roll(1, -1)


def hook(module):
    module.register_forward_hook(lambda _module, _args, output: change_value(output))


def patch(module):
    def patched(self, *args, **options):
        return change_value(type(self).forward(self, *args, **options))

    module.forward = types.MethodType(patched, module)


def adapt(module):
    if isinstance(module, nn.Linear):
        module.__class__ = Adapted


CHANGES = {"hook": hook, "patch": patch, "adapt": adapt}


def find_cut(path, side):
    return lambda model: (None, [model.get_submodule(path)], side)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", MODELS)
def test_a_changed_module_counts_or_is_refused(name, change):
    make, path, (tap, side), prefix, grid = MODELS[name]
    torch.manual_seed(0)
    model = shake(make())
    scale = 2 if "swin" in name else 1
    images = tiny_images((scale * grid[0], scale * grid[1])).double()
    options = {"score": "logit", "layer": "pool" if name.endswith("pool") else "norm1"}
    assert ReciproCAM(model, **options)(images[:1]).path == path
    outcomes = set()
    for part, module in model.named_modules():
        if change == "adapt" and type(module) is not nn.Linear:
            continue
        other = copy.deepcopy(model)
        CHANGES[change](other.get_submodule(part))
        try:
            scores = ReciproCAM(other, **options).scores(images, "all")
        except ModelError:
            outcomes.add("refused")
            continue
        wanted, _ = naive_logits(
            other,
            images,
            grid,
            kernel="gaussian",
            class_token=True,
            layer="norm1",
            find_cut=find_cut(tap, side),
            prefix=prefix,
        )
        torch.testing.assert_close(
            scores, wanted, rtol=1e-9, atol=1e-9, msg=lambda text, part=part: f"{part}: {text}"
        )
        outcomes.add("exact")
    assert outcomes == ({"exact"} if change == "adapt" else {"exact", "refused"})


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("timm", "norm"),
        ("torchvision", "encoder.ln"),
        ("transformers", "vit.layernorm"),
        ("open_clip", "tower.ln_post"),
    ],
)
def test_a_norm_after_the_block_that_mixes_tokens_takes_the_direct_path(name, norm):
    make, _, (tap, side), prefix, grid = MODELS[name]
    torch.manual_seed(0)
    model, images = shake(make()), tiny_images(grid).double()
    module = model.get_submodule(norm)
    module.register_forward_hook(lambda _module, _args, y: y + y.mean(dim=1, keepdim=True))
    e = ReciproCAM(model, score="logit")(images, "all")
    assert e.path == "direct"
    masking = {"kernel": "gaussian", "class_token": True, "layer": "norm1", "prefix": prefix}
    wanted, _ = naive_logits(model, images, grid, find_cut=find_cut(tap, side), **masking)
    torch.testing.assert_close(torch.tensor(e.scores), wanted.float(), rtol=1e-5, atol=1e-4)


def masked_logits(model, images, grid=(2, 3), prefix=1):
    cut = find_cut("blocks.1.norm1", "output")
    masking = {"kernel": "gaussian", "class_token": True, "layer": "norm1", "prefix": prefix}
    return naive_logits(model, images, grid, find_cut=cut, **masking)[0]


class Squared(nn.Module):
    def forward(self, x):
        return x**2


@pytest.mark.parametrize("replacement", [Squared(), nn.Softplus()])
def test_a_dropout_that_is_none_takes_the_direct_path(replacement):
    model, images = shake(tiny_model()), tiny_images().double()
    model.blocks[-1].attn.attn_drop = replacement
    assert "attn.attn_drop is a" in split_model(model).direct_because
    scores = ReciproCAM(model, score="logit").scores(images, "all")
    torch.testing.assert_close(scores, masked_logits(model, images), rtol=1e-9, atol=1e-9)


class OwnHead(VisionTransformer):
    def forward_head(self, x, pre_logits=False):
        return super().forward_head(x, pre_logits) * torch.arange(1, 6)


class OwnPool(VisionTransformer):
    def pool(self, x, pool_type=None):
        return x.amax(dim=1)


@pytest.mark.parametrize("cls", [OwnHead, OwnPool])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_head_of_its_own_counts(cls, pool):
    model, images = shake(cls(**SMALL, depth=2, global_pool=pool)), tiny_images().double()
    explainer = ReciproCAM(model, score="logit")
    assert explainer(images).path == "direct"
    wanted = masked_logits(model, images)
    torch.testing.assert_close(explainer.scores(images, "all"), wanted, rtol=1e-9, atol=1e-9)
    if pool == "avg":
        method = "forward_head" if cls is OwnHead else "pool"
        with pytest.raises(ModelError, match=f"{cls.__name__} has a {method} of its own"):
            ReciproCAM(model, layer="pool")


@pytest.mark.parametrize("pads", [False, True])
def test_patches_that_are_not_square(pads):
    torch.manual_seed(0)
    sizes = {"patch_size": (4, 8), "embed_dim": 24, "depth": 2, "num_heads": 2}
    more = {"pos_embed_grid_size": (2, 3), "class_token": True, "global_pool": "token"}
    config = NaFlexVitCfg(**sizes, **more, dynamic_img_pad=pads)
    model = shake(NaFlexVit(config, num_classes=5))
    images = torch.randn(2, 3, 7 if pads else 8, 22 if pads else 24).double()
    scores = ReciproCAM(model, score="logit").scores(images, "all")
    torch.testing.assert_close(scores, masked_logits(model, images), rtol=1e-9, atol=1e-9)


def test_a_method_that_somebody_patched_is_given_back():
    sizes = {"embed_dim": 6, "depths": (1, 1), "num_heads": (1, 2), "window_size": 2}
    model = SwinTransformerV2(img_size=16, patch_size=4, num_classes=5, **sizes).eval()
    block = model.layers[-1].blocks[-1]
    own = block._attn

    def patched(x):
        return 2 * own(x)

    block._attn = patched
    ReciproCAM(model)(tiny_images((4, 4)))
    assert block._attn is patched


class Quantised(nn.Linear):
    """A stand-in for PyTorch's own quantised layers, which warn of their removal when created."""


Quantised.__module__ = "torch.ao.nn.quantized.dynamic.modules.linear"


class Holds(nn.Module):
    def __init__(self, **inside):
        super().__init__()
        for name, module in inside.items():
            self.add_module(name, module)


def quantised():
    model = tiny_model()
    model.blocks[1].mlp.fc1.__class__ = Quantised
    return model


def detector():
    make = torchvision_models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    return make(weights=None, weights_backbone=None)


def segmenter():
    make = torchvision_models.segmentation.lraspp_mobilenet_v3_large
    return make(weights=None, weights_backbone=None)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (quantised, r"blocks\.1\.mlp\.fc1 is quantised \(torch\.ao\.nn.*pass the float model"),
        (lambda: nn.DataParallel(tiny_model()), r"DataParallel .*: pass model\.module$"),
        (
            lambda: Holds(a=tiny_model(), b=tiny_model()),
            r"It holds timm's VisionTransformer at \.a and \.b: pass one of them, or",
        ),
        (
            lambda: Holds(inner=Holds(net=tiny_model()), other=nn.Linear(2, 2)),
            r"It holds timm's VisionTransformer at \.inner\.net: pass model\.inner\.net, or",
        ),
        (lambda: Holds(net=tiny_model(num_classes=0)), "If this wraps one, pass the wrapped"),
        (detector, "FasterRCNN finds boxes .*pass a classifier"),
        (segmenter, "LRASPP labels pixels.*target="),
    ],
)
def test_the_refusal_says_what_it_is_and_what_to_pass(make, words):
    with pytest.raises(ModelError, match=words):
        split_model(make().eval())


def test_quantised_models_are_refused_by_target_too():
    model = quantised()
    with pytest.raises(ModelError, match="is quantised"):
        ReciproCAM(model, target=model.blocks[-1].norm1, grid=(2, 3), prefix_tokens=1)


class Mean(nn.Module):
    """A model without a parameter."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Identity()

    def forward(self, images):
        patches = nn.functional.avg_pool2d(images, 4).flatten(2).transpose(1, 2)
        return self.tokens(patches).mean(dim=1)


def test_a_model_without_parameters():
    model, images = Mean().eval(), tiny_images()
    e = ReciproCAM(model, score="logit", target=model.tokens, grid=(2, 3), prefix_tokens=0)(images)
    assert e.maps.shape == (2, 1, 2, 3)
    torch.testing.assert_close(torch.from_numpy(e.logits.copy()), model(images))


def test_the_meta_device():
    model, images = tiny_model(), tiny_images()
    with pytest.raises(ModelError, match="VisionTransformer is on the meta device"):
        ReciproCAM(tiny_model().to("meta"))(images)
    with pytest.raises(InputError, match="images are on the meta device"):
        ReciproCAM(model)(images.to("meta"))
    mean = Mean().eval()
    explainer = ReciproCAM(mean, target=mean.tokens, grid=(2, 3), prefix_tokens=0)
    with pytest.raises(InputError, match="images are on the meta device"):
        explainer(images.to("meta"))
