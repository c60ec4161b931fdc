"""Masks against the paper's, and window sizes worked out by hand."""

import numpy as np
import pytest
import torch

from reference import naive_mask
from vit_reciprocam.core.masks import KERNELS, Masking, kernel_window, mask_matrix, window_sizes
from vit_reciprocam.errors import InputError

GRIDS = [(1, 1), (1, 4), (2, 2), (3, 5), (4, 3)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("class_token", [True, False])
def test_every_row_is_the_papers_mask(grid, kernel, class_token):
    masks = mask_matrix(grid, Masking(kernel, class_token), prefix_tokens=2)
    expected = [
        naive_mask(grid, row, column, kernel, 2, class_token)
        for row in range(grid[0])
        for column in range(grid[1])
    ]
    np.testing.assert_array_equal(masks, np.array(expected))


def test_gaussian_in_the_middle_and_cropped_in_the_corner():
    masks = mask_matrix((3, 3), Masking("gaussian"), prefix_tokens=1) * 16
    assert masks[4].tolist() == [16, 1, 2, 1, 2, 4, 2, 1, 2, 1]
    assert masks[0].tolist() == [16, 4, 2, 0, 2, 1, 0, 0, 0, 0]  # sums to 9/16: not renormalised


def test_window_is_listed_row_by_row_around_the_centre():
    assert kernel_window("dirac") == ((0, 0, 1.0),)
    assert kernel_window("gaussian")[0] == (-1, -1, 1 / 16)
    assert kernel_window("gaussian")[4] == (0, 0, 4 / 16)
    assert kernel_window("gaussian")[5] == (0, 1, 2 / 16)


def test_window_sizes_by_hand():
    assert window_sizes((3, 4), "gaussian").tolist() == [[4, 6, 6, 4], [6, 9, 9, 6], [4, 6, 6, 4]]
    assert window_sizes((1, 3), "gaussian").tolist() == [[2, 3, 2]]
    assert window_sizes((1, 1), "gaussian").tolist() == [[1]]
    assert window_sizes((2, 2), "dirac").tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"kernel": "disk"},
            "kernel must be one of 'gaussian', 'dirac', 'box', 'box5'; got 'disk'",
        ),
        ({"layer": "norm2"}, "layer must be one of 'norm1', 'block', 'pool'; got 'norm2'"),
    ],
)
def test_unknown_choice_lists_the_choices(settings, words):
    with pytest.raises(InputError, match=words):
        Masking(**settings)


def test_masks_multiply_tensors_exactly():
    masks = torch.from_numpy(mask_matrix((2, 2), Masking()))
    assert masks.dtype == torch.float64
    assert set((masks * 16).unique().tolist()) == {1, 2, 4, 16}
