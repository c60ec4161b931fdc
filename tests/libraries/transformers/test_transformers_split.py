"""transformers' models against naive loops: whole forward passes, with one hook at the cut."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn

import vit_reciprocam as vr
from conftest import tiny_images, tiny_model
from reference import naive_logits
from vit_reciprocam.core.closed_form import closed_form_rows
from vit_reciprocam.core.masks import Masking
from vit_reciprocam.errors import (
    ClosedFormError,
    DownloadError,
    InputError,
    ModelError,
    WeightsError,
)
from vit_reciprocam.libraries.common.zero_shot import ZeroShot
from vit_reciprocam.libraries.dispatch import split_model
from vit_reciprocam.libraries.transformers.load import load_transformers
from vit_reciprocam.libraries.transformers.split import split, split_tower, zero_shot
from vit_reciprocam.libraries.transformers.towers import image_tower
from vit_reciprocam.onnx.export.export import export
from vit_reciprocam.onnx.run.explainer import OnnxExplainer
from vit_reciprocam.pictures.preprocess import Preprocess
from vit_reciprocam.reciprocam import ReciproCAM

COMMON = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 24,
    "patch_size": 4,
}
FLAT = COMMON | {"num_labels": 5}
WIDE = FLAT | {"image_size": (8, 12)}
SQUARE = FLAT | {"image_size": 16}
BIASED = {"use_relative_position_bias": True, "use_shared_relative_position_bias": True}
DINO = {"layerscale_value": 0.5, "mlp_ratio": 2}
READS_CLASS = {"use_mean_pooling": False}
NESTED = {"vision_config": COMMON | {"image_size": 16}, "text_config": COMMON, "num_labels": 5}
SWIN = {
    "image_size": 16,
    "patch_size": 4,
    "embed_dim": 6,
    "depths": [1, 2],
    "num_heads": [1, 3],
    "window_size": 2,
    "num_labels": 5,
}
PVT = {
    "image_size": 32,
    "num_encoder_blocks": 2,
    "depths": [1, 2],
    "hidden_sizes": [6, 12],
    "num_attention_heads": [1, 3],
    "mlp_ratios": [2, 2],
    "num_labels": 5,
}


def case(kind, config, block, cut="layernorm_before", **changes):
    """A family by names: which model, its last block, the module inside whose output is masked."""
    plain = {"prefix": 0, "grid": (4, 4), "path": "direct", "attentions": ("sdpa", "eager")}
    plain["size"] = config.get("image_size", 16)
    return SimpleNamespace(kind=kind, config=config, block=block, cut=cut, **(plain | changes))


CLASS = {"prefix": 1, "path": "closed-form"}
CASES = {
    "vit": case("ViT", WIDE, "vit.layers.1", grid=(2, 3), **CLASS),
    "vit_no_bias": case("ViT", SQUARE | {"qkv_bias": False}, "vit.layers.1", **CLASS),
    "deit": case("DeiT", WIDE, "deit.layers.1", grid=(2, 3), prefix=2, path="closed-form"),
    "deit_teacher": case("DeiT+", SQUARE, "deit.layers.1", prefix=2, path="closed-form"),
    "vit_msn": case("ViTMSN", SQUARE, "vit.layers.1", **CLASS),
    "ijepa": case("IJepa", SQUARE, "ijepa.layers.1"),
    "dinov2": case(
        "Dinov2",
        SQUARE | DINO,
        "dinov2.encoder.layer.1",
        "norm1",
        prefix=1,
        size=(8, 12),
        grid=(2, 3),
    ),
    "dinov2_registers": case(
        "Dinov2WithRegisters",
        SQUARE | DINO | {"num_register_tokens": 3, "use_swiglu_ffn": True},
        "dinov2_with_registers.encoder.layer.1",
        "norm1",
        prefix=4,
    ),
    "beit_mean": case("Beit", SQUARE | BIASED, "beit.layers.1", prefix=1),
    "beit_class": case("Beit", WIDE | BIASED | READS_CLASS, "beit.layers.1", grid=(2, 3), **CLASS),
    "beit_plain": case(
        "Beit", SQUARE | READS_CLASS | {"layer_scale_init_value": 0.0}, "beit.layers.1", **CLASS
    ),
    "data2vec_mean": case(
        "Data2VecVision", SQUARE | BIASED, "data2vec_vision.encoder.layer.1", prefix=1
    ),
    "data2vec_class": case(
        "Data2VecVision",
        SQUARE | BIASED | READS_CLASS,
        "data2vec_vision.encoder.layer.1",
        **CLASS,
    ),
    "clip": case("CLIP", NESTED, "vision_model.encoder.layers.1", "layer_norm1", prefix=1),
    "metaclip": case("MetaClip2", NESTED, "vision_model.encoder.layers.1", "layer_norm1", prefix=1),
    "siglip": case("Siglip", NESTED, "vision_model.encoder.layers.1", "layer_norm1"),
    "swin": case("Swin", SWIN, "swin.encoder.layers.1.blocks.1", grid=(2, 2)),
    "swinv2": case(  # its LayerNorms follow: masked is what its attention reads
        "Swinv2",
        SWIN,
        "swinv2.encoder.layers.1.blocks.1",
        "attention",
        grid=(2, 2),
        attentions=("eager",),
    ),
    "pvt": case(
        "Pvt",
        PVT | {"patch_sizes": [4, 2], "strides": [4, 2], "sequence_reduction_ratios": [2, 1]},
        "pvt.encoder.block.1.1",
        "layer_norm_1",
        attentions=("eager",),
        **CLASS,
    ),
    "pvt_v2": case(
        "PvtV2",
        PVT | {"patch_sizes": [7, 3], "strides": [4, 2], "sr_ratios": [2, 1]},
        "pvt_v2.encoder.layers.1.blocks.1",
        "layer_norm_1",
        attentions=("eager",),
    ),
}
RUNS = [(name, attention) for name, one in CASES.items() for attention in one.attentions]


def shaken(model, seed=0):
    """In float64, with weights large enough for masks to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.double().eval()


