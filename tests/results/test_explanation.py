"""An explanation: its maps, what it draws, and the folder that it writes."""

import copy
import json
import pickle
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_reciprocam.core.maps import min_max
from vit_reciprocam.errors import InputError
from vit_reciprocam.pictures.preprocess import Preprocess
from vit_reciprocam.results.explanation import Explanation, softmax
from vit_reciprocam.results.ranges import name_with_range

NAMES = ("tench, Tinca tinca", "goldfish", "a/b: c")


def explanation(images=1, targets=((0, 2),), **changes):
    logits = np.array([[2.0, 0.0, 1.0]] * images, dtype=np.float32)
    scores = np.random.default_rng(0).random((images, len(targets[0]), 2, 3), dtype=np.float32)
    picture = Image.new("RGB", (60, 40), (90, 120, 150))
    fields = {
        "scores": scores,
        "logits": logits,
        "probs": softmax(logits),
        "targets": np.array(list(targets) * images),
        "path": "closed-form",
        "settings": {"kernel": "gaussian", "model": "test"},
        "class_names": NAMES,
        "pictures": (picture,) * images,
        "sources": tuple(f"photos/{number}.jpg" for number in range(images)),
    }
    return Explanation(**(fields | changes))


# --- maps ------------------------------------------------------------------------------------


def test_min_max_by_hand():
    maps, degenerate = min_max(np.array([[[1.0, 2.0], [3.0, 5.0]], [[4.0, 4.0], [4.0, 4.0]]]))
    assert maps.tolist() == [[[0, 0.25], [0.5, 1]], [[0, 0], [0, 0]]]
    assert maps.dtype == np.float32
    assert degenerate.tolist() == [False, True]


def test_rounding_noise_is_no_preference_but_small_differences_are():
    noise = np.float32(0.999) + np.array([[0, 1, 2, 1]], np.float32) * np.float32(2**-24)
    assert min_max(noise)[1]
    small = np.float32(0.999) + np.array([[0, 1, 2, 1]], np.float32) * np.float32(1e-5)
    maps, degenerate = min_max(small)
    assert not degenerate
    assert maps.max() == 1
    tiny = np.array([[0, 1e-12]], np.float32)  # an improbable class still has a map
    assert not min_max(tiny)[1]


def test_min_max_keeps_the_scores():
    scores = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    min_max(scores)
    assert scores.ravel().tolist() == [0, 1, 2, 3, 4, 5]


def test_negative_logits():
    maps, degenerate = min_max(np.array([[-3.0, -1.0], [-2.0, -3.0]]))
    assert maps.tolist() == [[0, 1], [0.5, 0]]
    assert not degenerate


def test_it_is_read_only():
    e = explanation()
    with pytest.raises(FrozenInstanceError):
        e.path = "direct"
    for array in (e.maps, e.scores, e.logits, e.probs, e.targets, e.degenerate):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    with pytest.raises(TypeError):
        e.settings["kernel"] = "dirac"


def test_names_and_repr():
    e = explanation()
    assert e.names == (("tench, Tinca tinca", "a/b: c"),)
    assert explanation(class_names=None).names == (("class 0", "class 2"),)
    assert repr(e) == (
        "Explanation(1 image(s) × 2 target(s), grid 2×3, closed-form: "
        "tench, Tinca tinca 66.5%, a/b: c 24.5%)"
    )


def test_one_image_of_many():
    e = explanation(images=3)
    assert len(e) == 3
    assert e[2].sources == e[-1].sources == ("photos/2.jpg",)
    np.testing.assert_array_equal(e[2].scores, e.scores[2:])
    assert len(list(e)) == 3
    with pytest.raises(IndexError, match="image 3 of an explanation of 3"):
        e[3]


# --- pictures --------------------------------------------------------------------------------


def test_overlay_is_brightest_where_the_map_is():
    scores = np.zeros((1, 1, 2, 3), np.float32)
    scores[0, 0, 1, 2] = 1
    e = explanation(scores=scores, targets=((1,),))
    light = np.asarray(e.overlay(0, colormap="gray").convert("L"))
    assert light.shape == (40, 60)
    row, column = np.unravel_index(light.argmax(), light.shape)
    assert row >= 20
    assert column >= 40


