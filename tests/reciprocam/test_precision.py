"""What follows the cut is computed in float32, whatever the model's precision."""

import copy

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from conftest import tiny_images, tiny_model
from vit_reciprocam import ReciproCAM
from vit_reciprocam.core.closed_form import closed_form_rows
from vit_reciprocam.core.masks import Masking
from vit_reciprocam.core.precision import in_float32, widen_cut
from vit_reciprocam.libraries.dispatch import split_model

GRID = (3, 4)
SETTINGS = [
    {},
    {"normalize": "evidence", "depth": 2},
    {"path": "direct"},
    {"path": "direct", "layer": "block"},
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_rows_are_those_of_the_same_weights_in_float32(dtype):
    half = tiny_model(grid=GRID, depth=3, qk_norm=True, init_values=0.3).to(dtype)
    full = copy.deepcopy(half).float()
    masking = Masking("box", depth=2)
    cut = split_model(half, depth=2).cut(tiny_images(GRID).to(dtype))
    with in_float32(cut.x):
        rows = closed_form_rows(widen_cut(cut), 1, [masking], null=True)(0, 14)
    # the same cut by the float32 model, in which the stream of the half model is put
    wide = widen_cut(cut)
    same = split_model(full, depth=2).cut(tiny_images(GRID))
    blocks = zip(same.readout.earlier, wide.readout.earlier, strict=True)
    for block, stream in blocks:
        object.__setattr__(block, "x", stream.x)
        object.__setattr__(block, "projected", stream.projected)
    object.__setattr__(same, "x", wide.x)
    expected = closed_form_rows(same, 1, [masking], null=True)(0, 14)
    assert rows.dtype == torch.float32
    assert np.ptp(expected.numpy(), axis=0).max() > 0.1
    torch.testing.assert_close(rows, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "autocast"])
def test_maps_of_deit_tiny_agree_with_float64(
    precision, setting, deit_tiny_weights, reference_images
):
    images, labels = (part[:2] for part in reference_images)
    model = timm.create_model("deit_tiny_patch16_224").eval()
    model.load_state_dict(load_file(deit_tiny_weights))
    exact = ReciproCAM(copy.deepcopy(model).double(), **(setting | {"path": "auto"}))
    expected = exact(images.double(), labels).ranking
    if precision == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            found = ReciproCAM(model, **setting)(images, labels)
    else:
        half = model.to(getattr(torch, precision))
        found = ReciproCAM(half, **setting)(images.to(next(half.parameters())), labels)
    for one, other in zip(found.ranking[:, 0], expected[:, 0], strict=True):
        assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.99


def test_the_weights_stay_in_half_precision():
    model = tiny_model(grid=GRID).bfloat16()
    ReciproCAM(model)(tiny_images(GRID).bfloat16())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
