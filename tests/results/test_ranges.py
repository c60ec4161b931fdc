"""The range that a map is scaled from: found, judged against rounding, and written in words."""

import json
import math
import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from test_explanation import explanation

from vit_reciprocam.errors import InputError
from vit_reciprocam.pictures import render
from vit_reciprocam.results.ranges import (
    are_beyond_rounding,
    find_ranges,
    name_with_range,
    write_caption,
    write_range,
    write_remark,
)

EPS = 2.0**-23  # of float32
LOGITS = np.array([[2.0, 0.0, 1.0]], np.float32)


def words(lowest, highest, unit):
    return write_range({"lowest": lowest, "highest": highest, "unit": unit})


# --- in words --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lowest", "highest", "unit", "expected"),
    [
        (0.903, 0.905, "probability", "from 90.3% to 90.5%"),
        (0.0, 1.0, "probability", "from 0.0% to 100.0%"),
        (0.90311, 0.90325, "probability", "from 90.31% to 90.33%"),
        (0.5, 0.5000003, "probability", "from 50.00000% to 50.00003%"),
        (1.2e-6, 1.5e-6, "probability", "from 0.00012% to 0.00015%"),
        (1.2e-12, 3.4e-12, "probability", "from 1.2e-10% to 3.4e-10%"),
        (0.25, 0.25, "probability", "25.0% everywhere"),
        (-0.07, 0.09, "nats", "from -0.07 to +0.09 nats"),
        (-1.2884, -0.0045, "nats", "from -1.29 to 0.00 nats"),
        (0.0121, 0.0124, "nats", "from +0.0121 to +0.0124 nats"),
        (0.0, 0.0, "nats", "0.00 nats everywhere"),
        (-0.4, 2.31, None, "from -0.40 to +2.31"),
        (-2.31, -2.25, "log-probability", "from -2.31 to -2.25"),
        (-1.5, 12.25, "logit", "from -1.50 to 12.25"),
        (7.0001, 7.0004, "logit", "from 7.0001 to 7.0004"),
    ],
)
def test_words_by_hand(lowest, highest, unit, expected):
    assert words(lowest, highest, unit) == expected


def test_a_map_that_was_scaled_already_has_no_range():
    assert write_range({"degenerate": False, "reliable": True}) == ""


@given(
    st.floats(-30, 30),
    st.floats(1e-9, 30),
    st.sampled_from(["logit", "log-probability", "nats", None]),
)
@example(0.25, 0.5, "logit")
def test_the_words_neither_hide_nor_exaggerate_the_difference(lowest, width, unit):
    highest = lowest + width
    if lowest == highest:
        return
    low, high = map(float, re.findall(r"[-+]?\d[\d.]*(?:e[-+]\d+)?", words(lowest, highest, unit)))
    assert low < high
    difference = highest - lowest
    assert 0 < high - low < 2.001 * difference or high - low < 0.011
    assert math.isclose(low, lowest, abs_tol=max(0.0051, 0.501 * difference))


@given(st.floats(1e-20, 1), st.floats(0, 1))
def test_probabilities_are_told_apart(one, other):
    lowest, highest = sorted((one, other))
    text = words(lowest, highest, "probability")
    assert text.endswith("everywhere") == (lowest == highest)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ({"degenerate": False, "reliable": True, "unit": "nats"}, ""),
        ({"degenerate": False, "reliable": False, "unit": "probability"}, "within rounding"),
        ({"degenerate": True, "reliable": False, "unit": "probability"}, "no preference"),
        ({"degenerate": True, "reliable": False, "unit": "nats"}, "no evidence"),
        ({"degenerate": True, "reliable": False, "unit": None}, "no evidence"),
        ({"degenerate": True, "reliable": False}, "no preference"),
    ],
)
def test_remarks(target, expected):
    assert write_remark(target) == expected


def test_captions_and_names():
    target = {"name": "tench, Tinca tinca", "probability": 0.5, "degenerate": False}
    target |= {"reliable": False, "lowest": 0.5, "highest": 0.5000003, "unit": "probability"}
    span = "map from 50.00000% to 50.00003%"
    assert write_caption(target, "tench") == f"50.0% tench\n{span}\nwithin rounding"
    assert name_with_range(target) == f"tench, Tinca tinca ({span}, within rounding)"
    other = {"name": "tench", "probability": 0.5, "degenerate": False, "reliable": True}
    assert write_caption(other, "tench") == "50.0% tench"
    assert name_with_range(other) == "tench"


