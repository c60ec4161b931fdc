import numpy as np
import pytest

from vit_reciprocam.errors import InputError
from vit_reciprocam.evaluate.metrics.arrays import blur
from vit_reciprocam.evaluate.metrics.perturbation import (
    area_under_curve,
    baseline_images,
    deletion,
    insertion,
    transition_images,
)

# A picture of ones, 4x4, four patches of 2x2; the "model" adds up what it sees of each patch:
# probability of class 1 = .4 (top left) + .3 (top right) + .2 (bottom left) + .1 (bottom right).
IMAGES = np.ones((1, 3, 4, 4))
BASELINE = np.zeros_like(IMAGES)
WEIGHTS = np.kron(np.array([[0.4, 0.3], [0.2, 0.1]]), np.ones((2, 2))) / 4
MAPS = np.array([[[1.0, 0.5], [0.75, 0.0]]])  # order: top left, bottom left, top right, the last
TARGETS = np.array([1])


def predict(images):
    seen = (images.mean(axis=1) * WEIGHTS).sum(axis=(-2, -1))
    return np.stack([1 - seen, seen], axis=-1)


def curve(images, baseline, maps, **options):
    way = transition_images(baseline, images, maps, **options)
    shares, values = zip(*[(share, predict(x)[0, 1]) for share, x in way], strict=True)
    return shares, values


def test_insertion_and_deletion_by_hand():
    # insertion 0, .4, .6, .9, 1: (0/2 + .4 + .6 + .9 + 1/2) / 4 = .6; deletion 1, .6, .4, .1, 0
    given = (predict, IMAGES, BASELINE, MAPS, TARGETS)
    np.testing.assert_allclose(insertion(*given, steps=4), [0.6])
    np.testing.assert_allclose(deletion(*given, steps=4), [0.4])
    np.testing.assert_allclose(deletion(*given[:4], [0], steps=4), [0.6])  # the other class


@pytest.mark.parametrize(
    ("steps", "shares", "values", "area"),
    [
        (1, (0, 1), (0, 1), 0.5),
        (2, (0, 0.5, 1), (0, 0.6, 1), 0.55),
        # 4/3 and 8/3 of 4 cells, rounded down; .25 * .2 + .25 * .5 + .5 * .8 = .575
        (3, (0, 0.25, 0.5, 1), (0, 0.4, 0.6, 1), 0.575),
        # more steps than cells: once for each
        (14, (0, 0.25, 0.5, 0.75, 1), (0, 0.4, 0.6, 0.9, 1), 0.6),
    ],
)
def test_steps_by_hand(steps, shares, values, area):
    got = curve(IMAGES, BASELINE, MAPS, steps=steps)
    assert got[0] == shares
    np.testing.assert_allclose(got[1], values)
    np.testing.assert_allclose(area_under_curve(*got), area)


def test_equal_cells_go_row_by_row():
    for flat in (0.0, 0.3, 1.0):
        _, values = curve(IMAGES, BASELINE, np.full((1, 2, 2), flat), steps=4)
        np.testing.assert_allclose(values, [0, 0.4, 0.7, 0.9, 1])


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_equal_pixels_go_row_by_row(mode):
    images = np.random.default_rng(0).normal(size=(2, 3, 5, 7))
    maps = np.full((2, 3, 3), 0.3)  # upsampled, its pixels differ by rounding errors
    options = {"steps": 35, "unit": "pixel", "mode": mode}
    way = transition_images(np.full_like(images, np.inf), images, maps, **options)
    for count, (_, mixed) in enumerate(way):
        shown = np.isfinite(mixed).reshape(2, 3, 35)
        np.testing.assert_array_equal(shown, np.broadcast_to(np.arange(35) < count, shown.shape))


def test_by_pixel_in_the_order_of_the_upsampled_map():
    images = np.arange(1.0, 5)[None, None, None].repeat(3, axis=1)  # (1, 3, 1, 4)
    maps = np.array([[[1.0, 0.0]]])  # at 4 pixels 1, .75, .25, 0
    options = {"steps": 4, "unit": "pixel"}
    batches = [x for _, x in transition_images(np.zeros_like(images), images, maps, **options)]
    assert [b[0, 2, 0].tolist() for b in batches] == [
        [0, 0, 0, 0],
        [1, 0, 0, 0],
        [1, 2, 0, 0],
        [1, 2, 3, 0],
        [1, 2, 3, 4],
    ]


def test_each_picture_has_its_own_order_and_the_way_back_is_the_complement():
    rng = np.random.default_rng(3)
    images, maps = rng.normal(size=(2, 3, 6, 9)).astype(np.float32), rng.random((2, 2, 3))
    start = baseline_images(images, "mean")
    there = list(transition_images(start, images, maps, steps=6))
    back = list(transition_images(images, start, maps, steps=6))
    for count, ((share, shown), (_, left)) in enumerate(zip(there, back, strict=True)):
        assert share == count / 6
        assert shown.dtype == np.float32
        np.testing.assert_array_equal(shown + left, images)
        for picture in range(2):
            for row, column in np.ndindex(2, 3):
                cell = (
                    picture,
                    slice(None),
                    slice(3 * row, 3 * row + 3),
                    slice(3 * column, 3 * column + 3),
                )
                before = (maps[picture] > maps[picture, row, column]).sum()
                expected = images[cell] if before < count else 0
                np.testing.assert_array_equal(shown[cell], np.broadcast_to(expected, (3, 3, 3)))


