"""An explanation says so if rounding alone could have made its map."""

import copy

import numpy as np
import pytest
import torch

from conftest import tiny_images, tiny_model
from vit_reciprocam import ReciproCAM

GRID = (3, 4)


@pytest.mark.parametrize(
    "settings", [{}, {"score": "logit"}, {"score": "log-probability"}, {"normalize": "evidence"}]
)
def test_maps_made_by_rounding_are_marked_and_others_are_right(settings):
    model = tiny_model(grid=GRID, depth=2)
    images = tiny_images(GRID)
    seen = {True: 0, False: 0}
    for share in (1.0, 1e-3, 1e-6, 1e-7, 1e-8):  # how much the masked attention counts
        quiet = copy.deepcopy(model)
        with torch.no_grad():
            quiet.blocks[-1].attn.proj.weight *= share
        found = ReciproCAM(quiet, **settings)(images, "all")
        exact = ReciproCAM(quiet.double(), **settings).scores(images.double(), "all").numpy()
        for place in np.ndindex(found.reliable.shape):
            seen[bool(found.reliable[place])] += 1
            if found.reliable[place]:
                values = found.scores if found.evidence is None else found.evidence
                one, other = values[place].ravel(), exact[place].ravel()
                assert np.corrcoef(one, other)[0, 1] > 0.95
        if share == 1:
            assert found.reliable.any()
        if share == 1e-8:
            assert not found.reliable.any()
    assert min(seen.values()) > 5
