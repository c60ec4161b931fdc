import numpy as np
import pytest
from PIL import Image

from vit_reciprocam.errors import InputError
from vit_reciprocam.pictures.render import (
    COLORMAPS,
    colorize,
    enlarge,
    overlay,
    overlay_signed,
    panels,
)


@pytest.mark.needs_extras
@pytest.mark.parametrize("name", COLORMAPS)
def test_colours_are_matplotlibs(name):
    import matplotlib

    values = np.linspace(0, 1, 256)[None]
    expected = matplotlib.colormaps[name](values)[..., :3] * 255
    assert np.abs(colorize(values, name) - expected).max() < 15


@pytest.mark.parametrize("name", ["viridis", "inferno", "cividis", "gray"])
def test_lightness_rises_all_the_way(name):
    light = colorize(np.linspace(0, 1, 64)[None], name)[0] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(light) > 0).all()


def test_overlay_by_hand():
    picture = Image.new("RGB", (4, 2), (100, 100, 100))
    top_is_hot = np.array([[1.0], [0.0]])
    halfway = np.asarray(overlay(picture, top_is_hot, colormap="gray", opacity=0.5))
    assert halfway.shape == (2, 4, 3)
    assert halfway[0, 0].tolist() == [177] * 3  # between 100 and 255
    assert halfway[1, 0].tolist() == [50] * 3
    assert np.array_equal(overlay(picture, top_is_hot, opacity=0), picture)


def test_signed_overlay_by_hand():
    picture = Image.new("RGB", (4, 2), (100, 100, 100))
    drawn = np.asarray(overlay_signed(picture, np.array([[2.0], [-1.0]]), opacity=0.8))
    assert drawn.shape == (2, 4, 3)
    assert drawn[0, 0].tolist() == [204, 98, 20]  # 0.8 of orange (230, 97, 0), 0.2 of 100
    assert drawn[1, 0].tolist() == [60, 96, 132]  # half as much, 0.4 of blue (0, 90, 181)


def test_signed_overlay_of_nothing_is_the_picture_in_grey():
    picture = Image.new("RGB", (4, 2), (255, 0, 0))
    drawn = np.asarray(overlay_signed(picture, np.zeros((1, 2))))
    assert (drawn == 76).all()  # 0.299 * 255
    with pytest.raises(InputError, match="opacity must be between 0 and 1; got 2"):
        overlay_signed(picture, np.zeros((1, 2)), opacity=2)


def test_upsampling_keeps_the_place_and_the_interval():
    saliency = np.zeros((4, 6))
    saliency[1, 4] = 1
    large = enlarge(saliency, (40, 60))
    assert large.shape == (40, 60)
    assert 0 <= large.min() <= large.max() <= 1
    row, column = np.unravel_index(large.argmax(), large.shape)
    assert (row // 10, column // 10) == (1, 4)


def test_bad_settings():
    picture, saliency = Image.new("RGB", (4, 4)), np.zeros((2, 2))
    with pytest.raises(InputError, match="opacity must be between 0 and 1; got 2"):
        overlay(picture, saliency, opacity=2)
    with pytest.raises(InputError, match=r"colormap must be one of 'viridis'.*got 'hot'"):
        overlay(picture, saliency, colormap="hot")


def test_panels_wrap_and_cut_long_captions():
    pictures = [Image.new("RGB", (50, 50), "red")] * 3
    sheet = panels(pictures, ["a", "b" * 300, ""], height=64, columns=2)
    assert sheet.width < 3 * 64
    assert sheet.height > 2 * 64
    assert sheet.getpixel((10, 10)) == (255, 0, 0)


def test_further_lines_of_a_caption_are_never_cut():
    picture = Image.new("RGB", (10, 40), "red")
    one = panels([picture] * 2, ["a" * 300, ""])
    two = panels([picture] * 2, ["a" * 300 + "\nb", ""])
    wide = panels([picture] * 2, ["a" * 300 + "\n" + "b" * 60, "\n" + "b" * 60])
    assert two.size == (one.width, one.height + 22)  # a line of 17 pixels, and 5 above it
    ink = np.argwhere((np.asarray(wide.convert("L")) < 128)[320 + 2 * 10 + 17 :])
    assert wide.width > 800
    assert ink[:, 1].max() < wide.width - 5, "the last letter has its margin"


def test_the_legend_against_a_class_goes_from_blue_to_orange():
    sheet = np.asarray(panels([Image.new("RGB", (50, 50))], [""], against=True)).astype(int)
    legend = sheet[330:]
    blue = np.argwhere((legend == (0, 90, 181)).all(axis=-1))
    orange = np.argwhere((legend == (230, 97, 0)).all(axis=-1))
    assert len(blue)
    assert len(orange)
    assert blue[:, 1].max() < orange[:, 1].min()


def test_a_legend_that_does_not_fit_takes_two_lines():
    narrow = panels([Image.new("RGB", (160, 320))] * 2, ["", ""])
    wide = panels([Image.new("RGB", (160, 320))] * 4, [""] * 4)
    assert narrow.height == wide.height + 22


@pytest.mark.parametrize("colormap", ["viridis", "gray"])
def test_panels_have_a_legend_from_weak_to_strong(colormap):
    sheet = np.asarray(panels([Image.new("RGB", (50, 50))], [""], colormap=colormap))
    weak, strong = COLORMAPS[colormap][[0, -1]]
    legend = sheet[-40:]
    first = np.argwhere((legend == weak).all(axis=-1))
    last = np.argwhere((legend == strong).all(axis=-1) & (weak != legend).any(axis=-1))
    assert len(first)
    assert len(last)
    assert first[:, 1].min() < last[:, 1].max()
