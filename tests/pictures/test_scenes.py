import numpy as np
import pytest

from vit_reciprocam.pictures.scenes import CLASSES, draw_scene


@pytest.mark.parametrize("seed", range(20))
def test_a_scene_has_its_objects_where_the_masks_say(seed):
    scene = draw_scene(seed, size=96)
    assert scene.image.size == (96, 96)
    assert 1 <= len(scene.labels) == len(set(scene.labels)) <= 3
    assert all(0 <= label < len(CLASSES) for label in scene.labels)
    assert scene.masks.shape == (len(scene.labels), 96, 96)
    assert scene.masks.dtype == bool
    assert scene.masks.sum(axis=0).max() <= 1, "a pixel belongs to one object"
    assert (scene.masks.mean(axis=(1, 2)) > 0.01).all(), "an object can be seen"


@pytest.mark.parametrize("name", CLASSES)
def test_masks_cover_the_drawing_of_every_class(name, monkeypatch):
    """Without background, scratches or noise, what is painted is what is masked."""
    from PIL import Image

    from vit_reciprocam.pictures import scenes

    black = Image.new("RGB", (128, 128))
    rng = np.random.default_rng(0)
    parts = scenes._pose(CLASSES[name], rng, np.array([64.0, 64.0]), 40.0)
    mask = scenes._paint(black, parts, rng)
    painted = np.asarray(black).max(axis=2) > 0
    masked = np.asarray(mask) > 0
    assert (painted & ~masked).sum() < 0.12 * masked.sum(), "only the outline sticks out"
    assert (masked & ~painted).sum() < 0.02 * masked.sum()


def test_the_seed_decides_everything():
    a, b, other = draw_scene(7), draw_scene(7), draw_scene(8)
    assert np.array_equal(a.image, b.image)
    assert np.array_equal(a.masks, b.masks)
    assert a.labels == b.labels
    assert not np.array_equal(a.image, other.image)


def test_number_of_objects_can_be_asked_for():
    assert {len(draw_scene(seed, objects=2).labels) for seed in range(5)} == {2}
    assert {len(draw_scene(seed).labels) for seed in range(40)} == {1, 2, 3}
    for objects in (0, 4):
        with pytest.raises(ValueError, match=f"1 to 3 or None, got {objects}"):
            draw_scene(0, objects=objects)
    with pytest.raises(ValueError, match="at least 16 pixels"):
        draw_scene(0, size=8)
