import numpy as np
import pytest
from PIL import Image

from vit_reciprocam.errors import InputError
from vit_reciprocam.pictures.render import COLORMAPS, colorize, enlarge, overlay, panels


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