def test_overlay_on_a_picture_of_ones_own():
    e = explanation(pictures=None)
    assert e.overlay(1, picture=Image.new("L", (30, 20))).size == (30, 20)
    with pytest.raises(InputError, match="has no pictures to draw on: pass picture="):
        e.overlay(0)
    with pytest.raises(InputError, match=r"picture is 30x30 pixels, the model's grid 3x2: crop"):
        e.overlay(0, picture=Image.new("RGB", (30, 30)))
    assert e._repr_html_().startswith("<pre>Explanation(")


def test_the_map_lies_on_the_part_of_the_whole_picture_that_the_model_saw(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (80, 200, 3), dtype=np.uint8)
    whole = Image.fromarray(noise)
    preprocess = Preprocess(size=(40, 60), crop_pct=0.8)
    region = preprocess.region(whole)
    left, top, right, bottom = preprocess.box(whole)
    assert (left, top, right, bottom) == (51, 8, 147, 72)
    e = explanation(pictures=(region,), preprocess=preprocess)
    drawn = np.asarray(e.overlay(0, picture=whole)).copy()
    np.testing.assert_array_equal(drawn[top:bottom, left:right], e.overlay(0))
    np.testing.assert_array_equal(e.overlay(0, picture=region), e.overlay(0))
    drawn[top:bottom, left:right] = noise[top:bottom, left:right]
    np.testing.assert_array_equal(drawn, noise)
    whole.save(tmp_path / "whole.png")
    from_file = e.overlay(0, picture=tmp_path / "whole.png")
    np.testing.assert_array_equal(from_file, e.overlay(0, picture=whole))
    with pytest.raises(InputError, match="picture is 100x40 pixels: pass the whole picture that"):
        e.overlay(0, picture=whole.resize((100, 40)))


def test_overlay_by_class_name():
    e = explanation()
    np.testing.assert_array_equal(e.overlay("a/b: c"), e.overlay(1))
    np.testing.assert_array_equal(e.overlay("Tinca tinca"), e.overlay(np.int64(0)))
    with pytest.raises(InputError, match="'goldfish' was not explained for this image, but: tench"):
        e.overlay("goldfish")
    with pytest.raises(InputError, match="no class is called 'boxer'"):
        e.overlay("boxer")
    for target in (2, -1, 1.0, None):
        with pytest.raises(InputError, match="target must be a class name or a position, 0 to 1"):
            e.overlay(target)
    with pytest.raises(InputError, match=r"no image 1: there are 1 image\(s\)"):
        e.overlay(0, image=1)


def test_grid_and_html():
    e = explanation(images=2)
    assert e.grid(image=1).width > 3 * e.grid(image=1).height
    page = e._repr_html_()
    assert page.count('src="data:image/png;base64,') == 2
    words = [name_with_range(target) for target in e.record()["targets"]]
    assert f'alt="Saliency maps: {words[0]}, {words[1]}"' in page
    assert words[0].startswith("tench, Tinca tinca (map from ")


def test_show_opens_each_grid(monkeypatch):
    shown = []
    monkeypatch.setattr(Image.Image, "show", lambda image: shown.append(image.size))
    explanation(images=2).show()
    assert len(shown) == 2


# --- files -----------------------------------------------------------------------------------


def test_save_writes_everything_the_manifest_names(tmp_path):
    e = explanation()
    assert e.save(tmp_path / "out") == tmp_path / "out"
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    expected = ["1-tench.png", "2-a-b-c.png", "grid.png", "manifest.json", "maps.npz"]
    assert names == expected
    with np.load(tmp_path / "out" / manifest["maps"]) as saved:
        for name in ("maps", "scores", "targets", "logits", "probs"):
            np.testing.assert_array_equal(saved[name], getattr(e, name))
    assert manifest["schema"] == 1
    assert manifest["settings"] == {"kernel": "gaussian", "model": "test"}
    assert manifest["versions"]["numpy"] == np.__version__
    record = manifest["images"][0]
    assert record["prediction"]["name"] == "tench, Tinca tinca"
    assert [t["index"] for t in record["targets"]] == [0, 2]
    assert record["targets"][1]["overlay"] == "2-a-b-c.png"
    with Image.open(tmp_path / "out" / record["targets"][0]["overlay"]) as overlay:
        assert np.array_equal(overlay, e.overlay(0))


