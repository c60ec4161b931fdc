import numpy as np
import pytest
import torch
from torchvision.transforms import GaussianBlur

from vit_reciprocam.evaluate.metrics.arrays import blur


@pytest.mark.parametrize(("dtype", "atol"), [(np.float64, 1e-10), (np.float32, 1e-5)])
@pytest.mark.parametrize("size", [(26, 40), (64, 27)])
def test_blur_is_torchvisions(size, dtype, atol):
    images = np.random.default_rng(1).normal(size=(2, 3, *size)).astype(dtype)
    expected = GaussianBlur(51, 20.0)(torch.from_numpy(images)).numpy()
    got = blur(images)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, expected, atol=atol, rtol=0)


def test_blur_of_a_picture_smaller_than_the_kernel_keeps_the_mean_colour():
    # torchvision refuses it; reflected again and again, weights still sum to 1
    np.testing.assert_allclose(blur(np.full((3, 8, 5), 0.7)), 0.7, atol=1e-12)
