import pytest
import torch
from jaxtyping import TypeCheckError

from vit_reciprocam.core.masks import kernel_window
from vit_reciprocam.core.stencil import log_sum_outside


def test_shapes_in_signatures_are_checked_while_tests_run():
    """conftest.py sees to it; without, every shape in a signature would be a remark."""
    window = kernel_window("gaussian")
    assert log_sum_outside(torch.zeros(1, 4, 4, 1, 1), window).shape == (1, 4, 4, 1, 1)
    with pytest.raises(TypeCheckError):
        log_sum_outside(torch.zeros(4, 4, 1, 1), window)
