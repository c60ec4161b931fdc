"""Tiny models of open_clip in float64, and their scores by whole forward passes under a hook."""

import itertools

import numpy as np
import open_clip
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer

from conftest import tiny_images
from reference import naive_logits
from vit_reciprocam import ReciproCAM
from vit_reciprocam.libraries.common.zero_shot import ZeroShot

GRID = (2, 3)
MASKINGS = [
    {"kernel": kernel, "class_token": class_token, "layer": layer}
    for kernel, class_token, layer in itertools.product(
        ["gaussian", "dirac"], [True, False], ["norm1", "block"]
    )
]
PROMPTS = ["a photo of a dog", "a cat", "two birds on a wire"]


def shake(model, spread=0.3):
    """Return the model in float64, with weights large enough for masks to matter."""
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
    return shake(VisionTransformer(**(sizes | options)))


def around_timm(pool="token", proj="linear"):
    """Return a tower around a small model of timm, with patches of 16 pixels."""
    tower = TimmModel("test_vit", embed_dim=8, pool=pool, proj=proj)
    tower.set_input_size((16 * GRID[0], 16 * GRID[1]))
    return shake(tower, spread=0.1)


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
    """Find what is pooled: the output of the pooler's LayerNorm, last norm or last block."""
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


VISION = {"layers": 2, "width": 12, "head_width": 4, "patch_size": 4, "image_size": 16}
TEXT = {"width": 8, "heads": 2, "layers": 1, "context_length": 16}


def whole(kind=CLIP, vision=None, **options):
    vision = CLIPVisionCfg(**(VISION | (vision or {})))
    return shake(kind(8, vision_cfg=vision, text_cfg=CLIPTextCfg(**TEXT), **options))


def tokenize(texts):
    return open_clip.get_tokenizer("ViT-B-32", context_length=16)(texts)
