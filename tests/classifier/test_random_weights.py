"""Models without trained weights."""

import open_clip
import pytest
import timm
import torch
import transformers

import vit_reciprocam as vr
from vit_reciprocam.benchmark.calls import FIXED
from vit_reciprocam.benchmark.measure import benchmark
from vit_reciprocam.errors import InputError, ModelError

SMALL = "timm:test_vit"


def test_random_weights_of_timm_and_torchvision():
    torch.manual_seed(0)
    expected = timm.create_model("test_vit")
    torch.manual_seed(0)
    fetched = vr.load(SMALL, weights="random")
    pairs = zip(expected.parameters(), fetched.model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert len(fetched.class_names) == 1000
    with pytest.raises(ModelError, match="not supported"):
        vr.load("timm:test_resnet", weights="random")
    vit = vr.load("torchvision:vit_b_32", weights="random", image_size=64, num_classes=3)
    assert (vit.preprocess.size, vit.num_classes, vit.class_names) == ((64, 64), 3, None)


def test_random_weights_of_open_clip(monkeypatch):
    real = open_clip.create_model

    def create(name, pretrained=None, **options):
        assert pretrained is None, "nothing is fetched"
        assert not options["load_weights"]
        return real(name, **options)

    monkeypatch.setattr(open_clip, "create_model", create)
    clf = vr.load("open_clip:ViT-B-32/openai", weights="random", prompts=["a cat", "a dog"])
    assert clf.class_names == ("a cat", "a dog")
    assert clf.preprocess.mean[0] == pytest.approx(0.48145466), "that of the tag"
    assert vr.load("open_clip:ViT-B-32", weights="random", prompts=["a"]).num_classes == 1
    with pytest.raises(ModelError, match="has no weights 'none'"):
        vr.load("open_clip:ViT-B-32/none", weights="random", prompts=["a"])


def test_random_weights_of_a_folder_without_any(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=24,
        image_size=64,
        patch_size=16,
        num_labels=4,
        architectures=["ViTForImageClassification"],
    )
    config.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    clf = vr.load(f"hf:{tmp_path}", weights="random")
    assert (clf.num_classes, clf.model.training) == (4, False)
    rows = benchmark([clf], [], rounds=1, warmup=1)
    assert [row.method for row in rows] == list(FIXED)
    with pytest.raises(InputError, match="give their folder"):
        vr.load(f"hf:{tmp_path}", weights="w.pth")
