import json

import numpy as np
import pytest
from PIL import Image

from vit_reciprocam.errors import ImageError, InputError
from vit_reciprocam.pictures.preprocess import Preprocess


def photo(width=60, height=40, seed=0):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.needs_extras
@pytest.mark.parametrize("image_size", [(60, 40), (41, 67), (500, 333), (224, 224), (31, 900)])
@pytest.mark.parametrize("size", [(32, 32), (224, 224), (32, 48), (64, 40)])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
@pytest.mark.parametrize(("resize", "mode"), [("shortest", "center"), ("squash", "squash")])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_equals_timms_transform_to_the_bit(image_size, size, crop_pct, resize, mode, interpolation):
    import torch
    from timm.data import create_transform

    image = photo(*image_size)
    ours = Preprocess(size, resize, crop_pct, interpolation)(image)
    theirs = create_transform(
        (3, *size), interpolation=interpolation, crop_pct=crop_pct, crop_mode=mode
    )(image)
    assert torch.equal(torch.from_numpy(ours), theirs)


@pytest.mark.needs_extras
@pytest.mark.parametrize("image_size", [(303, 240), (225, 229), (640, 427), (301, 224)])
def test_half_a_pixel_is_rounded_as_transformers_does(image_size):
    import transformers

    image = photo(*image_size)
    theirs = transformers.CLIPImageProcessorPil()
    ours = Preprocess(
        (224, 224), "shortest", 1.0, "bicubic", theirs.image_mean, theirs.image_std, half="down"
    )
    assert np.array_equal(ours(image), theirs(images=image)["pixel_values"][0])


def test_region_is_what_the_view_shows():
    image = photo(300, 200)
    for resize in ("shortest", "squash"):
        preprocess = Preprocess((64, 64), resize, 0.8)
        view = np.asarray(preprocess.view(image)).astype(int)
        region = preprocess.region(image).resize((64, 64), Image.Resampling.BICUBIC)
        assert np.abs(view - np.asarray(region)).mean() < 3


def test_preprocess_survives_json():
    preprocess = Preprocess((32, 48), "squash", 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess


def test_preprocessing_as_text():
    written = Preprocess.parse(
        "inception:size=384x512,resize=squash,crop_pct=1,mean=0.4", size=(9, 9)
    )
    assert written == Preprocess(
        (384, 512), resize="squash", crop_pct=1.0, mean=(0.4,) * 3, std=(0.5,) * 3
    )
    clip = Preprocess.parse("clip:std=0.1/0.2/0.3", size=(224, 224))
    assert (clip.size, clip.std) == ((224, 224), (0.1, 0.2, 0.3))
    assert clip.mean[0] == pytest.approx(0.48145466)
    with pytest.raises(
        InputError, match="has no size, and the file takes any: write clip:size=224"
    ):
        Preprocess.parse("clip")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image", "preprocess must be one of 'imagenet', 'inception', 'clip'"),
        ("clip:crop=1", "a setting of preprocess must be one of 'crop_pct', "),
        ("clip:mean=1/2", "mean cannot be '1/2'"),
        ("clip:crop_pct=1.5", "crop_pct cannot be '1.5'"),
        ("clip:size=0", "size cannot be '0'"),
        ("clip:size", "expected NAME or NAME:KEY=VALUE"),
    ],
)
def test_text_that_is_no_preprocessing(text, words):
    with pytest.raises(InputError, match=words):
        Preprocess.parse(text)


def test_preprocess_refuses_unknown_choices():
    with pytest.raises(InputError, match="resize must be one of 'shortest', 'squash'"):
        Preprocess((8, 8), resize="pad")
    with pytest.raises(InputError, match="interpolation must be one of"):
        Preprocess((8, 8), interpolation="area")
    with pytest.raises(InputError, match="half must be one of 'even', 'down'"):
        Preprocess((8, 8), half="up")


def test_extreme_aspect_is_refused_before_it_eats_the_memory():
    with pytest.raises(ImageError, match="too long and thin"):
        Preprocess((224, 224))(Image.new("RGB", (100_000, 1)))