def build(kind, config, attention="sdpa"):
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    config = cls.config_class(**config)
    config._attn_implementation = attention
    return shaken(cls(config))


def model_of(one, attention="sdpa"):
    name, plus, _ = one.kind.partition("+")
    kind = f"{name}ForImageClassification" + ("WithTeacher" if plus else "")
    return build(kind, one.config, attention if attention in one.attentions else "eager")


def images_of(size):
    height, width = (size, size) if isinstance(size, int) else size
    return tiny_images((height // 4, width // 4)).double()


def naive(model, images, one, *, kernel="gaussian", class_token=True, layer="norm1", pooled=None):
    """Logits (B, C, h, w): masked at the case's cut, or in the output of the module `pooled`."""

    def find_cut(model):
        block = model.get_submodule(one.block)
        if pooled is not None:
            return None, [model.get_submodule(pooled)], "output"
        side = "output" if "norm" in one.cut else "input"
        return block, [block.get_submodule(one.cut)], side

    settings = {"kernel": kernel, "class_token": class_token, "layer": layer}
    return naive_logits(model, images, one.grid, find_cut=find_cut, prefix=one.prefix, **settings)[
        0
    ]


def assert_equal(ours, wanted, tolerance=1e-9):
    assert ours.shape == wanted.shape
    spread = (wanted.amax((-2, -1)) - wanted.amin((-2, -1))).amax()
    assert spread > 1e-3, "the masks do not matter: the test would pass by chance"
    error = (ours - wanted).abs().max() / wanted.abs().max()
    assert error < tolerance, float(error)


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


class Traced(nn.Module):
    """What an exporter sees: H of all and of halved tokens, and where it holds the closed form."""

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
        rows = closed_form_rows(cut, split.prefix_tokens, Masking())
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
    module, images = Traced(model), torch.cat([images_of(one.size)] * 2)[:3]
    with torch.no_grad():
        program = torch.export.export(
            module, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
        )
        for got, wanted in zip(program.module()(images), module(images), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


# Other cuts


def earlier(one):
    """The case with the block before its last."""
    return SimpleNamespace(**vars(one) | {"block": f"{one.block[:-1]}{int(one.block[-1]) - 1}"})


@pytest.mark.parametrize(("name", "attention"), RUNS)
def test_the_block_before_the_last(name, attention):
    one = CASES[name]
    model, images = model_of(one, attention), images_of(one.size)
    explainer = ReciproCAM(model, score="logit", block=-2)
    assert_equal(explainer.scores(images, "all"), naive(model, images, earlier(one)))
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


POOLED = {  # the module whose output is pooled
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


# Refusals


@pytest.mark.parametrize(
    ("kind", "config", "words"),
    [
        ("ViTModel", WIDE, "no classification head"),
        ("BeitForSemanticSegmentation", SQUARE, "made for semantic segmentation"),
        ("ViTForMaskedImageModeling", SQUARE, "made for masked image modeling"),
        ("Dinov2Backbone", SQUARE, "no classification head"),
        ("BertForSequenceClassification", COMMON | {"vocab_size": 9}, "sequence classification"),
        ("CLIPVisionModel", COMMON | {"image_size": 16}, "zero_shot"),
        ("Siglip2ForImageClassification", NESTED, "patches of images of any shape"),
        (
            "ResNetForImageClassification",
            {"hidden_sizes": [4, 8, 8, 8]},
            "not a Vision Transformer",
        ),
        ("ViTForImageClassification", WIDE | {"num_labels": 0}, "num_labels=0"),
        ("DeiTForImageClassificationWithTeacher", WIDE | {"num_labels": 0}, "num_labels=0"),
    ],
)
def test_refused_models(kind, config, words):
    cls = getattr(transformers, kind)
    config = {key: value for key, value in config.items() if key != "patch_size" or "ViT" in kind}
    if kind == "BeitForSemanticSegmentation":
        config |= {"num_hidden_layers": 12, "out_indices": [3, 5, 7, 11], "patch_size": 4}
    with pytest.raises(ModelError, match=words):
        ReciproCAM(cls(cls.config_class(**config)))


def test_refuses_detection_without_running_it():
    config = transformers.YolosConfig(
        **COMMON | {"image_size": [16, 16], "num_detection_tokens": 2}
    )
    with pytest.raises(ModelError, match="made for object detection, not to classify whole images"):
        split(transformers.YolosForObjectDetection(config))


def test_refuses_bypassed_code_and_hooks():
    class Mine(transformers.ViTForImageClassification):
        def forward(self, pixel_values):
            return super().forward(pixel_values * 2)

    config = transformers.ViTConfig(**WIDE)
    with pytest.raises(ModelError, match="Mine has a forward of its own"):
        ReciproCAM(Mine(config))
    model = transformers.ViTForImageClassification(config)
    for module in (model, model.vit):
        hook = module.register_forward_hook(lambda *_: None)
        with pytest.raises(ModelError, match=f"the {type(module).__name__} has forward hooks"):
            ReciproCAM(model)
        hook.remove()
    model.vit.forward = model.vit.forward
    with pytest.raises(ModelError, match="ViTModel has a forward of its own"):
        ReciproCAM(model)


def test_refuses_another_layout():
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**WIDE))
    del model.vit.layers
    with pytest.raises(ModelError, match=r"no attribute 'layers'.*: use transformers 5\.10"):
        ReciproCAM(model)


def test_a_subclass_with_the_library_s_forward_is_supported():
    class Mine(transformers.ViTForImageClassification):
        pass

    assert not split(Mine(transformers.ViTConfig(**WIDE))).direct_because


def test_unknown_parts_take_the_direct_path():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    one = CASES["vit"]
    model, images = model_of(one), images_of(one.size)
    attention = model.vit.layers[1].attention
    hook = attention.register_forward_hook(lambda *_: None)
    assert "attention has forward hooks" in split(model).direct_because
    hook.remove()
    doubled = Doubled(12, 12).double()
    doubled.load_state_dict(attention.v_proj.state_dict())
    attention.v_proj = doubled
    assert "value projection is a Doubled, not a plain Linear" in split(model).direct_because
    ours = ReciproCAM(model, score="logit").scores(images, "all")
    assert_equal(ours, naive(model, images, one))


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("vit", (3, 8, 8), "takes images of 8x12 pixels"),
        ("pvt", (3, 16, 16), "takes images of 32x32 pixels"),
        ("clip", (3, 8, 8), "takes images of 16x16 pixels"),
        ("vit", (1, 8, 12), "takes 3 channel"),
        ("dinov2", (3, 2, 12), "smaller than a patch"),
        ("swin", (3, 32, 32), "windows of 2x2 patches and these images have 4x4"),
        ("swinv2", (3, 16, 32), "windows of 2x2 patches and these images have 2x4"),
    ],
)
def test_refused_images(name, shape, words):
    one = CASES[name]
    with pytest.raises(InputError, match=words):
        ReciproCAM(model_of(one))(torch.zeros(1, *shape, dtype=torch.float64))


