"""Null baselines against values worked out by hand, and PyTorch's own operations."""

import numpy as np
import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d, conv2d, interpolate, pad

from baseline_methods import (
    GRID,
    NULLS,
    TARGETS,
    center,
    image_edges,
    images64,
    model_of,
    random,
    uniform,
)
from conftest import tiny_images, tiny_model
from vit_reciprocam.errors import InputError
from vit_reciprocam.methods.null import NULLS as DRAWN


def test_uniform():
    maps = uniform(model_of("plain"), images64(), TARGETS)
    assert torch.equal(maps, torch.ones(2, 2, *GRID, dtype=torch.float64))


def test_center_is_a_gaussian_that_never_looks():
    model = tiny_model(grid=(3, 4))
    images = tiny_images((3, 4))
    maps = center(model, images, sigma=0.8)
    assert maps.shape == (2, 1, 3, 4)
    assert torch.equal(maps, center(model, torch.zeros_like(images), sigma=0.8))
    middle, corner = maps[0, 0, 1, 1], maps[0, 0, 0, 3]  # at (0, -1/4) and (-2/3, 3/4)
    wanted = np.exp([-(1 / 16) / 1.28, -(4 / 9 + 9 / 16) / 1.28])
    np.testing.assert_allclose([middle, corner], wanted, rtol=1e-6)
    for wrong in (0, -1.0, np.nan, "wide"):
        with pytest.raises(InputError, match="sigma must be positive"):
            center(model, images, sigma=wrong)


def test_random_depends_on_the_seed_and_the_picture_alone():
    model, images = model_of("plain"), images64(3)
    maps = random(model, images, [[0, 1]])
    assert torch.equal(maps[:, 0], maps[:, 1])
    assert torch.equal(maps[2:], random(model, images[2:], [[0, 1]]))
    assert not torch.allclose(maps[0], maps[1])
    assert not torch.allclose(maps, random(model, images, [[0, 1]], seed=1))
    masked = images.clone()
    masked[:, :, 0, 0] = 0
    assert not torch.allclose(maps, random(model, masked, [[0, 1]]))
    for wrong in (1, 2.5, "many"):
        with pytest.raises(InputError, match="cells must be at least 2"):
            random(model, images, cells=wrong)


def test_random_is_smooth():
    model = tiny_model(grid=(14, 14))
    maps = random(model, tiny_images((14, 14), 16))[:, 0]
    step = (maps[:, 1:] - maps[:, :-1]).std()
    assert step < 0.5 * maps.std()  # white noise has 1.4
    rough = random(model, tiny_images((14, 14), 16), cells=14)[:, 0]
    assert (rough[:, 1:] - rough[:, :-1]).std() > 1.2 * rough.std()


@pytest.mark.parametrize("grid", [(14, 14), (7, 1), (3, 11)])
def test_random_is_noise_upsampled_from_corner_to_corner(grid):
    images = torch.rand(3, 3, 8, 8).numpy()
    # as many cells as patches: the noise itself
    noise = DRAWN["random"].draw(images, (5, 5), cells=5)
    assert noise.min() >= 0
    assert noise.max() < 1
    wanted = interpolate(
        torch.from_numpy(noise)[:, None], grid, mode="bicubic", align_corners=True
    )[:, 0]
    np.testing.assert_allclose(
        DRAWN["random"].draw(images, grid, cells=5), wanted, rtol=0, atol=1e-6
    )


def test_random_is_uniform_noise_of_every_picture():
    drawn = DRAWN["random"].draw(torch.rand(400, 1, 2, 2).numpy(), (4, 4))
    quarters, _ = np.histogram(drawn, bins=4, range=(0, 1))
    assert np.all(abs(quarters / drawn.size - 0.25) < 0.03)  # 5 standard deviations


def test_image_edges_stand_where_the_picture_changes():
    model = tiny_model(grid=(2, 4))
    images = torch.zeros(2, 3, 8, 16)
    images[0, :, :, 8:] = 1  # one edge between the second and third column of patches
    images[1, 0, 4:] = 1  # an edge in red alone, between the rows of patches
    maps = image_edges(model, images)[:, 0]
    # a step of 1 has the gradient 1/2 in the columns next to it, and a patch has four columns
    torch.testing.assert_close(maps[0], torch.tensor([[0.0, 0.125, 0.125, 0.0]] * 2))
    torch.testing.assert_close(maps[1], torch.full((2, 4), 0.299 / 8))


@pytest.mark.parametrize("grid", [(14, 14), (7, 9), (40, 90)])
def test_image_edges_are_pooled_sobel_gradients(grid):
    """This holds on grids that do not divide the picture too, and on grids finer than it."""
    images = torch.rand(2, 3, 30, 71, dtype=torch.float64)
    red, green, blue = images.unbind(dim=1)
    luminance = (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]
    sobel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]).double() / 8
    kernels = torch.stack([sobel, sobel.T])[:, None]
    gradient = conv2d(pad(luminance, (1, 1, 1, 1), mode="replicate"), kernels)
    wanted = adaptive_avg_pool2d(gradient.square().sum(dim=1).sqrt(), grid).numpy()
    for dtype, digits in (("float64", 1e-12), ("float32", 1e-6)):
        maps = DRAWN["image_edges"].draw(images.numpy().astype(dtype), grid)
        assert maps.dtype == dtype
        np.testing.assert_allclose(maps, wanted, rtol=0, atol=digits)


def test_image_edges_of_one_channel():
    model = tiny_model(in_chans=1)
    images = torch.zeros(1, 1, 8, 12)
    images[..., 4:] = 1
    wanted = torch.tensor([[0.125, 0.125, 0.0]] * 2)
    torch.testing.assert_close(image_edges(model, images)[0, 0], wanted)


@pytest.mark.parametrize("method", NULLS)
def test_nulls_run_the_model_on_one_image_only(method):
    model, images, seen = model_of("plain"), images64(3), []
    model.blocks[0].register_forward_pre_hook(lambda _m, args: seen.append(len(args[0])))
    assert method(model, images, [[0, 1]]).shape == (3, 2, *GRID)
    assert method(model, images, "all").shape == (3, 5, *GRID)
    assert method(model, images).shape == (3, 1, *GRID)
    assert set(seen) == {1}
    method(model, images, lambda logits: logits.argmax(axis=1))
    assert seen[-1] == 3


@pytest.mark.parametrize("method", NULLS)
def test_nulls_of_a_model_are_those_of_its_grid(method):
    images = images64()
    maps = method(model_of("plain"), images, TARGETS)
    drawn = DRAWN[method.__name__].draw(images.numpy(), GRID)
    assert drawn.dtype == np.float64
    assert np.array_equal(maps, np.stack([drawn, drawn], axis=1))


@pytest.mark.parametrize("method", NULLS)
def test_nulls_take_any_supported_model(method):
    mean_pooled = tiny_model(global_pool="avg").bfloat16()
    maps = method(mean_pooled, images64().bfloat16())
    assert maps.dtype == torch.float32
    assert maps.shape == (2, 1, *GRID)
