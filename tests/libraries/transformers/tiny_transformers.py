"""Tiny models of transformers in float64, and their scores by whole forward passes."""

from types import SimpleNamespace

import torch
import transformers

from conftest import tiny_images
from reference import naive_logits

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
    """Return a family by names: its class, its last block, and the module inside that is masked."""
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
    "swinv2": case(  # its LayerNorms follow, so what its attention reads is masked
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


def shake(model, seed=0):
    """Return the model in float64, with weights large enough for masks to matter."""
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
    return shake(cls(config))


def model_of(one, attention="sdpa"):
    name, plus, _ = one.kind.partition("+")
    kind = f"{name}ForImageClassification" + ("WithTeacher" if plus else "")
    return build(kind, one.config, attention if attention in one.attentions else "eager")


def images_of(size):
    height, width = (size, size) if isinstance(size, int) else size
    return tiny_images((height // 4, width // 4)).double()


def naive(model, images, one, *, kernel="gaussian", class_token=True, layer="norm1", pooled=None):
    """Return logits (B, C, h, w), masked at the case's cut or after the module `pooled`."""

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


TEXT = COMMON | {"vocab_size": 9, "max_position_embeddings": 6, "projection_size": 12}
TEXT |= {"bos_token_id": 0, "eos_token_id": 8, "pad_token_id": 8}
VISION = COMMON | {"image_size": 16}