# Towers and text prompts


class Letters:
    """A tokenizer of nine letters."""

    def __call__(self, texts, *, return_tensors, padding, max_length=None):
        ids = [[1 + "abcdefg".index(letter) for letter in text] + [8] for text in texts]
        longest = max_length if padding == "max_length" else max(map(len, ids))
        longest = max(longest, *map(len, ids))
        return {"input_ids": torch.tensor([row + [8] * (longest - len(row)) for row in ids])}


TEXT = COMMON | {"vocab_size": 9, "max_position_embeddings": 6, "projection_size": 12}
TEXT |= {"bos_token_id": 0, "eos_token_id": 8, "pad_token_id": 8}
VISION = COMMON | {"image_size": 16}
TOWERS = {"CLIPModel": 1, "MetaClip2Model": 1, "SiglipModel": 0}


def two_towers(kind, attention="sdpa"):
    config = {"text_config": TEXT, "vision_config": VISION}
    return build(kind, config | ({} if kind == "SiglipModel" else {"projection_dim": 8}), attention)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", TOWERS)
def test_zero_shot(kind, attention):
    model, images = two_towers(kind, attention), images_of(16)
    prompts = ["ab", "c", "gfe"]
    classifier = zero_shot(model, SimpleNamespace(tokenizer=Letters()), prompts)
    texts = Letters()(prompts, return_tensors="pt", padding="max_length", max_length=6)
    with torch.no_grad():
        wanted = model(pixel_values=images, **texts).logits_per_image
        torch.testing.assert_close(classifier(images), wanted, rtol=1e-6, atol=1e-6)
    one = SimpleNamespace(
        block="tower.vision.encoder.layers.1",
        cut="layer_norm1",
        prefix=TOWERS[kind],
        grid=(4, 4),
    )
    explainer = ReciproCAM(classifier, score="logit")
    assert explainer(images).path == ("direct" if kind == "SiglipModel" else "closed-form")
    tolerance = 1e-9 if attention == "sdpa" else 1e-6
    ours = explainer.scores(images, "all")
    assert_equal(ours, naive(classifier, images, one), tolerance)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", TOWERS)
