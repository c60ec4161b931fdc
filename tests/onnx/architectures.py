"""Tiny models of every library to export, and runtimes to run the files."""

import numpy as np
import onnxruntime
import open_clip
import openvino
import torch
import torchvision
import transformers
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from conftest import tiny_images, tiny_model
from vit_reciprocam.libraries.common.zero_shot import ZeroShot

SIZE = (12, 20)
TIMM = {
    "img_size": SIZE,
    "patch_size": 4,
    "embed_dim": 12,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 5,
}
TRANSFORMERS = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 24,
}
TORCHVISION = {
    "image_size": 16,
    "patch_size": 4,
    "num_layers": 2,
    "num_heads": 3,
    "hidden_dim": 12,
    "mlp_dim": 24,
    "num_classes": 5,
}


def shaken(model, spread=0.3):
    """Return the model with weights large enough for masks to matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += spread * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def of_transformers(kind, **options):
    cls = getattr(transformers, f"{kind}ForImageClassification")
    return shaken(cls(cls.config_class(**TRANSFORMERS, num_labels=5, **options)))


def zero_shot(tower, width=8):
    prompts = torch.randn(4, width, generator=torch.Generator().manual_seed(2))
    return ZeroShot(tower, prompts, scale=3.0)


def of_clip():
    config = transformers.CLIPVisionConfig(**TRANSFORMERS, projection_dim=8)
    model = shaken(transformers.CLIPVisionModelWithProjection(config))
    return zero_shot(model)


def of_open_clip():
    settings = {"width": 12, "layers": 2, "heads": 3, "mlp_ratio": 2, "output_dim": 8}
    return zero_shot(
        shaken(open_clip.transformer.VisionTransformer(image_size=16, patch_size=4, **settings))
    )


def eva(**options):
    rotary = {"use_abs_pos_emb": False, "use_rot_pos_emb": True, "global_pool": "token"}
    return shaken(Eva(**TIMM | rotary | options))


def swin():
    settings = {"embed_dim": 6, "depths": (1, 2), "num_heads": (1, 3), "window_size": 2}
    return shaken(SwinTransformer(img_size=16, patch_size=2, num_classes=5, **settings))


ARCHITECTURES = {
    "timm vit": lambda: shaken(VisionTransformer(**TIMM)),
    "timm deit distilled": lambda: tiny_model(grid=(3, 5), distilled=True),
    "timm dinov2 registers": lambda: shaken(
        VisionTransformer(**TIMM, reg_tokens=4, init_values=0.5, no_embed_class=True)
    ),
    "timm dinov3 rotary": lambda: eva(rope_type="dinov3", rope_rotate_half=True, num_reg_tokens=2),
    "timm eva rotary, key bias": lambda: eva(attn_type="rope", qk_norm=True),
    "timm beit relative bias": lambda: shaken(
        Beit(**TIMM, global_pool="token", use_rel_pos_bias=True)
    ),
    "timm cait": lambda: shaken(Cait(**TIMM)),
    "timm vit, attention pool": lambda: shaken(
        VisionTransformer(**TIMM, global_pool="map", class_token=False)
    ),
    "timm vit, mean pool": lambda: shaken(VisionTransformer(**TIMM, global_pool="avg")),
    "timm swin": swin,
    "transformers vit": lambda: of_transformers("ViT"),
    "transformers dinov2": lambda: of_transformers("Dinov2", layerscale_value=0.5),
    "transformers beit": lambda: of_transformers(
        "Beit", use_relative_position_bias=True, use_mean_pooling=False
    ),
    "transformers clip zero-shot": of_clip,
    "torchvision vit": lambda: shaken(torchvision.models.VisionTransformer(**TORCHVISION)),
    "open_clip zero-shot": of_open_clip,
}
DIRECT = {"timm vit, attention pool", "timm vit, mean pool", "timm swin", "transformers dinov2"}


def size_of(name):
    small = name == "timm swin" or not name.startswith("timm")
    return (16, 16) if small else SIZE


def images_of(count, size):
    return tiny_images((size[0] // 4, size[1] // 4), count=count)


def onnx_runtime(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda **feeds: dict(zip(names, session.run(None, feeds), strict=True))


def open_vino(path):
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda **feeds: {
        name: value for output, value in compiled(feeds).to_dict().items() for name in output.names
    }


def near(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * abs(wanted).max())
