"""Classifiers by their specs, and pictures explained by them."""

import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config

import vit_reciprocam as vr
from vit_reciprocam.classifier.load import ASSETS
from vit_reciprocam.errors import (
    DownloadError,
    ImageError,
    InputError,
    ModelError,
    UnknownClassError,
    WeightsError,
)

SMALL = "timm:test_vit"  # 1000 classes, 160 px, patches of 16


@pytest.fixture(scope="module")
def small_weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def small(small_weights):
    return vr.load(SMALL, weights=small_weights)


# --- loading ---------------------------------------------------------------------------------


def test_timm_model_comes_with_its_preprocessing_and_names(small, small_weights):
    assert not small.model.training
    state = load_file(small_weights)
    assert all(torch.equal(value, state[key]) for key, value in small.model.state_dict().items())
    assert len(small.class_names) == 1000
    assert small.class_names[281] == "tabby, tabby cat"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    transform = create_transform(**resolve_model_data_config(small.model))
    assert torch.equal(torch.from_numpy(small.preprocess(image)), transform(image))
    assert repr(small).startswith(
        "Classifier(name='timm:test_vit', preprocess=Preprocess(size=(160"
    )


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("levit_128s", (224, 224)),
        ("pvt_v2_b0", (224, 224)),
        ("swin_tiny_patch4_window7_224", (224, 224)),
        ("test_coatnet", (160, 160)),
    ],
)
def test_hierarchical_models_come_with_their_preprocessing(name, size):
    classifier = vr.load(f"timm:{name}", weights="random")
    assert classifier.preprocess.size == size
    assert vr.explain(ASSETS / "demo.png", classifier).path == "direct"


def test_image_size_is_an_option(small_weights):
    state = timm.create_model("test_vit", img_size=(96, 160)).state_dict()
    path = small_weights.with_name("wide.safetensors")
    save_file(state, path)
    clf = vr.load(SMALL, weights=path, img_size=(96, 160))
    assert clf.preprocess.size == (96, 160)
    e = vr.explain(ASSETS / "demo.png", clf)
    assert e.maps.shape == (1, 1, 6, 10)


@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_distilled_patch16_224"])
def test_weights_of_another_image_size_are_fitted_as_timm_does(tmp_path, name):
    source = timm.create_model(name, num_classes=7)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    overlay = {"file": str(tmp_path / "w.safetensors"), "num_classes": 7}
    expected = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, img_size=(96, 160)
    )
    clf = vr.load(f"timm:{name}", weights=tmp_path / "w.safetensors", img_size=(96, 160))
    assert not torch.equal(expected.pos_embed, source.pos_embed[:, : expected.pos_embed.shape[1]])
    for key, value in expected.state_dict().items():
        assert torch.equal(clf.model.state_dict()[key], value), key
    assert torch.equal(clf.model.head.weight, source.head.weight)
    assert "state_dict" not in clf.model.pretrained_cfg, "no second copy is kept"
    assert vr.explain(ASSETS / "demo.png", clf).maps.shape == (1, 1, 6, 10)