def test_other_cuts_of_towers(kind, attention):
    classifier = zero_shot(two_towers(kind, attention), Letters(), ["ab", "c", "gfe"])
    images, one = images_of(16), SimpleNamespace(grid=(4, 4), prefix=TOWERS[kind])
    one.block, one.cut = "tower.vision.encoder.layers.0", "layer_norm1"
    earlier = ReciproCAM(classifier, score="logit", block=-2)
    assert_equal(earlier.scores(images, "all"), naive(classifier, images, one))
    if kind != "SiglipModel":
        with pytest.raises(InputError, match="VisionModel reads its class token: use layer="):
            ReciproCAM(classifier, layer="pool")
        return
    for kernel in ("gaussian", "dirac"):
        pooled = "tower.vision.post_layernorm"
        wanted = naive(classifier, images, one, kernel=kernel, pooled=pooled)
        for path in ("closed-form", "direct"):
            settings = {"layer": "pool", "kernel": kernel, "path": path}
            explainer = ReciproCAM(classifier, score="logit", **settings)
            assert_equal(explainer.scores(images, "all"), wanted)


def test_the_attention_pool_is_exported_for_any_batch(tmp_path):
    classifier = zero_shot(two_towers("SiglipModel"), Letters(), ["ab", "c"]).float().eval()
    settings = {"resize": "squash", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    export(
        classifier,
        tmp_path / "model.onnx",
        class_names=["ab", "c"],
        preprocess=Preprocess(size=(16, 16), interpolation="bicubic", **settings),
        name="siglip",
        layer="pool",
    )
    images = tiny_images((4, 4), count=3)
    ours = OnnxExplainer(tmp_path / "model.onnx")(images.numpy(), "all")
    wanted = ReciproCAM(classifier, layer="pool")(images, "all")
    np.testing.assert_allclose(ours.scores, wanted.scores, rtol=0, atol=1e-5)


def test_hooks_on_the_attention_pool_still_count():
    classifier = zero_shot(two_towers("SiglipModel"), Letters(), ["ab", "c"])
    images, one = images_of(16), SimpleNamespace(grid=(4, 4), prefix=0, block="tower")
    head = classifier.tower.vision.head
    for module, double, words in (
        (head, lambda *args: 2 * args[2], "the head's attention pool has forward hooks"),
        (head.attention, lambda *args: (2 * args[2][0],), "the head's attention has forward hooks"),
    ):
        hook = module.register_forward_hook(double)
        wanted = naive(classifier, images, one, pooled="tower.vision.post_layernorm")
        explainer = ReciproCAM(classifier, score="logit", layer="pool")
        assert_equal(explainer.scores(images, "all"), wanted)
        with pytest.raises(ClosedFormError, match=words):
            ReciproCAM(classifier, layer="pool", path="closed-form")
        hook.remove()


def test_templates_are_averaged():
    model = two_towers("CLIPModel")
    single = zero_shot(model, Letters(), ["ab", "ac", "db", "dc"]).prompts
    both = zero_shot(model, Letters(), ["b", "c"], ["a{}", "d{}"]).prompts
    wanted = torch.nn.functional.normalize((single[:2] + single[2:]) / 2, dim=-1)
    torch.testing.assert_close(both, wanted)


def test_zero_shot_refusals():
    model = two_towers("CLIPModel")
    for prompts in ("ab", []):
        with pytest.raises(InputError, match="prompts must be a list of at least one text"):
            zero_shot(model, Letters(), prompts)
    with pytest.raises(InputError, match="a prompt has 8 tokens, the model takes 6: 'abcdefg'"):
        zero_shot(model, Letters(), ["a", "abcdefg"])
    with pytest.raises(ModelError, match="no text encoder"):
        zero_shot(model.vision_model, Letters(), ["a"])


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("CLIPVisionModelWithProjection", VISION | {"projection_dim": 8}),
        ("CLIPVisionModel", VISION),
        ("SiglipVisionModel", VISION),
    ],
)
def test_towers_of_their_own(kind, config):
    model, images = build(kind, config), images_of(16)
    tower, prompts = image_tower(model), torch.randn(3, 8 if "Projection" in kind else 12)
    with torch.no_grad():
        output = model(images)
        wanted = output.image_embeds if "Projection" in kind else output.pooler_output
        assert tower(images).equal(wanted)
    explainer = ReciproCAM(ZeroShot(tower, prompts.double(), scale=10))
    assert explainer(images).maps.shape == (2, 1, 4, 4)
    assert split_tower(model).direct_because == split_tower(tower).direct_because


