import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vit_reciprocam.core.maps import cubic_weights, upsample

SHAPES = [  # a map's, and a picture's
    ((2, 2), (5, 7)),
    ((3, 5), (48, 80)),
    ((14, 14), (224, 224)),
    ((1, 4), (9, 9)),
    ((1, 1), (3, 2)),
    ((4, 6), (4, 6)),
    ((7, 5), (3, 4)),
    ((3, 3), (6, 2)),
]


def random(*shape, seed=0):
    return np.random.default_rng(seed).random(shape)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("small", "large"), SHAPES)
def test_upsample_is_torchs_interpolate(small, large, mode):
    maps = random(2, 3, *small)
    expected = F.interpolate(torch.from_numpy(maps), large, mode=mode, align_corners=False)
    got = upsample(maps, large, mode)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-10, rtol=0)


def test_upsample_by_hand():
    # 2 cells to 4 pixels: centres at -0.25, 0.25, 0.75 and 1.25 of a cell
    assert upsample(np.array([[0.0, 1.0]]), (1, 4)).tolist() == [[0, 0.25, 0.75, 1]]


def test_bicubic_is_not_clamped_and_the_dtype_is_kept():
    step = np.array([[0, 0, 1, 1]], np.float32)
    wide = upsample(step, (1, 16), "bicubic")
    assert wide.dtype == np.float32
    assert wide.min() < -0.05
    assert wide.max() > 1.05
    assert upsample(np.eye(2, dtype=int), (2, 2)).dtype == np.float64


def test_cubic_weights_by_hand():
    # a = -3/4; near, d = 1/2: 5/4 · 1/8 - 9/4 · 1/4 + 1 = 19/32
    # far, d = 3/2: -3/4 · (27/8 - 45/4 + 12 - 4) = -3/32; the four cells around a middle sum to 1
    distances = np.array([0, 0.5, 1, 1.5, 2, 7])
    assert cubic_weights(distances).tolist() == [1, 19 / 32, 0, -3 / 32, 0, 0]