def test_pth_files_and_their_usual_wrappings(tmp_path, small_weights):
    state = load_file(small_weights)
    wrapped = {"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}
    torch.save(wrapped, tmp_path / "checkpoint.pth")
    model = vr.load(SMALL, weights=tmp_path / "checkpoint.pth").model
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_fine_tuned_weights_bring_their_number_of_classes(tmp_path):
    save_file(
        timm.create_model("test_vit", num_classes=7).state_dict(), tmp_path / "seven.safetensors"
    )
    clf = vr.load(SMALL, weights=tmp_path / "seven.safetensors")
    assert clf.model.num_classes == 7
    assert clf.class_names is None
    assert vr.explain(ASSETS / "demo.png", clf, targets=6).names == (("class 6",),)
    names = [f"kind {number}" for number in range(7)]
    named = vr.load(SMALL, weights=tmp_path / "seven.safetensors", class_names=names)
    assert vr.explain(ASSETS / "demo.png", named, targets="kind 6").targets.tolist() == [[6]]
    with pytest.raises(InputError, match="2 class names given for a model of 7 classes"):
        vr.load(SMALL, weights=tmp_path / "seven.safetensors", class_names=["a", "b"])


def test_fine_tuned_distilled_models(tmp_path):
    name = "deit_tiny_distilled_patch16_224"
    save_file(timm.create_model(name, num_classes=3).state_dict(), tmp_path / "d.safetensors")
    clf = vr.load(f"timm:{name}", weights=tmp_path / "d.safetensors")
    assert clf.num_classes == 3


def test_devices_and_tags_that_do_not_exist(small_weights):
    with pytest.raises(InputError, match="cannot go to device 'nowhere'"):
        vr.load(SMALL, weights=small_weights, device="nowhere")
    with pytest.raises(ModelError, match=r"cannot create 'test_vit.nope'"):
        vr.load("timm:test_vit.nope", weights=small_weights)


def test_weights_that_do_not_fit_name_their_keys(tmp_path, small_weights):
    state = load_file(small_weights)
    state["head.scale"] = state.pop("norm.bias")
    state["cls_token"] = torch.zeros(1, 1, 8)
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(WeightsError) as error:
        vr.load(SMALL, weights=tmp_path / "odd.safetensors")
    for words in (
        "1 missing (norm.bias)",
        "1 unknown (head.scale)",
        "1 of another shape (cls_token is (1, 1, 8), not (1, 1, 64))",
    ):
        assert words in str(error.value)


class Payload:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_weights_files_that_are_none(tmp_path, capsys):
    with pytest.raises(WeightsError, match="no such weights file"):
        vr.load(SMALL, weights=tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        vr.load(SMALL, weights=tmp_path / "text.safetensors")
    torch.save(Payload(), tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match="holds tensors only"):
        vr.load(SMALL, weights=tmp_path / "evil.pth")
    assert "never run" not in capsys.readouterr().out
    for content in ([1, 2], {0: torch.zeros(1)}):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(WeightsError, match="does not hold a state dict"):
            vr.load(SMALL, weights=tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("resnet", "model must be one of 'demo', 'timm:NAME', .*; got 'resnet'"),
        ("timm:", "model must be one of"),
        ("demo:x", "model must be one of"),
        (
            "timm:deit_tinny_patch16_224",
            r"has no model 'deit_tinny.*Closest: deit_tiny_patch16_224",
        ),
        ("timm:vit_small_patch16_36x1_224", "no published weights .*weights="),
    ],
)
def test_models_that_do_not_exist(spec, words):
    with pytest.raises(ModelError, match=words):
        vr.load(spec)


def test_a_model_without_attention_is_refused(tmp_path):
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "cnn.safetensors")
    with pytest.raises(ModelError, match="ResNet is not supported: it has no attention"):
        vr.load("timm:test_resnet", weights=tmp_path / "cnn.safetensors")


def test_no_network_says_what_to_do(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        DownloadError, match=r"could not be fetched: .*pass a local file: --weights"
    ):
        vr.load("timm:test_vit3.r160_in1k")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("test_resnet.r160_in1k", "it has no attention"),
        ("vit_small_patch14_dinov2", "no classif"),
    ],
)
def test_what_cannot_be_explained_is_refused_before_it_is_fetched(name, words):
    with pytest.raises(ModelError, match=words):
        vr.load(f"timm:{name}")


def test_demo_takes_no_options():
    with pytest.raises(InputError, match=r"has its own weights .* drop --weights"):
        vr.load("demo", weights="x.safetensors")


@pytest.mark.parametrize("use", ["vr.load('timm:test_vit')", "vr.ReciproCAM"])
def test_a_missing_extra_says_how_to_install_it(use):
    hide = "sys.modules['timm'] = sys.modules['torch'] = None"
    code = f"import sys, vit_reciprocam as vr; {hide}; {use}"
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "MissingDependencyError" in finished.stderr
    assert "pip install 'vit-reciprocam[torch]'" in finished.stderr


