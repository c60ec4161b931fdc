import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn import functional as F

from vit_reciprocam.errors import InputError
from vit_reciprocam.evaluate.metrics import adcc as metrics

FRACTIONS = st.floats(0, 1, allow_subnormal=False)
MAPS = arrays(np.float64, (3, 4), elements=FRACTIONS)
PROPERTY = settings(max_examples=60, deadline=None)


def random(*shape, seed=0):
    return np.random.default_rng(seed).random(shape)


# --- drop, increase, coherency, complexity, ADCC ----------------------------------------------


def test_drop_and_increase_by_hand():
    p, o = np.array([[0.8, 0.5], [0.2, 0.0]]), np.array([[0.6, 0.5], [0.3, 0.1]])
    # (0.8 - 0.6) / 0.8 = 0.25; nothing lost; gained; 0 / 0 counts as no drop
    np.testing.assert_allclose(metrics.average_drop(p, o), [[0.25, 0], [0, 0]])
    assert metrics.average_increase(p, o).tolist() == [[0, 0], [1, 1]]
    assert metrics.average_drop(0.5, 0.25) == 0.5


def test_coherency_by_hand():
    one = np.array([[1.0, 0], [0, 0]])
    beside = np.array([[0, 1.0], [0, 0]])
    # minus the mean 1/4: (3 -1 -1 -1)/4 and (-1 3 -1 -1)/4; products -4/16, squares 12/16
    np.testing.assert_allclose(metrics.pearson(one, beside), -1 / 3)
    np.testing.assert_allclose(metrics.coherency(one, beside), 1 / 3)
    np.testing.assert_allclose(metrics.coherency(one, one), 1)
    np.testing.assert_allclose(metrics.coherency(one, 1 - one), 0, atol=1e-15)


@pytest.mark.parametrize("constant", [0, 0.3, 1])
@pytest.mark.parametrize("size", [None, (5, 7)])
def test_correlation_with_a_constant_map_is_zero(constant, size):
    maps, flat = random(2, 3, 3), np.full((2, 3, 3), constant)
    options = {"size": size, "mode": "bicubic"}
    assert metrics.pearson(maps, flat, **options).tolist() == [0, 0]
    assert metrics.pearson(flat, maps, **options).tolist() == [0, 0]
    assert metrics.coherency(flat, flat, **options).tolist() == [0.5, 0.5]


def test_a_faint_map_is_not_constant():
    maps = random(4, 4)
    np.testing.assert_allclose(metrics.pearson(maps * 1e-6, maps), 1)


def test_complexity_by_hand():
    maps = np.array([[[1.0, 0], [0, 0]], [[0.5, 0.5], [1, 1]]])
    assert metrics.complexity(maps).tolist() == [0.25, 0.75]
    # bilinear [1, 0, 0] at 6 pixels: 1, .75, .25, 0, 0, 0
    assert metrics.complexity(np.array([[1.0, 0, 0]]), size=(1, 6)) == pytest.approx(2 / 6)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_compared_at_the_pictures_size_as_corrcoef_does(mode):
    a, b = random(2, 3, 4), random(2, 3, 4, seed=1)
    tensors = [torch.from_numpy(x)[None] for x in (a, b)]
    wide = [F.interpolate(x, (12, 20), mode=mode)[0].flatten(1).numpy() for x in tensors]
    expected = [np.corrcoef(x, y)[0, 1] for x, y in zip(*wide, strict=True)]
    options = {"size": (12, 20), "mode": mode}
    np.testing.assert_allclose(metrics.pearson(a, b, **options), expected, atol=1e-12)
    np.testing.assert_allclose(metrics.complexity(a, **options), np.abs(wide[0]).mean(1))


def test_adcc_of_the_papers_table():
    # Table 1 of Byun & Lee 2023: coherency 88.61, complexity 46.35, drop 25.82 give ADCC 69.1
    assert round(float(metrics.adcc(0.8861, 1 - 0.5365, 1 - 0.7418)), 3) == 0.691