def test_refused_towers():
    with pytest.raises(ModelError, match="is not a supported model"):
        ReciproCAM(image_tower(two_towers("CLIPModel")))
    with pytest.raises(ModelError, match="gives image features, no class scores"):
        ReciproCAM(two_towers("CLIPModel"))
    with pytest.raises(ModelError, match="ViTModel is not a supported image tower"):
        split_tower(transformers.ViTModel(transformers.ViTConfig(**WIDE)))
    with pytest.raises(ModelError, match="no pooling head"):
        split_tower(build("SiglipVisionModel", VISION | {"vision_use_head": False}))


# Folders and the hub


def photo(height=213, width=301):
    """Edges, gradients and texture, as a photograph has."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = np.sin(40 * x * y)[..., None] * [1, 0.5, -1] * 40
    disc = ((x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.05)[..., None] * [90, -60, 30]
    noise = np.random.default_rng(0).normal(0, 8, (height, width, 3))
    values = 120 + waves + disc + noise + 60 * np.stack([x, y, x - y], axis=-1)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


@pytest.fixture(autouse=True)
def _no_progress_bars():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def saved(folder, model, processor=None, **changes):
    model.save_pretrained(folder)
    processor = processor or transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(folder)


def tiny_vit(**config):
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SQUARE | config)).eval()


def test_load_from_a_folder(tmp_path):
    labels = {0: "ant", 1: "bee", 2: "cat", 3: "dog", 4: "eel"}
    model = tiny_vit(id2label=labels)
    loaded, preprocess, names = load_transformers(saved(tmp_path, model), options={})
    assert names == ("ant", "bee", "cat", "dog", "eel")
    assert not loaded.training
    batch = torch.from_numpy(preprocess(photo()))[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(batch).logits, model(batch).logits)
    assert ReciproCAM(loaded)(batch).path == "closed-form"


def test_load_without_names_and_with_options(tmp_path):
    folder = saved(tmp_path, tiny_vit().half())
    loaded, _, names = load_transformers(folder, options={"attn_implementation": "eager"})
    assert names is None
    assert loaded.dtype == torch.float32
    assert loaded.config._attn_implementation == "eager"
    assert load_transformers(folder, options={"dtype": torch.float16})[0].dtype == torch.float16


def test_load_by_spec_and_explain(tmp_path):
    labels = {0: "ant", 1: "bee", 2: "cat", 3: "dog", 4: "eel"}
    folder = saved(tmp_path, tiny_vit(id2label=labels))
    classifier = vr.load(f"hf:{folder}")
    e = vr.explain(photo(), classifier, top=2)
    assert (e.maps.shape, e.path, classifier.num_classes) == ((1, 2, 4, 4), "closed-form", 5)
    assert e.class_names == tuple(labels.values())
    with pytest.raises(InputError, match="give their folder: hf:FOLDER"):
        vr.load(f"hf:{folder}", weights="x.safetensors")
    with pytest.raises(ModelError, match="prompts"):
        vr.load(f"hf:{folder}", prompts=["ant"])


def test_load_prompts_by_spec_and_explain(tmp_path):
    classifier = vr.load(f"hf:{clip_folder(tmp_path)[0]}", prompts=["a", "b"], templates=["{} a"])
    e = vr.explain(photo(), classifier, targets="all")
    assert (e.maps.shape, e.class_names) == ((1, 2, 4, 4), ("a", "b"))


def clip_folder(folder):
    letters = {"a</w>": 0, "b</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3, "!": 4}
    (folder / "vocab.json").write_text(json.dumps(letters))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token="!"
    )
    tokenizer.save_pretrained(folder)
    text = TEXT | {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    return saved(folder, model, transformers.CLIPImageProcessor(**size)), model, tokenizer


def test_load_with_prompts(tmp_path):
    folder, model, tokenizer = clip_folder(tmp_path)
    prompts = ["a", "b a"]
    classifier, preprocess, names = load_transformers(folder, prompts=prompts, options={})
    assert names == ("a", "b a")
    batch = torch.from_numpy(preprocess(photo()))[None]
    with torch.no_grad():
        texts = tokenizer(prompts, padding=True, return_tensors="pt")
        wanted = model(pixel_values=batch, **texts).logits_per_image
        torch.testing.assert_close(classifier(batch), wanted)
    assert ReciproCAM(classifier)(batch).path == "closed-form"
    with pytest.raises(ModelError, match="has no classes of its own: pass prompts"):
        load_transformers(folder, options={})


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("ViTImageProcessor", {"size": {"height": 24, "width": 32}}),
        ("ViTImageProcessor", {"size": {"height": 16, "width": 16}, "resample": 3}),
        ("ViTImageProcessor", {"do_normalize": False}),
        ("DeiTImageProcessor", {}),
        ("DeiTImageProcessor", {"size": {"height": 47, "width": 47}, "crop_size": 23}),
        ("CLIPImageProcessor", {}),
        ("BitImageProcessor", {"size": {"shortest_edge": 256}, "crop_size": 224}),
        ("SiglipImageProcessor", {"size": {"height": 32, "width": 32}}),
        ("BeitImageProcessor", {}),
    ],
)
def test_preprocess_is_the_processor_s(tmp_path, kind, changes, backend):
    own = getattr(transformers, kind + ("Pil" if backend == "pil" else ""))(**changes)
    folder = saved(tmp_path, tiny_vit(), own)
    _, preprocess, _ = load_transformers(folder, options={})
    picture = photo(212, 300)
    wanted = own(images=picture, return_tensors="pt")["pixel_values"][0].numpy()
    ours = preprocess(picture)
    assert ours.shape == wanted.shape
    levels = np.abs(ours - wanted) * 255 * np.array(preprocess.std)[:, None, None]
    # torchvision rounds otherwise than Pillow, by a level or two of 255
    assert levels.max() < (1e-3 if backend == "pil" else 2.5)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("CLIPImageProcessor", {"do_center_crop": False}, "crops to"),
        ("DeiTImageProcessor", {"size": {"height": 8, "width": 8}}, "and crops to"),
        ("ViTImageProcessor", {"resample": 4}, "another filter"),
        ("ViTImageProcessor", {"rescale_factor": 1 / 127.5}, "does more than resize"),
        ("ViTImageProcessor", {"do_resize": False}, "does more than resize"),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}, "crops to nothing"),
    ],
)
def test_refused_preprocessing(tmp_path, kind, changes, words):
    folder = saved(tmp_path, tiny_vit(), getattr(transformers, kind)(**changes))
    with pytest.raises(ModelError, match=f"the preprocessing of .* {kind}, is not .*{words}"):
        load_transformers(folder, options={})


def test_refused_folders(tmp_path):
    def folder(name, model, **changes):
        (tmp_path / name).mkdir()
        return saved(tmp_path / name, model, **changes)

    vit = folder("vit", tiny_vit())
    headless = folder("head", tiny_vit().vit, architectures=["ViTForImageClassification"])
    with pytest.raises(ModelError, match="takes no prompts"):
        load_transformers(vit, prompts=["a"], options={})
    with pytest.raises(ModelError, match="ViTModel has no classification head"):
        load_transformers(folder("bare", tiny_vit().vit), options={})
    with pytest.raises(WeightsError, match=r"no weights for classifier\.bias, classifier\.weight"):
        load_transformers(headless, options={})
    with pytest.raises(ModelError, match="saved as OfMyOwn, which transformers"):
        load_transformers(folder("own", tiny_vit(), architectures=["OfMyOwn"]), options={})
    with pytest.raises(WeightsError, match="no such folder"):
        load_transformers(str(tmp_path / "nothing"), options={})
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"the Config cannot be read from folder .*empty"):
        load_transformers(str(tmp_path / "empty"), options={})
    (tmp_path / "vit" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(WeightsError, match="the ViTForImageClassification cannot be read"):
        load_transformers(vit, options={})
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    with pytest.raises(WeightsError, match="the ImageProcessor cannot be read"):
        load_transformers(vit, options={})


def test_without_network(caplog):
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(DownloadError, match=r"'google/none' could not be fetched: .* local folder"),
    ):
        load_transformers("google/none", options={"local_files_only": True})
    assert not caplog.records
