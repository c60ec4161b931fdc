"""open_clip's models by name: weights, tags and preprocessing."""

import itertools
import json

import numpy as np
import pytest
import torch
from open_clip import factory, pretrained
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file

import vit_reciprocam as vr
from conftest import tiny_images
from tiny_open_clip import GRID, PROMPTS, TEXT, VISION, tokenize
from vit_reciprocam import ReciproCAM
from vit_reciprocam.errors import (
    DownloadError,
    InputError,
    ModelError,
    WeightsError,
)
from vit_reciprocam.libraries.open_clip import load as hub

HEAD = {"resize_mode": "squash", "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}


@pytest.fixture
def tiny_name(monkeypatch):
    """Register a tiny model with open_clip that has two tags."""
    config = {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT}
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", config)
    gelu = {"hf_hub": "nobody/nothing/", "quick_gelu": True}
    tags = {"mine": {"hf_hub": "nobody/nothing/", **HEAD}, "old": gelu}
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny", tags)
    return "tiny"


def save(path, **options):
    torch.manual_seed(0)
    model = CLIP(8, CLIPVisionCfg(**VISION), CLIPTextCfg(**TEXT), **options).eval()
    if path.suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    return model


def join(name, tag):
    return f"{name}/{tag}" if tag else name


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("tag", [None, "mine", "old"])
def test_local_weights(tiny_name, tmp_path, tag, suffix):
    path = tmp_path / f"weights{suffix}"
    model = save(path, quick_gelu=tag == "old")
    shot, preprocess, names = hub.load_open_clip(
        join(tiny_name, tag), prompts=PROMPTS, weights=path, options={}
    )
    images = tiny_images((4, 4))
    with torch.no_grad():
        torch.testing.assert_close(shot(images), model.get_logits(images, tokenize(PROMPTS))[0])
    assert names == tuple(PROMPTS)
    assert not any(module.training for module in shot.tower.modules())
    assert (preprocess.size, preprocess.crop_pct) == ((16, 16), 1.0)
    assert preprocess.resize == ("squash" if tag == "mine" else "shortest")
    assert preprocess.mean[0] == (0.5 if tag == "mine" else 0.48145466)
    assert ReciproCAM(shot)(images).path == "closed-form"


def test_load_by_spec_and_explain(tiny_name, tmp_path):
    path = tmp_path / "weights.safetensors"
    save(path, quick_gelu=True)
    spec = f"open_clip:{tiny_name}/old"
    classifier = vr.load(spec, weights=path, prompts=PROMPTS)
    e = vr.explain(np.zeros((20, 30, 3), np.uint8), classifier, targets="all")
    assert (e.maps.shape, e.path) == ((1, len(PROMPTS), 4, 4), "closed-form")
    assert e.class_names == tuple(PROMPTS)
    with pytest.raises(InputError, match="give its classes with prompts="):
        vr.load(spec)


def test_published_weights(tiny_name, tmp_path, monkeypatch):
    model = save(tmp_path / "weights.pt", quick_gelu=True)
    fetched = str(tmp_path / "weights.pt")
    monkeypatch.setattr(factory, "download_pretrained", lambda config, cache_dir: fetched)
    shot, _, _ = hub.load_open_clip(join(tiny_name, "old"), prompts=PROMPTS, options={})
    images = tiny_images((4, 4))
    with torch.no_grad():
        torch.testing.assert_close(shot(images), model.get_logits(images, tokenize(PROMPTS))[0])


def test_a_folder_of_ones_own(tmp_path):
    config = {
        "model_cfg": {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT},
        "preprocess_cfg": HEAD,
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    model = save(tmp_path / "open_clip_model.safetensors")
    name = f"local-dir:{tmp_path}"
    shot, preprocess, _ = hub.load_open_clip(
        name, prompts=["dog"], templates=["a {}"], options={"force_image_size": (8, 12)}
    )
    assert preprocess.size == (8, 12)
    assert preprocess.resize == "squash"
    assert shot.scale == pytest.approx(model.logit_scale.exp().item())
    assert ReciproCAM(shot)(tiny_images(GRID)).maps.shape == (2, 1, *GRID)
    with pytest.raises(ModelError, match="has weights of its own"):
        hub.load_open_clip(name, prompts=["dog"], weights="x.pt", options={})


@pytest.mark.parametrize(
    ("name", "tag", "options", "words"),
    [
        ("ViT-B-33", "openai", {}, r"no model 'ViT-B-33'\. Closest: ViT-B-32"),
        ("RN50", "openai", {}, "ModifiedResNet is not supported"),
        ("ViT-B-32", "mine", {}, r"no weights 'mine' for 'ViT-B-32': it publishes openai, "),
        ("ViT-B-32", None, {}, r"needs a tag for 'ViT-B-32': it publishes openai, "),
        ("coca_base", None, {}, "it publishes none"),
        ("tiny", "mine", {"colour": 3}, r"(?s)cannot create 'tiny' with options .*colour"),
    ],
)
def test_names_that_cannot_be_loaded(tiny_name, monkeypatch, tmp_path, name, tag, options, words):
    save(tmp_path / "weights.pt")
    fetched = str(tmp_path / "weights.pt")
    monkeypatch.setattr(factory, "download_pretrained", lambda config, cache_dir: fetched)
    with pytest.raises(ModelError, match=words):
        hub.load_open_clip(join(name, tag), prompts=PROMPTS, options=options)


def test_no_network_says_what_to_do(tiny_name, monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name, words in [
        (tiny_name, "the weights of 'tiny' could not be fetched: .*pass a local file"),
        ("ViT-B-16-SigLIP", "the tokenizer of 'ViT-B-16-SigLIP' could not be fetched: "),
        ("hf-hub:nobody/nothing", "the configuration of 'hf-hub:nobody/nothing' could not be"),
    ]:
        tag = {"tiny": "mine", "ViT-B-16-SigLIP": "webli"}.get(name)
        with pytest.raises(DownloadError, match=words):
            hub.load_open_clip(join(name, tag), prompts=PROMPTS, options={})


def test_local_weights_that_do_not_fit(tiny_name, tmp_path):
    torch.save({"logit_scale": torch.zeros(())}, tmp_path / "few.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for file, words in [
        ("few.pt", "few.pt does not fit 'tiny': .*Missing key"),
        ("broken.safetensors", "broken.safetensors does not fit"),
        ("none.pt", "no such weights file"),
    ]:
        with pytest.raises(WeightsError, match=words):
            hub.load_open_clip(tiny_name, prompts=PROMPTS, weights=tmp_path / file, options={})


CONFIGS = [
    {"size": size, "resize_mode": resize, "interpolation": interpolation, "mean": mean}
    for size, resize, interpolation, mean in itertools.product(
        [24, (24, 24), (16, 40), (40, 16)],
        ["shortest", "squash"],
        ["bicubic", "bilinear", "random"],
        [0.5, (0.1, 0.2, 0.3)],
    )
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(map(str, config.values())))
def test_preprocessing_is_open_clips(config):
    pixels = np.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=np.uint8)
    config = PreprocessCfg(**config)
    ours = hub._preprocess(vars(config))
    for size in [(80, 60), (41, 97)]:
        image = Image.fromarray(pixels).resize(size)
        expected = image_transform_v2(config, is_train=False)(image)
        np.testing.assert_allclose(ours(image), expected, rtol=0, atol=1e-6)


def test_padding_is_refused():
    with pytest.raises(ModelError, match="resize mode 'longest' is not supported"):
        hub._preprocess(vars(PreprocessCfg(resize_mode="longest")))
