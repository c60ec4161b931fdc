"""torchvision's models by name: weights, class names and preprocessing."""

import itertools
import math
import urllib.error
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.models import _api as registry
from torchvision.models import get_model_weights
from torchvision.models.vision_transformer import (
    VisionTransformer,
    ViT_B_16_Weights,
)
from torchvision.transforms._presets import ImageClassification
from torchvision.transforms.functional import InterpolationMode

import vit_reciprocam as vr
from conftest import tiny_images
from vit_reciprocam import ReciproCAM
from vit_reciprocam.errors import (
    DownloadError,
    InputError,
    ModelError,
    WeightsError,
)
from vit_reciprocam.libraries.torchvision.load import _preprocess, load_torchvision


@pytest.fixture
def tiny_name(monkeypatch):
    """Register a tiny model with torchvision that has the published weights of vit_b_16."""

    def tiny(*, weights: ViT_B_16_Weights | None = None, progress: bool = True, **options):
        if weights is not None and options.get("num_classes", 1000) != 1000:
            raise ValueError("The parameter 'num_classes' expected value 1000")
        sizes = {"image_size": 16, "num_classes": 1000} | options
        model = VisionTransformer(
            patch_size=4, num_layers=1, num_heads=3, hidden_dim=12, mlp_dim=24, **sizes
        )
        if weights is not None:
            model.load_state_dict(weights.get_state_dict(progress=progress, check_hash=True))
        return model

    tiny.__module__ = VisionTransformer.__module__
    monkeypatch.setitem(registry.BUILTIN_MODELS, "tiny_vit", tiny)
    return "tiny_vit"


def save(path, **options):
    model = VisionTransformer(16, 4, 1, 3, 12, 24, **options)
    nn.init.normal_(model.heads.head.weight)
    if path.suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    return model.eval()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_local_weights(tiny_name, tmp_path, suffix):
    path = tmp_path / f"mine{suffix}"
    original = save(path)
    model, preprocess, names = load_torchvision(tiny_name, weights=path, options={})
    assert not model.training
    images = tiny_images((4, 4))
    torch.testing.assert_close(model(images), original(images))
    assert (len(names), names[:2]) == (1000, ("tench", "goldfish"))
    assert preprocess.size == (16, 16)
    assert preprocess.interpolation == "bilinear"
    assert ReciproCAM(model)(images).path == "closed-form"


def test_load_by_spec_and_explain(tiny_name, tmp_path):
    save(tmp_path / "mine.pth", num_classes=7)
    classifier = vr.load(f"torchvision:{tiny_name}", weights=tmp_path / "mine.pth")
    e = vr.explain(np.zeros((20, 30, 3), np.uint8), classifier)
    assert (e.maps.shape, e.path, classifier.num_classes) == ((1, 1, 4, 4), "closed-form", 7)
    with pytest.raises(InputError, match="has classes of its own"):
        vr.load(f"torchvision:{tiny_name}", prompts=["a dog"])


def test_local_weights_say_their_classes_and_image_size(tiny_name, tmp_path):
    model = VisionTransformer(24, 4, 1, 3, 12, 24, num_classes=7)
    torch.save({"model": model.state_dict()}, tmp_path / "mine.pth")
    loaded, preprocess, names = load_torchvision(
        tiny_name, weights=tmp_path / "mine.pth", options={}
    )
    assert (loaded.num_classes, loaded.image_size, names) == (7, 24, None)
    assert preprocess.size == (24, 24)


def test_a_file_of_published_name_is_prepared_for_as_published(tiny_name, tmp_path):
    path = tmp_path / "vit_b_16_swag-9ac1b537.pth"
    save(path)
    assert path.name == ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1.url.rpartition("/")[2]
    _, preprocess, _ = load_torchvision(tiny_name, weights=path, options={})
    assert (preprocess.crop_pct, preprocess.interpolation) == (1.0, "bicubic")


