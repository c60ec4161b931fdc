"""The prediction, the classes that targets pick, and the maps made from scores."""

import numpy as np
import pytest
import torch

from conftest import tiny_images, tiny_model
from vit_reciprocam import ReciproCAM
from vit_reciprocam.errors import InputError, UnknownClassError


def test_prediction_is_the_models_own():
    model, images = tiny_model(), tiny_images()
    e = ReciproCAM(model)(images)
    with torch.no_grad():
        logits = model(images)
    np.testing.assert_allclose(e.logits, logits, rtol=0, atol=1e-6)
    np.testing.assert_allclose(e.probs, logits.softmax(dim=1), rtol=0, atol=1e-6)
    assert e.targets[:, 0].tolist() == logits.argmax(dim=1).tolist()


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (3, [[3], [3]]),
        ([1, 4], [[1], [4]]),
        (torch.tensor([1, 4]), [[1], [4]]),
        ([[1, 2, 0]], [[1, 2, 0], [1, 2, 0]]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        ("all", [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
        (lambda logits: logits.argsort(axis=1)[:, :1] * 0 + 2, [[2], [2]]),
    ],
)
def test_targets_pick_their_classes_from_all(targets, expected):
    model, images = tiny_model(), tiny_images()
    every = ReciproCAM(model)(images, "all")
    e = ReciproCAM(model)(images, targets)
    assert e.targets.tolist() == expected
    picked = np.take_along_axis(every.scores, np.array(expected)[:, :, None, None], axis=1)
    np.testing.assert_array_equal(e.scores, picked)
    assert e.maps.shape == e.scores.shape == (2, len(expected[0]), 2, 3)
    assert e.maps.dtype == e.scores.dtype == np.float32


@pytest.mark.parametrize(
    ("targets", "error", "words"),
    [
        (5, UnknownClassError, "class 5 does not exist: the model has 5 classes, 0 to 4"),
        (-1, UnknownClassError, "class -1 does not exist"),
        ([0, 1, 2], InputError, r"shape \(3,\) do not fit 2 image\(s\).*pass \[\[0, 1, 2\]\]"),
        ([[0], [1], [2]], InputError, r"shape \(3, 1\) do not fit"),
        ([[]], InputError, "targets"),
        ([[0, 1], [2]], InputError, r"got \[\[0, 1\], \[2\]\]"),
        (1.5, InputError, "must be integers; got float64"),
        (True, InputError, "must be integers; got bool"),
        ("cat", InputError, "'all'.*got 'cat'"),
    ],
)
def test_targets_that_do_not_fit(targets, error, words):
    with pytest.raises(error, match=words):
        ReciproCAM(tiny_model())(tiny_images(), targets)


def test_maps_are_scores_scaled_to_the_unit_interval():
    e = ReciproCAM(tiny_model())(tiny_images(), "all")
    np.testing.assert_array_equal(e.maps.min(axis=(2, 3)), 0)
    np.testing.assert_array_equal(e.maps.max(axis=(2, 3)), 1)
    one = e.scores[1, 3]
    np.testing.assert_allclose(e.maps[1, 3], (one - one.min()) / (one.max() - one.min()), atol=1e-6)
    assert not e.degenerate.any()


def test_a_single_patch_has_no_preference():
    e = ReciproCAM(tiny_model(grid=(1, 1)))(tiny_images((1, 1)))
    assert e.degenerate.all()
    assert (e.maps == 0).all()