def test_adcc_is_zero_where_a_term_is():
    coherency, complexity, drop = np.full((3, 3), 0.5)
    np.testing.assert_allclose(metrics.adcc(coherency, complexity, drop), 0.5)
    coherency[0], complexity[1], drop[2] = 0, 1, 1
    assert metrics.adcc(coherency, complexity, drop).tolist() == [0, 0, 0]
    assert metrics.adcc(1e-300, 0, 0) == pytest.approx(3e-300)  # nears the limit steadily
    assert metrics.adcc(1, 0, 0) == 1


@PROPERTY
@given(FRACTIONS, FRACTIONS, FRACTIONS)
def test_adcc_lies_between_the_worst_term_and_the_mean(coherency, complexity, drop):
    terms = [coherency, 1 - complexity, 1 - drop]
    got = metrics.adcc(coherency, complexity, drop)
    assert min(terms) - 1e-12 <= got <= min(3 * min(terms), np.mean(terms)) + 1e-12


@PROPERTY
@given(FRACTIONS, FRACTIONS, FRACTIONS, FRACTIONS)
def test_adcc_falls_with_drop(coherency, complexity, drop, other):
    less, more = sorted([drop, other])
    assert metrics.adcc(coherency, complexity, less) >= metrics.adcc(coherency, complexity, more)


@PROPERTY
@given(MAPS, MAPS)
def test_coherency_is_symmetric_and_in_range(a, b):
    got = metrics.coherency(a, b)
    assert 0 <= got <= 1
    assert got == pytest.approx(metrics.coherency(b, a), abs=1e-12)


# --- masked pictures ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_masked_images_multiply_every_channel(mode):
    images = np.random.default_rng(2).normal(size=(2, 3, 8, 12)).astype(np.float32)
    maps = random(2, 2, 3)
    wide = F.interpolate(torch.from_numpy(maps)[:, None], (8, 12), mode=mode)
    got = metrics.masked_images(images, maps, mode)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, images * wide.numpy(), atol=1e-6)


# --- errors -------------------------------------------------------------------------------------

A = np.full((2, 3, 3), 0.5)
X = np.zeros((2, 3, 6, 6), np.float32)
NAN = np.where(np.arange(9).reshape(3, 3) == 4, np.nan, A)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.average_drop([], []), "p, o must have one shape and not be empty"),
        (lambda: metrics.average_drop([0.1, 0.2], [0.1]), r"got \(2,\), \(1,\)"),
        (lambda: metrics.average_increase([50.0], [60.0]), "p must be in .*percentages.*got 50"),
        (lambda: metrics.average_increase([0.5], [np.nan]), "o must be numbers .* 1 are NaN"),
        (lambda: metrics.adcc([0.5], [0.5], [-0.5]), "drop must be in"),
        (lambda: metrics.coherency(A, A[:, :2]), "one shape"),
        (lambda: metrics.coherency(A, NAN), "masked_maps must be numbers .* 2 are NaN"),
        (lambda: metrics.complexity(A * 3), "maps must be in .* raw relevance; got 1.5 to 1.5"),
        (lambda: metrics.complexity(-A), "maps must be in"),
        (lambda: metrics.complexity(A[:0]), r"not empty; got \(0, 3, 3\)"),
        (lambda: metrics.complexity(A[0, 0]), r"\(..., h, w\)"),
        (lambda: metrics.complexity(A, size=(0, 3)), "must not be empty"),
        (lambda: metrics.complexity(A, size=(6, 6), mode="area"), "'bilinear', 'bicubic'"),
        (lambda: metrics.masked_images(X, A[:1]), "each picture .* needs one map"),
        (lambda: metrics.masked_images(X.astype(np.uint8), A), "floating"),
    ],
)
def test_what_cannot_be_scored_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