# --- explaining --------------------------------------------------------------------------------


def test_explain_equals_the_explainer_by_hand(small):
    e = vr.explain(ASSETS / "demo.png", small, top=2, kernel="dirac")
    with Image.open(ASSETS / "demo.png") as image:
        batch = torch.from_numpy(small.preprocess(image.convert("RGB")))[None]
    expected = vr.ReciproCAM(small.model, kernel="dirac")(batch, "all")
    assert e.targets[0].tolist() == np.argsort(-expected.logits[0], kind="stable")[:2].tolist()
    np.testing.assert_allclose(e.scores[0], expected.scores[0, e.targets[0]], rtol=1e-5)
    assert e.settings["kernel"] == "dirac"
    assert e.settings["model"] == "timm:test_vit"
    assert e.sources == (str(ASSETS / "demo.png"),)


def test_several_pictures_of_all_kinds(small):
    array = np.zeros((50, 70, 3), np.uint8)
    e = vr.explain([ASSETS / "demo.png", Image.new("RGB", (30, 30)), array], small)
    assert e.maps.shape == (3, 1, 10, 10)
    assert e.sources[1:] == ("image-1", "image-2")
    assert [picture.size[0] > 0 for picture in e.pictures] == [True] * 3


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("tabby", [281]),
        (3, [3]),
        (["tabby", 3, "tiger cat"], [281, 3, 282]),
        (["all"], list(range(1000))),
        ("all", list(range(1000))),
    ],
)
def test_targets_by_name_and_index(small, targets, expected):
    images = [Image.new("RGB", (30, 30)), Image.new("RGB", (30, 30), "red")]
    e = vr.explain(images, small, targets=targets)
    assert e.targets.tolist() == [expected, expected]


def test_the_most_probable_beside_named_classes(small):
    picture = Image.new("RGB", (30, 30), "red")
    ranked = np.argsort(-vr.explain(picture, small).logits[0], kind="stable").tolist()

    def chosen(targets):
        return vr.explain(picture, small, targets=targets).targets[0].tolist()

    assert chosen("top3") == chosen(" Top 3 ") == ranked[:3]
    assert chosen([ranked[4], "top2"]) == [ranked[4], *ranked[:2]]
    assert chosen(["top2", ranked[0]]) == [ranked[0], *ranked[1:3]], "top2 are two others"
    assert chosen([ranked[4], ranked[4], "top1"]) == [ranked[4], ranked[0]]
    with pytest.raises(InputError, match="pass targets='tabby'"):
        vr.explain(picture, small, target="tabby")
    assert vr.explain([picture] * 2, small, targets=["top2", "tabby"]).targets.shape == (2, 3)
    for targets in ("top0", ["tabby", "top1001"]):
        with pytest.raises(InputError, match="top must be between 1 and"):
            chosen(targets)
    with pytest.raises(InputError, match="target 'all' stands alone"):
        chosen(["tabby", "all"])


def test_targets_from_numpy_and_torch(small):
    picture = Image.new("RGB", (30, 30))
    first = vr.explain(picture, small, top=2)
    again = vr.explain(picture, small, targets=first.targets[0])
    np.testing.assert_array_equal(again.scores, first.scores)
    for targets in (np.int64(3), [np.int64(3)], torch.tensor(3), torch.tensor([3])):
        assert vr.explain(picture, small, targets=targets).targets.tolist() == [[3]]
    with pytest.raises(InputError, match="top or targets, not both"):
        vr.explain(picture, small, top=2, targets=3)
    with pytest.raises(InputError, match="targets is empty"):
        vr.explain(picture, small, targets=[])
    with pytest.raises(UnknownClassError, match="a name or an index, got float"):
        vr.explain(picture, small, targets=1.5)


