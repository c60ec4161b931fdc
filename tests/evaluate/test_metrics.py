"""Measuring and summarizing as the protocols say, and metrics from the registry only."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vit_reciprocam.errors import InputError
from vit_reciprocam.evaluate.metrics.adcc import adcc
from vit_reciprocam.evaluate.metrics.perturbation import baseline_images, deletion, insertion
from vit_reciprocam.evaluate.metrics.protocols import PROTOCOLS, Protocol
from vit_reciprocam.evaluate.metrics.registry import (
    METRICS,
    Objects,
    Observation,
    measure,
    summarize,
)
from vit_reciprocam.pictures.preprocess import Preprocess

BYUN, POPPI = PROTOCOLS["byun2023"], PROTOCOLS["poppi2021"]


def rng():
    return np.random.default_rng(0)


def observe(protocol, images, maps, masked_maps=None, p=None, o=None, **more):
    """An observation; what a test does not look at is empty."""
    count = len(images)
    given = {
        "preprocess": Preprocess(images.shape[-2:]),
        "targets": np.zeros(count, int),
        "masked_maps": maps if masked_maps is None else masked_maps,
        "ranking": maps,
        "p": np.full(count, 0.5) if p is None else p,
        "o": np.full(count, 0.5) if o is None else o,
        "predict": None,
        "objects": [None] * count,
    }
    return Observation(protocol=protocol, images=images, maps=maps, **(given | more))


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_each_pictures_row(protocol):
    a, b = rng().random((2, 4, 2, 3))
    p, o = np.array([0.8, 0.5, 0.2, 0.9]), np.array([0.6, 0.5, 0.3, 0.0])
    images = np.zeros((4, 3, 8, 12), np.float32)
    got = measure(observe(protocol, images, a, b, p, o), {"adcc"})
    if protocol is POPPI:
        a, b = (
            F.interpolate(torch.from_numpy(x)[None], (8, 12), mode="bilinear")[0].numpy()
            for x in (a, b)
        )
    a, b = a.reshape(4, -1), b.reshape(4, -1)
    coherency = (1 + np.array([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)])) / 2
    drop, complexity = np.array([0.25, 0, 0, 1]), a.mean(1)
    terms = np.stack([coherency, 1 - complexity, 1 - drop])[:, :3]
    expected = {
        "p": p,
        "o": o,
        "drop": drop,
        "increase": [0, 0, 1, 0],
        "coherency": coherency,
        "complexity": complexity,
        "adcc": [*(3 / (1 / terms).sum(0)), 0],
    }
    assert list(got) == list(expected)
    for name, column in expected.items():
        np.testing.assert_allclose(got[name], column, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("unit", ["patch", "pixel"])
@pytest.mark.parametrize("baseline", ["blur", "black"])
def test_insertion_and_deletion_as_the_protocol_says(unit, baseline):
    protocol = Protocol("mine", steps=5, unit=unit, baseline=baseline)
    preprocess = Preprocess((8, 8), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    images, maps = rng().normal(size=(2, 3, 8, 8)), rng().random((2, 2, 2))
    targets = np.array([1, 0])

    def predict(x):
        seen = 1 / (1 + np.exp(-x.reshape(2, -1) @ np.linspace(-1, 1, 192)))
        return np.stack([1 - seen, seen], axis=-1)

    start = baseline_images(images, baseline, mean=preprocess.mean, std=preprocess.std)
    given = (predict, images, start, maps, targets)
    seen = observe(
        protocol,
        images,
        maps,
        preprocess=preprocess,
        targets=targets,
        predict=predict,
    )
    got = measure(seen, {"order"})
    options = {"steps": 5, "unit": unit, "mode": "bicubic"}
    np.testing.assert_array_equal(got["insertion"], insertion(*given, **options))
    np.testing.assert_array_equal(got["deletion"], deletion(*given, **options))
    assert list(got) == ["p", "o", "insertion", "deletion"]


COLUMNS = {
    "p": np.array([0.8, 0.5]),
    "o": np.array([0.6, 0.6]),
    "coherency": np.array([0.5, 1.0]),
    "complexity": np.array([0.5, 0.0]),
}


@pytest.mark.parametrize(
    ("protocol", "adcc"),
    [
        # means: coherency .75, complexity .25, drop (.25 + 0) / 2 = .125
        (BYUN, 3 / (1 / 0.75 + 1 / 0.75 + 1 / 0.875)),
        # pictures: 3 / (2 + 2 + 1/.75) = .5625 and 1
        (POPPI, (0.5625 + 1) / 2),
    ],
)
def test_the_summary_by_hand_in_percent(protocol, adcc):
    assert summarize(COLUMNS, protocol) == pytest.approx(
        {"drop": 12.5, "increase": 50, "coherency": 75, "complexity": 25, "adcc": 100 * adcc}
    )


def test_the_summary_of_the_papers_means():
    row = {"p": [1.0], "o": [0.7418], "coherency": [0.8861], "complexity": [1 - 0.5365]}
    assert summarize(row, BYUN)["adcc"] == pytest.approx(69.1, abs=0.05)


def test_the_summary_of_what_else_is_known():
    more = {
        "insertion": np.array([0.5, 0.25]),
        "deletion": np.array([0.125, 0.25]),
        "pointing_game": np.array([1, np.nan]),
        "mass_accuracy": np.array([np.nan, np.nan]),
        "adcc": np.array([7, 7]),
        "label": np.array([3, 4]),
    }
    row = summarize(COLUMNS | more, BYUN)
    added = {k: v for k, v in row.items() if k not in summarize(COLUMNS, BYUN)}
    assert added == {
        "insertion": 37.5,
        "deletion": 18.75,
        "insertion_minus_deletion": 18.75,
        "pointing_game": 100,
    }
    assert row["adcc"] == summarize(COLUMNS, BYUN)["adcc"]


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_scored_images_can_be_summed_up(protocol):
    a, b = rng().random((2, 5, 3, 3))
    p, o = rng().random((2, 5))
    columns = measure(observe(protocol, np.zeros((5, 3, 9, 9)), a, b, p, o), {"adcc"})
    row = summarize(columns, protocol)
    for name in ("drop", "increase", "coherency", "complexity"):
        assert row[name] == pytest.approx(100 * columns[name].mean())
    means = [columns[n].mean() for n in ("coherency", "complexity", "drop")]
    expected = adcc(*means) if protocol is BYUN else columns["adcc"].mean()
    assert row["adcc"] == pytest.approx(100 * float(expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": np.array([])}, "one shape"),
        ({"complexity": np.array([0.5])}, "one shape"),
        ({"o": np.array([np.nan, 0.5])}, "NaN"),
        ({"coherency": np.array([50.0, 70.0])}, "percentages"),
        ({"insertion": np.array([0.5])}, "p, insertion must have one shape"),
        ({"deletion": np.array([0.5, np.nan])}, "deletion must be numbers"),
        ({"energy_in_box": np.array([3.0, np.nan])}, "energy_in_box must be in"),
    ],
)
def test_columns_that_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        summarize(COLUMNS | change, BYUN)


def test_missing_columns_are_named():
    with pytest.raises(InputError, match=r"column coherency, complexity; got \['p', 'o'\]"):
        summarize({"p": [0.5], "o": [0.5]}, BYUN)


# --- objects ------------------------------------------------------------------------------------


def test_location_is_measured_where_the_objects_are_known():
    maps = np.array([[[0.2, 1.0], [0.4, 0.6]]] * 3)
    left = np.zeros((4, 4), bool)
    left[:, :2] = True
    objects = [None, Objects(left, from_boxes=True), Objects(~left, from_boxes=False)]
    seen = observe(BYUN, np.zeros((3, 3, 4, 4), np.float32), maps, objects=objects)
    got = measure(seen, {"location"})
    # bilinear at 4x4: the first row is .2, .4, .8, 1 and the last .4, .45, .55, .6; the two rows
    # between mix them 3 to 1 and 1 to 3, so that all four sum to twice the first and the last.
    # The left halves of these sum to .6 and .85, the whole rows to 2.4 and 2.
    share = (0.6 + 0.85) / (2.4 + 2)
    np.testing.assert_allclose(got["pointing_game"], [np.nan, 0, 1])
    np.testing.assert_allclose(got["energy_in_box"], [np.nan, share, np.nan])
    np.testing.assert_allclose(got["mass_accuracy"], [np.nan, np.nan, 1 - share])


def test_each_kind_is_measured_on_its_own():
    images, maps = rng().random((1, 3, 4, 4)), rng().random((1, 2, 2))
    seen = observe(BYUN, images, maps, predict=lambda x: np.full((len(x), 1), 0.5))
    for kind in ("adcc", "order", "location"):
        of_kind = [name for name, one in METRICS.items() if one.kind == kind and one.is_stored]
        assert list(measure(seen, {kind})) == ["p", "o", *of_kind]
    assert list(measure(seen)) == ["p", "o", *(n for n, one in METRICS.items() if one.is_stored)]


def test_the_order_is_the_ranking_s_and_the_mass_the_map_s():
    """A black-box model that counts what it sees, weighted .4, .3, .2 and .1 by patch."""
    weights = np.array([[0.4, 0.3], [0.2, 0.1]])
    signed = np.array([[[-1.0, -0.5], [2.0, -3.0]]])
    left = np.array([[True, False], [True, False]])
    seen = observe(
        Protocol("mine", steps=4, baseline="mean"),
        np.ones((1, 3, 2, 2)),
        signed.clip(0) / 2,
        ranking=signed,
        predict=lambda x: (x.mean(axis=1) * weights).sum(axis=(1, 2))[:, None],
        objects=[Objects(left, from_boxes=False)],
    )
    got = measure(seen, {"order", "location"})
    # bottom left, top right, top left: (0/2 + .2 + .5 + .9 + 1/2) / 4, and the complement
    np.testing.assert_allclose(got["insertion"], [0.525])
    np.testing.assert_allclose(got["deletion"], [0.475])
    assert got["pointing_game"] == got["mass_accuracy"] == [1]


@pytest.mark.parametrize(
    ("ranking", "hits"),
    [
        ([[-2.0, -0.5], [-1.0, -3.0]], 0),  # the least that speaks against is on the right
        ([[-2.0, -2.5], [-1.0, -3.0]], 1),
        ([[0.0, 0.0], [0.0, 0.0]], 1),  # all equal: the first pixel counts
    ],
)
def test_a_map_of_zeros_points_where_its_ranking_is_highest(ranking, hits):
    left = np.array([[True, False], [True, False]])
    seen = observe(
        BYUN,
        np.zeros((1, 3, 2, 2)),
        np.zeros((1, 2, 2)),
        ranking=np.array([ranking]),
        objects=[Objects(left, from_boxes=False)],
    )
    assert measure(seen, {"location"})["pointing_game"] == [hits]
