"""Count what an explain call must do exactly once: one picture, one way through."""

import collections

import numpy as np
import pytest
import torch
from PIL import Image

import vit_reciprocam as vr
from vit_reciprocam import reciprocam
from vit_reciprocam.classifier.explain import explain_with
from vit_reciprocam.core.batch import Batch
from vit_reciprocam.libraries.timm import split as timm_split


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return vr.load("timm:test_vit", weights="random")


@pytest.fixture
def counts(monkeypatch):
    """Count how often models are split, images checked, and arrays moved to or from the device."""
    counts = collections.Counter()

    def count(owner, name, key):
        real = getattr(owner, name)

        def counted(*args, **kwargs):
            counts.update(filter(None, [key(*args)]))
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(timm_split, "split", lambda *_: "splits")
    count(reciprocam, "check_images", lambda *_: "checks")
    count(torch, "from_numpy", lambda array: array.ndim == 4 and "images to the device")
    count(torch.Tensor, "cpu", lambda values: f"from the device, {values.ndim} dimensions")
    return counts


ONCE = {
    "splits": 1,
    "checks": 1,
    "images to the device": 1,
    "from the device, 2 dimensions": 1,  # the prediction, which chooses the targets
    "from the device, 4 dimensions": 1,  # the scores
}


def test_explaining_a_picture(classifier, counts):
    e = vr.explain(Image.new("RGB", (170, 160), "teal"), classifier, top=2)
    assert e.maps.shape == (1, 2, 10, 10)
    assert counts == ONCE


def test_pictures_one_after_the_other(classifier, counts):
    explainer = classifier.backend.make_explainer(kernel="dirac")
    assert counts == {"splits": 1}, "a model that cannot be explained is refused before pictures"
    for number in range(1, 4):
        explain_with(explainer, Image.new("RGB", (160, 160), "teal"), classifier)
        assert counts == {key: number + (key == "splits") for key in ONCE}


def test_tensors(classifier, counts):
    explainer = vr.ReciproCAM(classifier.model)
    counts.clear()
    explainer(torch.zeros(2, 3, 160, 160), "all").maps  # noqa: B018
    # the images are on the device already
    assert counts == {key: 1 for key in ONCE if key != "images to the device"}


def test_scores_stay_on_the_device(classifier, counts):
    scores = vr.ReciproCAM(classifier.model, check=False).scores(torch.zeros(1, 3, 160, 160), 3)
    assert isinstance(scores, torch.Tensor)
    assert counts["from the device, 4 dimensions"] == 0


def test_maps_of_other_methods_stay_on_the_device(classifier, counts):
    images = torch.zeros(1, 3, 160, 160)
    maps = vr.METHODS["reciprocam"](classifier.model, images, 3)
    assert counts["from the device, 4 dimensions"] == 0
    assert (counts["splits"], counts["checks"]) == (1, 1)
    np.testing.assert_array_equal(maps, vr.ReciproCAM(classifier.model)(images, 3).maps)


def test_settings_that_share_a_batch_check_it_once(classifier, counts):
    batch = Batch(torch.zeros(2, 3, 160, 160))
    for kernel in ("gaussian", "dirac"):
        vr.ReciproCAM(classifier.model, kernel=kernel, check=False)(batch)
    assert (counts["splits"], counts["checks"]) == (2, 1)