# --- against rounding ------------------------------------------------------------------------


def test_ranges_by_hand():
    values = np.array([[[1.0, 2.0], [3.0, 5.0]], [[-4.0, 4.0], [0.5, 4.0]]], np.float32)
    assert find_ranges(values).tolist() == [[1, 5], [-4, 4]]


@pytest.mark.parametrize("unit", ["nats", "logit", "log-probability"])
def test_ten_roundings_of_the_largest_logit(unit):
    logits = np.array([[-4.0, 3.0], [0.25, -0.5]])  # 4 and, at least, 1
    limit = 10 * EPS
    ranges = np.array([[[0, 4 * limit], [0, 4.01 * limit]], [[0, limit], [0, 1.01 * limit]]])
    assert are_beyond_rounding(ranges, logits, unit).tolist() == [[False, True], [False, True]]
    moved = ranges - 4 * limit  # the place of a range does not count
    assert are_beyond_rounding(moved, logits, unit).tolist() == [[False, True], [False, True]]


def test_probabilities_are_judged_by_their_ratio():
    logits = np.array([[1.0]])
    narrow, wide = np.exp(9 * EPS), np.exp(11 * EPS)
    for size in (0.5, 1e-10):  # a small probability may differ by little
        ranges = size * np.array([[[1, narrow], [1, wide]]])
        assert are_beyond_rounding(ranges, logits, "probability").tolist() == [[False, True]]
    zero = np.array([[[0.0, 1e-30], [0.0, 0.0]]])
    assert are_beyond_rounding(zero, logits, "probability").tolist() == [[True, False]]


def one_map(*values, **changes):
    """Return the explanation of one map of 2 rows and 3 columns, from its first values."""
    scores = np.zeros((1, 1, 2, 3), np.float32)
    scores.flat = [*values, *[values[0]] * (6 - len(values))]
    return explanation(scores=scores, targets=((2,),), logits=LOGITS, **changes)


def test_an_explanation_of_probabilities():
    e = one_map(0.25, 0.5)
    assert e.ranges.tolist() == [[[0.25, 0.5]]]
    assert e.reliable.tolist() == [[True]]
    # in float32 the step at 0.25 is EPS / 4; a logit of 2 is rounded by 2 * EPS
    assert not one_map(0.25, 0.25 + 16 * EPS / 4).reliable
    assert one_map(0.25, 0.25 + 24 * EPS / 4).reliable
    flat = one_map(0.25)
    assert flat.degenerate
    assert not flat.reliable


def test_logits_and_log_probabilities_are_judged_as_they_are():
    for score in ("logit", "log-probability"):
        settings = {"score": score}
        assert not one_map(-1.0, -1.0 + 19 * EPS, settings=settings).reliable
        assert one_map(-1.0, -1.0 + 21 * EPS, settings=settings).reliable
        assert one_map(-1.0, -0.5, settings=settings).record()["targets"][0]["unit"] == score


def with_evidence(*values, **settings):
    evidence = np.zeros((1, 1, 2, 3), np.float32)
    evidence.flat[: len(values)] = values
    settings = {"normalize": "evidence", "score": "probability"} | settings
    return one_map(0.25, 0.5, evidence=evidence, settings=settings)


def test_evidence_is_judged_by_itself():
    e = with_evidence(-0.25, 0.5)
    assert e.ranges.tolist() == [[[-0.25, 0.5]]]
    assert e.reliable
    assert e.record()["targets"][0]["unit"] == "nats"
    assert not with_evidence(-9 * EPS, 10 * EPS).reliable
    assert with_evidence(-9 * EPS, 12 * EPS).reliable
    against = with_evidence(-0.25)
    assert against.degenerate
    assert not against.reliable


def test_fused_evidence_is_reliable_if_it_is_not_degenerate():
    fuse = [{"kernel": "dirac", "depth": 2}, {"kernel": "box", "depth": 4}]
    e = with_evidence(-9 * EPS, 1 * EPS, fuse=fuse)
    assert e.reliable
    target = e.record()["targets"][0]
    assert target["unit"] is None
    assert write_range(target) == "from -1.1e-06 to +1.2e-07"
    assert not with_evidence(-1.0, fuse=fuse).reliable