def test_save_of_several_images_numbers_them(tmp_path):
    explanation(images=2).save(tmp_path)
    assert (tmp_path / "0-grid.png").exists()
    assert (tmp_path / "1-2-a-b-c.png").exists()


def test_saving_again_replaces_what_was_saved_and_nothing_else(tmp_path):
    explanation().save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    explanation(targets=((1,),)).save(tmp_path)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["1-goldfish.png", "grid.png", "manifest.json", "maps.npz", "notes.txt"]


def test_a_picture_that_cannot_be_made_leaves_the_earlier_result_whole(tmp_path, monkeypatch):
    explanation().save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(InputError, match="colormap must be one of"):
        explanation(targets=((1,),)).save(tmp_path, colormap="hot")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("after", range(5))
def test_a_save_cut_short_leaves_no_manifest_no_half_file_and_can_be_repeated(
    tmp_path, monkeypatch, after
):
    explanation().save(tmp_path)
    replace, left = Path.replace, iter([True] * after)

    def full(path, target):
        if not next(left, False):
            raise OSError(28, "No space left on device")
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            explanation(targets=((1,),)).save(tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    assert not [name for name in names if name.endswith(".tmp")]
    assert ("manifest.json" in names) == (after == 0), "the old result is whole or not there"
    explanation(targets=((1,),)).save(tmp_path)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["1-goldfish.png", "grid.png", "manifest.json", "maps.npz"]


def test_a_users_own_file_is_not_replaced(tmp_path):
    (tmp_path / "grid.png").write_text("mine")
    with pytest.raises(InputError, match=r"grid\.png was not written by vit-reciprocam"):
        explanation().save(tmp_path)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["mine"]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "g.png").write_text("mine")
    for place in (tmp_path / "g.png", tmp_path / "g.png" / "sub"):
        with pytest.raises(InputError, match=r"results go to a folder, and .*g\.png is a file"):
            explanation().save(place)
    assert (tmp_path / "g.png").read_text() == "mine"


def test_a_folder_that_may_not_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # tests run as root may write anywhere
    with pytest.raises(InputError, match="no permission for"):
        explanation().save(tmp_path / "out")


def test_long_class_names_make_short_file_names(tmp_path):
    explanation(class_names=("x" * 400, "b", "c")).save(tmp_path)
    assert (tmp_path / f"1-{'x' * 60}.png").exists()


def test_of_many_targets_the_most_probable_are_drawn(tmp_path):
    logits = np.arange(40, dtype=np.float32)[None]
    every = tuple(range(40))
    scores = np.random.default_rng(0).random((1, 40, 2, 3), dtype=np.float32)
    names = tuple(f"kind {number}" for number in range(40))
    e = explanation(
        logits=logits, probs=softmax(logits), targets=(every,), scores=scores, class_names=names
    )
    e.save(tmp_path)
    drawn = sorted(p.name for p in tmp_path.glob("*-kind-*.png"))
    assert len(drawn) == 12
    assert "1-kind-39.png" in drawn, "numbered as in the grid, most probable first"
    assert "12-kind-28.png" in drawn
    with np.load(tmp_path / "maps.npz") as saved:
        assert saved["maps"].shape == (1, 40, 2, 3)
    assert e._repr_html_().count("kind") == 12


def test_it_can_be_pickled_and_leaves_the_callers_arrays_alone():
    scores = np.random.default_rng(0).random((1, 2, 2, 3), dtype=np.float32)
    e = explanation(scores=scores)
    assert scores.flags.writeable
    again = pickle.loads(pickle.dumps(e))
    np.testing.assert_array_equal(again.maps, e.maps)
    assert again.settings == e.settings
    assert copy.deepcopy(e).names == e.names


@pytest.mark.parametrize("content", ["[]", "{}", "not json", '{"generator": "webpack"}'])
def test_a_foreign_manifest_is_not_replaced(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"manifest\.json was not written by vit-reciprocam"):
        explanation().save(tmp_path)
    assert [p.read_text() for p in tmp_path.iterdir()] == [content]


def test_save_without_pictures(tmp_path):
    explanation(pictures=None).save(tmp_path)
    explanation(pictures=None).save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "maps.npz"]


def test_softmax_of_large_logits():
    np.testing.assert_allclose(softmax(np.array([[1000.0, 1000.0, -1000.0]])), [[0.5, 0.5, 0.0]])