def test_half_precision_models_take_pictures(small_weights):
    clf = vr.load(SMALL, weights=small_weights)
    clf.model.to(torch.bfloat16)
    assert vr.explain(Image.new("RGB", (30, 30)), clf).maps.dtype == np.float32


def test_explain_takes_what_load_returns(small):
    for classifier, kind in (("demo", "str"), (small.model, "VisionTransformer")):
        with pytest.raises(InputError, match=f"what vit_reciprocam.load returns.* got {kind}"):
            vr.explain(ASSETS / "demo.png", classifier)


@pytest.mark.parametrize("name", ["demo", "small"])
def test_misspelt_settings_are_listed(name, small):
    classifier = vr.load("demo") if name == "demo" else small
    with pytest.raises(InputError, match=r"a setting.* must be .*'kernel'.* got 'kernal'"):
        vr.explain(ASSETS / "demo.png", classifier, kernal="dirac")


def test_folders_and_globs_are_for_the_command_line(small, tmp_path):
    with pytest.raises(ImageError, match=r"is a folder: .*pass a list of files, such as sorted"):
        vr.explain(tmp_path, small)
    with pytest.raises(ImageError, match=r"no such file: .*\*\.jpg: globs are for the command"):
        vr.explain(tmp_path / "*.jpg", small)


def test_the_map_lies_on_the_crop_of_the_whole_picture(small):
    whole = Image.new("RGB", (300, 100), "red")
    e = vr.explain(whole, small)
    drawn = np.asarray(e.overlay(0, picture=whole))
    changed = np.argwhere((drawn != (255, 0, 0)).any(axis=-1))
    assert drawn.shape == (100, 300, 3)
    left, top, right, bottom = small.preprocess.box(whole)
    assert changed.min(axis=0).tolist() == [top, left]
    assert changed.max(axis=0).tolist() == [bottom - 1, right - 1]


def test_explain_refuses_bad_input(small, tmp_path):
    picture = Image.new("RGB", (30, 30))
    with pytest.raises(UnknownClassError, match="no class is called 'cats'"):
        vr.explain(picture, small, targets="cats")
    with pytest.raises(UnknownClassError, match="class 1000 does not exist"):
        vr.explain(picture, small, targets=1000)
    with pytest.raises(ImageError, match="no such file"):
        vr.explain(tmp_path / "none.jpg", small)
    with pytest.raises(InputError, match="images is empty"):
        vr.explain([], small)
    with pytest.raises(InputError, match="kernel must be one of"):
        vr.explain(picture, small, kernel="disk")
    with pytest.raises(InputError, match="top must be between 1 and the number of classes, 1000"):
        vr.explain(picture, small, top=0)


# --- real weights ------------------------------------------------------------------------------


def test_deit_tiny_names_real_photographs(deit_tiny_weights, shared_data):
    """The model is right on 79 % of the 500 photographs; half of them come close to that."""
    import csv

    clf = vr.load("timm:deit_tiny_patch16_224", weights=deit_tiny_weights)
    folder = shared_data / "imagenet-samples"
    with (folder / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[::2]
    right = 0
    for start in range(0, len(rows), 25):
        chunk = rows[start : start + 25]
        e = vr.explain([folder / row["image"] for row in chunk], clf)
        right += sum(
            int(t) == int(row["label"]) for t, row in zip(e.targets[:, 0], chunk, strict=True)
        )
    assert 0.72 <= right / len(rows) <= 0.86


def test_two_classes_in_one_photograph_have_two_maps(deit_tiny_weights, shared_data):
    """The dog sits above the cat, so the peak of its map must be above the cat's."""
    clf = vr.load("timm:deit_tiny_patch16_224", weights=deit_tiny_weights)
    e = vr.explain(
        shared_data / "multi-object" / "catdog.png", clf, targets=["bull mastiff", "tiger cat"]
    )
    peaks = [np.unravel_index(one.argmax(), one.shape) for one in e.maps[0]]
    assert peaks[0][0] < 7 <= peaks[1][0]