def test_maps_of_other_methods_have_no_range():
    e = one_map(0.0, 1e-9, path="", scores_are_maps=True)
    assert e.reliable
    assert e.ranges.tolist() == [[[0, np.float32(1e-9)]]]
    assert not {"lowest", "highest", "unit"} & set(e.record()["targets"][0])
    assert not one_map(0.5, path="", scores_are_maps=True).reliable


def test_signed_values_of_other_methods_have_a_range_without_a_unit():
    values = np.array([[[[-0.25, 0.5, 0], [0, 0, 0]]]], np.float32)
    e = one_map(0.0, path="", scores_are_maps=True, evidence=values)
    target = e.record()["targets"][0]
    assert (target["lowest"], target["highest"], target["unit"]) == (-0.25, 0.5, None)
    assert write_range(target) == "from -0.25 to +0.50"
    assert e.reliable


def test_each_image_is_judged_by_its_own_logits():
    scores = np.zeros((2, 1, 2, 3), np.float32)
    scores[:, 0, 0, 0] = 15 * EPS
    logits = np.array([[1.0, 0.0, 0.0], [9.0, 0.0, 0.0]], np.float32)
    e = explanation(2, ((0,),), scores=scores, logits=logits, settings={"score": "logit"})
    assert e.reliable.tolist() == [[True], [False]]
    assert e[1].reliable.tolist() == [[False]]
    for array in (e.ranges, e.reliable):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


# --- where it is shown -----------------------------------------------------------------------


def test_grid_manifest_and_notebook_say_the_range(tmp_path, monkeypatch):
    scores = np.full((1, 2, 2, 3), 0.903, np.float32)
    scores[0, 0, 1, 2] = 0.905
    scores[0, 1, 0, 0] += 8 * EPS / 2  # the step at 0.9 is EPS / 2
    e = explanation(scores=scores)
    shown = []
    panels = render.panels
    monkeypatch.setattr(
        render, "panels", lambda pictures, captions, **k: shown.append(captions) or
        panels(pictures, captions, **k),
    )  # fmt: skip
    page = e._repr_html_()
    tench, other = "map from 90.3% to 90.5%", "map from 90.30000% to 90.30005%"
    assert shown == [
        ["what the model saw", f"66.5% tench\n{tench}", f"24.5% a/b: c\n{other}\nwithin rounding"]
    ]
    assert f"tench, Tinca tinca ({tench}), a/b: c ({other}, within rounding)" in page
    e.save(tmp_path)
    first, second = json.loads((tmp_path / "manifest.json").read_text())["images"][0]["targets"]
    assert (first["lowest"], first["highest"]) == tuple(map(float, np.float32([0.903, 0.905])))
    assert (first["unit"], first["reliable"]) == ("probability", True)
    assert (second["reliable"], second["degenerate"]) == (False, False)


# --- what speaks against a class -------------------------------------------------------------


def test_against_draws_the_sign_of_the_evidence(tmp_path):
    e = with_evidence(0.5, 0.0, -0.5)
    drawn = np.asarray(e.overlay(0, against=True, opacity=1)).astype(int)
    red, blue = drawn[0, 0, 0] - drawn[0, 0, 2], drawn[0, -1, 2] - drawn[0, -1, 0]
    assert red > 200
    assert blue > 150
    assert np.ptp(drawn[-1, 30]) == 0, "without evidence the picture is seen, in grey"
    assert not np.array_equal(e.overlay(0), e.overlay(0, against=True))
    e.save(tmp_path, against=True)
    with Image.open(tmp_path / "1-a-b-c.png") as saved:
        assert np.array_equal(saved, e.overlay(0, against=True))
    with Image.open(tmp_path / "grid.png") as saved:
        assert np.array_equal(saved, e.grid(against=True))


def test_against_shows_something_if_nothing_speaks_for_the_class():
    e = with_evidence(-0.5, -0.25)
    assert e.degenerate
    drawn = np.asarray(e.overlay(0, against=True, opacity=1)).astype(int)
    assert drawn[0, 0, 2] - drawn[0, 0, 0] > 150


def test_against_needs_evidence(tmp_path):
    e = explanation()
    for draw in (e.overlay, e.grid, lambda **style: e.save(tmp_path / "out", **style)):
        with pytest.raises(InputError, match="shows signed evidence, and this explanation has non"):
            draw(against=True)
    assert not (tmp_path / "out").exists()
