"""Tiny models, and the tools of others that write ONNX files of them."""

import contextlib
import functools
import io
import logging
import warnings

import onnxruntime
import timm
import torch
import torchvision
import transformers
from onnxruntime import quantization
from onnxruntime.transformers import float16, optimizer
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

import onnx

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
TIMM = {**SIZES, "num_classes": 7}
POSITIONS = {"use_abs_pos_emb": False, "global_pool": "token"}
HUB = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2}
HUB |= {"num_attention_heads": 3, "intermediate_size": 48, "num_labels": 7}


class Logits(torch.nn.Module):
    """A model of transformers as exporters want it: a tensor in, a tensor out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(pixel_values=images).logits


def _tiny(**options):
    return VisionTransformer(**{**TIMM, **options})


def _torchvision():
    return torchvision.models.VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=3,
        hidden_dim=24,
        mlp_dim=48,
        num_classes=7,
    )


def _swin():
    return timm.models.swin_transformer.SwinTransformer(
        img_size=32,
        patch_size=4,
        embed_dim=12,
        depths=(1, 1),
        num_heads=(2, 2),
        window_size=4,
        num_classes=7,
    )


# name -> builder, prefix tokens, the module whose output is F, whether the closed form holds
MODELS = {
    "vit": (_tiny, 1, "blocks.1.norm1", True),
    "rectangle": (lambda: _tiny(img_size=(32, 48)), 1, "blocks.1.norm1", True),
    "distilled": (lambda: VisionTransformerDistilled(**TIMM), 2, "blocks.1.norm1", True),
    "registers": (lambda: _tiny(reg_tokens=2, init_values=0.5), 3, "blocks.1.norm1", True),
    "qk_norm": (lambda: _tiny(qk_norm=True), 1, "blocks.1.norm1", True),
    "rotary": (
        lambda: Eva(
            **TIMM,
            use_rot_pos_emb=True,
            use_abs_pos_emb=False,
            swiglu_mlp=True,
            global_pool="token",
        ),
        1,
        "blocks.1.norm1",
        True,
    ),
    "relative": (
        lambda: Beit(**TIMM, **POSITIONS, use_rel_pos_bias=True, init_values=1),
        1,
        "blocks.1.norm1",
        True,
    ),
    "torchvision": (_torchvision, 1, "encoder.layers.encoder_layer_1.ln_1", True),
    "hub vit": (
        lambda: Logits(transformers.ViTForImageClassification(transformers.ViTConfig(**HUB))),
        1,
        "model.vit.layers.1.layernorm_before",
        True,
    ),
    "hub deit": (
        lambda: Logits(
            transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**HUB))
        ),
        2,
        "model.deit.layers.1.layernorm_before",
        True,
    ),
    "hub dinov2": (  # the class token beside the mean of the patches
        lambda: Logits(transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**HUB))),
        1,
        "model.dinov2.encoder.layer.1.norm1",
        False,
    ),
    "mean": (lambda: _tiny(global_pool="avg"), 1, "blocks.1.norm1", False),
    "attention pool": (
        lambda: _tiny(global_pool="map", class_token=False),
        0,
        "blocks.1.norm1",
        False,
    ),
    "cait": (lambda: Cait(**TIMM), 1, "blocks_token_only.1.norm1", False),
    "swin": (_swin, 0, "layers.1.blocks.0.norm1", False),
}


def build(name, *, seed=0):
    """Return a seeded model whose weights are large enough for masks to matter."""
    torch.manual_seed(seed)
    model = MODELS[name][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def pictures(name, count=3):
    """Return the seeded images that a model of MODELS is exported with."""
    shape = (32, 48) if name == "rectangle" else (32, 32)
    return torch.randn(count, 3, *shape, generator=torch.Generator().manual_seed(5))


def export_dynamo(model, images, path, *, batch=None, opset=None):
    """Export by the newer exporter of PyTorch."""
    shapes = None if batch == "fixed" else ({0: torch.export.Dim("batch")},)
    _quietly(
        torch.onnx.export,
        model,
        (images[:1] if batch == "fixed" else images,),
        path,
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=shapes,
        external_data=False,
        verbose=False,
    )


def export_torchscript(model, images, path, *, batch=None, opset=None):
    """Export by the older exporter of PyTorch."""
    axes = None if batch == "fixed" else {"images": {0: "batch"}}
    _quietly(
        torch.onnx.export,
        model,
        (images[:1] if batch == "fixed" else images,),
        path,
        dynamo=False,
        opset_version=opset,
        input_names=["images"],
        dynamic_axes=axes,
    )


def export_timm(model, images, path):
    """Export by timm's own helper, which switches fused attention off."""
    from timm.utils.onnx import onnx_export

    _quietly(onnx_export, model, str(path), example_input=images[:1], opset=17, batch_size=1)


_FIXED = {"batch": "fixed"}
# name -> writer(model, images, path)
WRITERS = {
    "dynamo 18": functools.partial(export_dynamo, opset=18),
    "dynamo fixed": functools.partial(export_dynamo, **_FIXED),
    "dynamo 23": functools.partial(export_dynamo, opset=23),  # has a node Attention
    "torchscript 14": functools.partial(export_torchscript, opset=14, **_FIXED),  # no LayerNorm
    "torchscript 17": functools.partial(export_torchscript, opset=17),
    "timm": export_timm,
}


def optimize_with_onnxruntime(source, path):
    """Write what ONNX Runtime makes of a graph when it loads it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def optimize_with_transformers(source, path):
    """Write what ONNX Runtime's optimizer for transformers makes of a graph."""
    found = _quietly(
        optimizer.optimize_model, str(source), "vit", num_heads=3, hidden_size=24, opt_level=0
    )
    found.save_model_to_file(str(path))


def convert_to_float16(source, path, *, keep_io=True):
    """Convert all weights and values to float16."""
    model = _quietly(float16.convert_float_to_float16, onnx.load(source), keep_io_types=keep_io)
    onnx.save(model, path)


class Pictures(quantization.CalibrationDataReader):
    """Batches to calibrate with."""

    def __init__(self, name, batches):
        self.left = [{name: batch} for batch in batches]

    def get_next(self):
        return self.left.pop() if self.left else None


def quantize(source, path, batches):
    """Quantise to int8 statically, with QuantizeLinear and DequantizeLinear nodes."""
    name = onnx.load(source, load_external_data=False).graph.input[0].name
    _quietly(
        quantization.quantize_static,
        str(source),
        str(path),
        Pictures(name, batches),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
    )


def _quietly(function, *args, **options):
    """Call a function without its prints, warnings and logs."""
    logging.disable(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            return function(*args, **options)
    finally:
        logging.disable(logging.NOTSET)
