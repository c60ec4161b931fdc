import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vit_reciprocam.errors import InputError
from vit_reciprocam.evaluate.metrics import location
from vit_reciprocam.evaluate.metrics.location import box_masks

MAPS = arrays(np.float64, (3, 4), elements=st.floats(0, 1, allow_subnormal=False))
PROPERTY = settings(max_examples=60, deadline=None)


def test_box_masks_hold_the_pixels_whose_centre_lies_inside():
    assert box_masks([1, 0, 3, 2], (3, 4)).astype(int).tolist() == [
        [0, 1, 1, 0],
        [0, 1, 1, 0],
        [0, 0, 0, 0],
    ]
    # from 0.6 the centre 0.5 is out, up to 2.6 the centre 2.5 is in
    assert box_masks([0.6, 0, 2.6, 1], (1, 4)).astype(int).tolist() == [[0, 1, 1, 0]]
    assert box_masks([[[0, 0, 4, 3]]], (3, 4)).shape == (1, 1, 3, 4)


def test_pointing_game_by_hand():
    maps = np.array([[0.2, 1.0], [0.4, 0.6]])
    # at 4x4 the highest pixel is the corner (0, 3), the centre of a border cell being clamped
    boxes = {(2, 0, 4, 2): 1, (3, 0, 4, 1): 1, (0, 0, 2, 4): 0, (0, 1, 4, 4): 0}
    for box, hit in boxes.items():
        assert location.pointing_game(maps, np.array(box), size=(4, 4)) == hit
        assert location.pointing_game(maps, box_masks(box, (4, 4))) == hit


@pytest.mark.parametrize(("tolerance", "hit"), [(0, 0), (1.9, 0), (2, 1), (15, 1)])
def test_pointing_game_with_tolerance(tolerance, hit):
    maps = np.array([[0.2, 1.0], [0.4, 0.6]])  # the maximum is the pixel in column 3
    box = np.array([0, 0, 2, 4])  # its nearest pixel is in column 1, 2 pixels away
    assert location.pointing_game(maps, box, size=(4, 4), tolerance=tolerance) == hit


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_of_equal_maxima_the_first_counts(mode):
    flat = np.full((3, 3), 0.3)
    corners = np.array([[0, 0, 1, 1], [1, 0, 7, 5], [0, 1, 7, 5]])
    hits = location.pointing_game(np.stack([flat] * 3), corners, size=(5, 7), mode=mode)
    assert hits.tolist() == [1, 0, 0]


def test_energy_by_hand():
    maps = np.array([[[0.0, 1.0]], [[0.0, 0.0]]])
    boxes = np.array([[2, 0, 4, 1], [0, 0, 4, 1]])
    # bilinear 0, .25, .75, 1: the right half holds 1.75 of 2; a map of zeros holds nothing
    got = location.energy_in_box(maps, boxes, size=(1, 4))
    np.testing.assert_allclose(got, [0.875, 0])
    mask = np.array([[[False, True, False, True]], [[True] * 4]])
    np.testing.assert_allclose(location.mass_accuracy(maps, mask), [0.625, 0])


def test_mass_of_a_bicubic_map_stays_a_share():
    maps = np.array([[0.0, 0, 1, 1]])
    outside, inside = np.arange(16) < 6, np.arange(16) >= 6
    shares = [location.mass_accuracy(maps, m[None], mode="bicubic") for m in (outside, inside)]
    assert sum(shares) == pytest.approx(1)
    assert min(shares) >= 0
    assert location.mass_accuracy(maps, np.ones((1, 16), np.uint8), mode="bicubic") == 1


@PROPERTY
@given(MAPS, st.integers(0, 6), st.integers(1, 7))
def test_a_larger_box_holds_more_energy(maps, left, extra):
    boxes = np.array([[left, 0, left + 1, 6], [left, 0, min(8, left + 1 + extra), 6]])
    less, more = location.energy_in_box(np.stack([maps] * 2), boxes, size=(6, 8))
    assert 0 <= less <= more + 1e-12 <= 1 + 2e-12


# --- errors -------------------------------------------------------------------------------------

A = np.full((2, 3, 3), 0.5)
X = np.zeros((2, 3, 6, 6), np.float32)
BOX = np.array([[0, 0, 2, 2]] * 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: location.pointing_game(A, BOX), r"pass size=\(H, W\)"),
        (lambda: location.pointing_game(A, BOX[:1], size=(6, 6)), "one mask .* or box"),
        (lambda: location.pointing_game(A, BOX, size=(6, 6), tolerance=-1), "0 pixels or more"),
        (lambda: location.pointing_game(A, BOX + 5, size=(6, 6)), "reaches out .* 6x6"),
        (
            lambda: location.energy_in_box(A, BOX - 1, size=(6, 6)),
            r"\[-1.0, -1.0, 1.0, 1.0\] reach",
        ),
        (lambda: location.energy_in_box(A, BOX * [1, 1, 0, 1], size=(6, 6)), "holds no pixel"),
        (lambda: location.energy_in_box(A, BOX[:, ::-1], size=(6, 6)), "holds no pixel"),
        (lambda: location.energy_in_box(A, BOX[:, :3], size=(6, 6)), r"boxes must be \(..., 4\)"),
        (lambda: location.mass_accuracy(A, X[:, 0] > 0), "a mask is empty"),
        (lambda: location.mass_accuracy(A, X[:1, 0] == 0), "each map"),
        (lambda: location.mass_accuracy(A, X[:, 0]), "bool, or integers"),
    ],
)
def test_what_cannot_be_scored_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
