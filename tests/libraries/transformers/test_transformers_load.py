"""transformers' models from folders and the hub: weights, class names and preprocessing."""

import json
import logging

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import vit_reciprocam as vr
from tiny_transformers import SQUARE, TEXT, VISION
from vit_reciprocam.errors import (
    DownloadError,
    InputError,
    ModelError,
    WeightsError,
)
from vit_reciprocam.libraries.transformers.load import load_transformers
from vit_reciprocam.reciprocam import ReciproCAM


def photo(height=213, width=301):
    """Return a picture with edges, gradients and texture, as a photograph has."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = np.sin(40 * x * y)[..., None] * [1, 0.5, -1] * 40
    disc = ((x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.05)[..., None] * [90, -60, 30]
    noise = np.random.default_rng(0).normal(0, 8, (height, width, 3))
    values = 120 + waves + disc + noise + 60 * np.stack([x, y, x - y], axis=-1)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


@pytest.fixture(autouse=True)
def _no_progress_bars():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def save(folder, model, processor=None, **changes):
    model.save_pretrained(folder)
    processor = processor or transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(folder)


def tiny_vit(**config):
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SQUARE | config)).eval()


def test_load_from_a_folder(tmp_path):
    labels = {0: "ant", 1: "bee", 2: "cat", 3: "dog", 4: "eel"}
    model = tiny_vit(id2label=labels)
    loaded, preprocess, names = load_transformers(save(tmp_path, model), options={})
    assert names == ("ant", "bee", "cat", "dog", "eel")
    assert not loaded.training
    batch = torch.from_numpy(preprocess(photo()))[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(batch).logits, model(batch).logits)
    assert ReciproCAM(loaded)(batch).path == "closed-form"


def test_load_without_names_and_with_options(tmp_path):
    folder = save(tmp_path, tiny_vit().half())
    loaded, _, names = load_transformers(folder, options={"attn_implementation": "eager"})
    assert names is None
    assert loaded.dtype == torch.float32
    assert loaded.config._attn_implementation == "eager"
    assert load_transformers(folder, options={"dtype": torch.float16})[0].dtype == torch.float16


def test_load_by_spec_and_explain(tmp_path):
    labels = {0: "ant", 1: "bee", 2: "cat", 3: "dog", 4: "eel"}
    folder = save(tmp_path, tiny_vit(id2label=labels))
    classifier = vr.load(f"hf:{folder}")
    e = vr.explain(photo(), classifier, top=2)
    assert (e.maps.shape, e.path, classifier.num_classes) == ((1, 2, 4, 4), "closed-form", 5)
    assert e.class_names == tuple(labels.values())
    with pytest.raises(InputError, match="give their folder: hf:FOLDER"):
        vr.load(f"hf:{folder}", weights="x.safetensors")
    with pytest.raises(ModelError, match="prompts"):
        vr.load(f"hf:{folder}", prompts=["ant"])


def test_load_prompts_by_spec_and_explain(tmp_path):
    classifier = vr.load(f"hf:{clip_folder(tmp_path)[0]}", prompts=["a", "b"], templates=["{} a"])
    e = vr.explain(photo(), classifier, targets="all")
    assert (e.maps.shape, e.class_names) == ((1, 2, 4, 4), ("a", "b"))


def clip_folder(folder):
    letters = {"a</w>": 0, "b</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3, "!": 4}
    (folder / "vocab.json").write_text(json.dumps(letters))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token="!"
    )
    tokenizer.save_pretrained(folder)
    text = TEXT | {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    return save(folder, model, transformers.CLIPImageProcessor(**size)), model, tokenizer


def test_load_with_prompts(tmp_path):
    folder, model, tokenizer = clip_folder(tmp_path)
    prompts = ["a", "b a"]
    classifier, preprocess, names = load_transformers(folder, prompts=prompts, options={})
    assert names == ("a", "b a")
    batch = torch.from_numpy(preprocess(photo()))[None]
    with torch.no_grad():
        texts = tokenizer(prompts, padding=True, return_tensors="pt")
        wanted = model(pixel_values=batch, **texts).logits_per_image
        torch.testing.assert_close(classifier(batch), wanted)
    assert ReciproCAM(classifier)(batch).path == "closed-form"
    with pytest.raises(ModelError, match="has no classes of its own: pass prompts"):
        load_transformers(folder, options={})


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("ViTImageProcessor", {"size": {"height": 24, "width": 32}}),
        ("ViTImageProcessor", {"size": {"height": 16, "width": 16}, "resample": 3}),
        ("ViTImageProcessor", {"do_normalize": False}),
        ("DeiTImageProcessor", {}),
        ("DeiTImageProcessor", {"size": {"height": 47, "width": 47}, "crop_size": 23}),
        ("CLIPImageProcessor", {}),
        ("BitImageProcessor", {"size": {"shortest_edge": 256}, "crop_size": 224}),
        ("SiglipImageProcessor", {"size": {"height": 32, "width": 32}}),
        ("BeitImageProcessor", {}),
    ],
)
def test_preprocess_is_the_processor_s(tmp_path, kind, changes, backend):
    own = getattr(transformers, kind + ("Pil" if backend == "pil" else ""))(**changes)
    folder = save(tmp_path, tiny_vit(), own)
    _, preprocess, _ = load_transformers(folder, options={})
    picture = photo(212, 300)
    wanted = own(images=picture, return_tensors="pt")["pixel_values"][0].numpy()
    ours = preprocess(picture)
    assert ours.shape == wanted.shape
    levels = np.abs(ours - wanted) * 255 * np.array(preprocess.std)[:, None, None]
    # torchvision rounds differently from Pillow, by a level or two of 255
    assert levels.max() < (1e-3 if backend == "pil" else 2.5)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("CLIPImageProcessor", {"do_center_crop": False}, "crops to"),
        ("DeiTImageProcessor", {"size": {"height": 8, "width": 8}}, "and crops to"),
        ("ViTImageProcessor", {"resample": 4}, "another filter"),
        ("ViTImageProcessor", {"rescale_factor": 1 / 127.5}, "does more than resize"),
        ("ViTImageProcessor", {"do_resize": False}, "does more than resize"),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}, "crops to nothing"),
    ],
)
def test_refused_preprocessing(tmp_path, kind, changes, words):
    folder = save(tmp_path, tiny_vit(), getattr(transformers, kind)(**changes))
    with pytest.raises(ModelError, match=f"the preprocessing of .* {kind}, is not .*{words}"):
        load_transformers(folder, options={})


def test_refused_folders(tmp_path):
    def folder(name, model, **changes):
        (tmp_path / name).mkdir()
        return save(tmp_path / name, model, **changes)

    vit = folder("vit", tiny_vit())
    headless = folder("head", tiny_vit().vit, architectures=["ViTForImageClassification"])
    with pytest.raises(ModelError, match="takes no prompts"):
        load_transformers(vit, prompts=["a"], options={})
    with pytest.raises(ModelError, match="ViTModel has no classification head"):
        load_transformers(folder("bare", tiny_vit().vit), options={})
    with pytest.raises(WeightsError, match=r"no weights for classifier\.bias, classifier\.weight"):
        load_transformers(headless, options={})
    with pytest.raises(ModelError, match="saved as OfMyOwn, which transformers"):
        load_transformers(folder("own", tiny_vit(), architectures=["OfMyOwn"]), options={})
    with pytest.raises(WeightsError, match="no such folder"):
        load_transformers(str(tmp_path / "nothing"), options={})
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"the Config cannot be read from folder .*empty"):
        load_transformers(str(tmp_path / "empty"), options={})
    (tmp_path / "vit" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(WeightsError, match="the ViTForImageClassification cannot be read"):
        load_transformers(vit, options={})
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    with pytest.raises(WeightsError, match="the ImageProcessor cannot be read"):
        load_transformers(vit, options={})


def test_without_network(caplog):
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(DownloadError, match=r"'google/none' could not be fetched: .* local folder"),
    ):
        load_transformers("google/none", options={"local_files_only": True})
    assert not caplog.records
