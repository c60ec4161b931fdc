"""The methods that tests compare, and their models and images in float64."""

import functools

import torch

from conftest import MODELS, tiny_images, tiny_model
from vit_reciprocam.methods.baselines import (
    null_baseline,
    raw_attention,
    relevance,
    rollout,
)

BY_LAYER = [rollout, raw_attention, relevance]


def null(name):
    """Return a null baseline with the signature of the other methods."""
    method = functools.partial(null_baseline, name)
    method.__name__ = name
    return method


NULLS = list(map(null, ("uniform", "center", "random", "image_edges")))
uniform, center, random, image_edges = NULLS
GRID = (2, 3)
TARGETS = [[0, 3], [4, 1]]


def model_of(name):
    return tiny_model(**MODELS[name]).double()


def images64(count=2, grid=GRID):
    return tiny_images(grid, count).double()


def assert_near(ours, wanted):
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-8 * float(wanted.abs().max()))
