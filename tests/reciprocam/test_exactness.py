"""Both paths equal the naive loops, on every kind of model, grid and setting."""

import copy

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from comparison import assert_equals_reference
from conftest import MODELS, tiny_images, tiny_model
from reference import naive_logits
from vit_reciprocam import ReciproCAM

PATHS = ["closed-form", "direct"]
KERNELS = ["gaussian", "dirac"]
LAYERS = ["norm1", "block"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_naive_loops(name, kernel, class_token, layer, path):
    grid = (2, 3)
    model = tiny_model(grid=grid, **MODELS[name]).double()
    masking = {"kernel": kernel, "class_token": class_token, "layer": layer}
    assert_equals_reference(model, tiny_images(grid).double(), grid, path, **masking)


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (4, 1), (3, 3), (5, 4)])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("path", PATHS)
def test_any_grid(grid, kernel, path):
    model = tiny_model(grid=grid).double()
    expected, _ = naive_logits(
        model, tiny_images(grid).double(), grid, kernel=kernel, class_token=True, layer="norm1"
    )
    explainer = ReciproCAM(model, kernel=kernel, score="logit", path=path)
    scores = explainer.scores(tiny_images(grid).double(), "all")
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    heads=st.integers(1, 3),
    options=st.fixed_dictionaries({
        "distilled": st.booleans(),
        "qk_norm": st.booleans(),
        "qkv_bias": st.booleans(),
        "init_values": st.sampled_from([None, 0.2]),
        "depth": st.integers(1, 3),
    }),
    masking=st.fixed_dictionaries({
        "kernel": st.sampled_from(KERNELS),
        "class_token": st.booleans(),
        "layer": st.sampled_from(LAYERS),
    }),
    spread=st.sampled_from([0.05, 0.3, 1.0, 4.0]),  # the last makes attention all but one-hot
    seed=st.integers(0, 10_000),
)  # fmt: skip
def test_closed_form_equals_the_naive_loops_everywhere(grid, heads, options, masking, spread, seed):
    model = tiny_model(
        grid=grid, embed_dim=4 * heads, num_heads=heads, spread=spread, seed=seed, **options
    ).double()
    images = tiny_images(grid, count=1, seed=seed).double()
    expected, _ = naive_logits(model, images, grid, **masking)
    scores = ReciproCAM(model, score="logit", path="closed-form", **masking).scores(images, "all")
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(scores / scale, expected / scale, rtol=0, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("reference", "kernel", "class_token"),
    [
        ("gaussian", "gaussian", True),
        ("gaussian_no_class_token", "gaussian", False),
        ("dirac", "dirac", True),
        ("dirac_no_class_token", "dirac", False),
    ],
)
def test_equals_an_independent_implementation_on_deit_tiny(
    reference, kernel, class_token, path, shared_data, deit_tiny_weights, reference_images
):
    model = timm.create_model("deit_tiny_patch16_224").eval()
    model.load_state_dict(load_file(deit_tiny_weights))
    images, labels = reference_images
    with np.load(shared_data / "reference" / "openvino_xai_logits.npz") as data:
        expected = data[reference]
    explainer = ReciproCAM(model, kernel=kernel, class_token=class_token, score="logit", path=path)
    scores = explainer.scores(images, labels)[:, 0].numpy()
    np.testing.assert_allclose(scores, expected, rtol=0, atol=5e-5)


def test_huge_attention_scores_do_not_overflow_in_float32():
    model = tiny_model(grid=(3, 3), spread=6.0)
    closed = ReciproCAM(model, path="closed-form").scores(tiny_images((3, 3)), "all")
    direct = ReciproCAM(model, path="direct").scores(tiny_images((3, 3)), "all")
    assert closed.isfinite().all()
    torch.testing.assert_close(closed, direct, rtol=1e-3, atol=1e-4)


def test_very_large_finite_pixels_are_not_called_nan():
    e = ReciproCAM(tiny_model())(torch.full((1, 3, 8, 12), 3e36))
    assert np.isfinite(e.logits).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype):
    model, images = tiny_model(), tiny_images()
    expected = ReciproCAM(model).scores(images, "all")
    half = ReciproCAM(copy.deepcopy(model).to(dtype)).scores(images.to(dtype), "all")
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=0, atol=0.05)


def test_autocast():
    model, images = tiny_model(), tiny_images()
    expected = ReciproCAM(model).scores(images, "all")
    with torch.autocast("cpu", torch.bfloat16):
        scores = ReciproCAM(model).scores(images, "all")
    torch.testing.assert_close(scores.float(), expected, rtol=0, atol=0.05)