def test_a_grid_that_does_not_divide_the_picture_covers_it():
    maps = np.array([[[0.1, 0.9, 0.5]]])
    batches = [x for _, x in transition_images(np.zeros((1, 1, 1, 7)), np.ones((1, 1, 1, 7)), maps)]
    # pixels 0 to 2, 3 to 4 and 5 to 6: pixel x lies in cell 3x // 7
    assert batches[1][0, 0, 0].tolist() == [0, 0, 0, 1, 1, 0, 0]
    assert batches[2][0, 0, 0].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert batches[3].all()


def test_baselines():
    images = np.random.default_rng(4).normal(size=(2, 3, 30, 28)).astype(np.float32)
    assert not baseline_images(images, "mean").any()
    np.testing.assert_array_equal(baseline_images(images), blur(images))
    black = baseline_images(images, "black", mean=(0.5, 0.4, 0.3), std=(0.5, 0.1, 0.2))
    assert black.dtype == np.float32
    # a pixel of 0 normalises to -mean/std
    np.testing.assert_allclose(black[1, :, 7, 9], [-1, -4, -1.5])
    assert np.ptp(black, axis=(0, 2, 3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: baseline_images(IMAGES, "grey"), "'blur', 'mean', 'black'"),
        (lambda: baseline_images(IMAGES, "black", mean=(0.5,) * 3), "mean and std"),
        (lambda: baseline_images(IMAGES.astype(int)), "floating"),
        (lambda: transition_images(BASELINE, IMAGES[..., 1:], MAPS), "one shape"),
        (lambda: transition_images(BASELINE, IMAGES, np.ones((2, 2, 2))), "one map"),
        (lambda: transition_images(BASELINE, IMAGES, MAPS * np.nan), "NaN"),
        (lambda: transition_images(BASELINE, IMAGES, MAPS + np.inf), "4 are NaN or infinite"),
        (lambda: transition_images(BASELINE, IMAGES, MAPS, unit="row"), "'patch', 'pixel'"),
        (lambda: transition_images(BASELINE, IMAGES, MAPS, steps=0), "1 or more; got 0"),
        (lambda: insertion(predict, IMAGES, BASELINE, MAPS, [2]), "classes 0 to 1"),
        (lambda: insertion(predict, IMAGES, BASELINE, MAPS, [-1]), "classes 0 to 1"),
        (lambda: insertion(predict, IMAGES, BASELINE, MAPS, [1, 1]), "one target"),
        (lambda: insertion(predict, IMAGES, BASELINE, MAPS, 1), "one target"),
        (lambda: deletion(lambda x: predict(x)[0], IMAGES, BASELINE, MAPS, [1]), "one target"),
        (lambda: deletion(lambda x: 9 * predict(x), IMAGES, BASELINE, MAPS, [1]), "logits"),
        (lambda: area_under_curve([0], [1]), "two points"),
        (lambda: area_under_curve([0, 1], [1, 1, 1]), r"got \(2,\) and \(3,\)"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("unit", ["patch", "pixel"])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e9])
def test_signed_values_of_any_scale_put_patches_in_order(unit, scale):
    """Clipped at 0 the last three patches would be equal, and appear row by row."""
    signed = np.array([[[-1.0, -0.5], [2.0, -3.0]]]) * scale
    images = IMAGES[..., ::2, ::2]  # a pixel per patch, so that both units change the same
    order = np.zeros((2, 2), int)
    for step, (_, shown) in enumerate(
        transition_images(np.zeros_like(images), images, signed, steps=4, unit=unit)
    ):
        order[(shown[0, 0] == 1) & (order == 0)] = step
    # 2 before -.5 before -1 before -3
    assert order.tolist() == [[3, 2], [1, 4]]


def test_insertion_of_signed_values_by_hand():
    signed = np.array([[[-1.0, -0.5], [2.0, -3.0]]])
    given = (predict, IMAGES, BASELINE, signed, TARGETS)
    # bottom left .2, top right .5, top left .9, 1: (0/2 + .2 + .5 + .9 + 1/2) / 4 = .525
    np.testing.assert_allclose(insertion(*given, steps=4), [0.525])
    np.testing.assert_allclose(deletion(*given, steps=4), [0.475])
    clipped = signed.clip(0) / 2  # bottom left .2, then row by row: .6, .9, 1
    np.testing.assert_allclose(
        insertion(predict, IMAGES, BASELINE, clipped, TARGETS, steps=4), [0.55]
    )