@pytest.mark.parametrize(
    ("weights", "chosen"), [(None, "IMAGENET1K_V1"), ("IMAGENET1K_SWAG_LINEAR_V1",) * 2]
)
def test_published_weights(tiny_name, tmp_path, monkeypatch, weights, chosen):
    original = save(tmp_path / "fetched.pth")
    asked = []

    def fetch(self, **_options):
        asked.append(self.name)
        return original.state_dict()

    monkeypatch.setattr(registry.WeightsEnum, "get_state_dict", fetch)
    model, _, names = load_torchvision(tiny_name, weights=weights, options={})
    assert asked == [chosen]
    assert len(names) == 1000
    assert torch.equal(model.class_token, original.class_token)


def test_no_network_says_what_to_do(tiny_name, monkeypatch):
    def fetch(self, **_options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(registry.WeightsEnum, "get_state_dict", fetch)
    words = r"'tiny_vit' could not be fetched: no route to host\. .*pass a local file: --weights"
    with pytest.raises(DownloadError, match=words):
        load_torchvision(tiny_name, weights=None, options={})


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("vit_b_17", {}, r"no model 'vit_b_17'\. Closest: vit_b_16"),
        ("resnet18", {}, "resnet18 is not supported: it is neither"),
        ("fasterrcnn_resnet50_fpn", {}, "is not supported"),  # would fetch its backbone
        ("swin3d_t", {}, "is not supported"),  # videos
        ("tiny_vit", {"colour": 3}, "cannot create 'tiny_vit' with options"),
        ("tiny_vit", {"image_size": 15}, "indivisible by patch size"),
        ("tiny_vit", {"num_classes": 3}, "do not go with options"),
    ],
)
@pytest.mark.usefixtures("tiny_name")
def test_names_that_cannot_be_loaded(name, options, words):
    with pytest.raises(ModelError, match=words):
        load_torchvision(name, weights=None, options=options)


def test_local_weights_that_do_not_fit(tiny_name, tmp_path):
    torch.save({"class_token": torch.zeros(1, 1, 12)}, tmp_path / "few.pth")
    with pytest.raises(
        WeightsError, match=r"few\.pth does not fit 'tiny_vit': Missing key.*variant"
    ):
        load_torchvision(tiny_name, weights=tmp_path / "few.pth", options={})
    with pytest.raises(WeightsError, match="no such weights file"):
        load_torchvision(tiny_name, weights=tmp_path / "none.pth", options={})


NAMES = [f"vit_{size}" for size in ("b_16", "b_32", "l_16", "l_32", "h_14")]
NAMES += [f"swin_{size}" for size in ("t", "s", "b", "v2_t", "v2_s", "v2_b")]
PUBLISHED = [weights for name in NAMES for weights in get_model_weights(name)]


@pytest.mark.parametrize("weights", PUBLISHED, ids=repr)
@pytest.mark.parametrize("size", [(300, 400), (641, 427)])
def test_preprocessing_is_torchvisions(weights, size):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (size[1] // 9, size[0] // 9, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size)
    transform = weights.transforms()
    ours = _preprocess(transform, None)(image)
    np.testing.assert_allclose(ours, transform(image), rtol=0, atol=1e-6)


def test_preprocessing_of_any_crop():
    for crop, resize in itertools.product(range(200, 520, 3), range(200, 600, 7)):
        if resize >= crop:
            transform = ImageClassification(crop_size=crop, resize_size=resize)
            assert math.floor(crop / _preprocess(transform, None).crop_pct) == resize


@pytest.mark.parametrize(
    "transform",
    [
        partial(ImageClassification, crop_size=224, resize_size=200),  # pads
        partial(ImageClassification, crop_size=224, interpolation=InterpolationMode.BOX),
        nn.Identity,
    ],
)
def test_other_preprocessing_is_refused(transform):
    with pytest.raises(ModelError, match="is not supported"):
        _preprocess(transform(), None)
