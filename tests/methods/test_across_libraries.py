"""The same weights in several libraries give the same maps."""

import re

import pytest
import torch
import transformers
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

from baseline_methods import BY_LAYER, TARGETS, assert_near, images64
from conftest import tiny_model
from reference_relevance import naive_rollout
from vit_reciprocam.errors import ModelError
from vit_reciprocam.methods.baselines import (
    relevance,
    rollout,
)


def renamed(state, rules):
    """Return a state dict by other names; a list of names in a rule takes equal shares."""
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


def build_of_transformers(kind, config, attention, state, body):
    config._attn_implementation = attention
    model = getattr(transformers, kind)(config).double().eval()
    model.load_state_dict(renamed(state, transformers_names(body)))
    return model


def twins(name):
    """Return a model of another library, and timm's with the same weights."""
    library, _, attention = name.partition(" ")
    theirs = tiny_model(grid=(4, 4), distilled=library == "deit").double()
    state = theirs.state_dict()
    if library == "torchvision":
        model = TorchvisionViT(16, 4, 2, 3, 12, 48, num_classes=5).double().eval()
        model.load_state_dict(renamed(state, TORCHVISION_NAMES))
    elif library == "vit":
        config = transformers.ViTConfig(**CONFIG)
        model = build_of_transformers("ViTForImageClassification", config, attention, state, "vit")
    else:
        config = transformers.DeiTConfig(**CONFIG)
        kind = "DeiTForImageClassificationWithTeacher"
        model = build_of_transformers(kind, config, attention, state, "deit")
    return model, theirs


@pytest.mark.parametrize("name", ["torchvision", "vit sdpa", "vit eager", "deit sdpa"])
@pytest.mark.parametrize("method", BY_LAYER)
def test_the_same_weights_in_other_libraries_give_the_same_maps(method, name):
    model, theirs = twins(name)
    images = images64(2, (4, 4))
    maps = method(model, images, TARGETS)
    assert maps.shape == (2, 2, 4, 4)
    assert_near(maps, method(theirs, images, TARGETS))


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
    assert_near(rollout(model, images)[:, 0], wanted)
    with pytest.raises(ModelError, match=r"relevance is not supported for this Dinov2.*rollout"):
        relevance(model, images)
