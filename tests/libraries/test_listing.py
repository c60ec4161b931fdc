"""The models that `vit-reciprocam models` finds in every library."""

import importlib.util
import json
from importlib.metadata import version

from typer.testing import CliRunner

from vit_reciprocam.cli import app
from vit_reciprocam.libraries.listing import architectures


def test_a_pattern_that_fits_nothing_says_where_it_was_looked_for(monkeypatch):
    def error(pattern):
        result = CliRunner().invoke(app, ["models", pattern])
        assert result.exit_code == 2
        return result.stderr

    assert error("torchvision:nothing*") == (
        "error: no model fits 'torchvision:nothing*'. "
        f"Searched: torchvision {version('torchvision')}\n"
    )
    for library in ("timm", "torchvision", "open_clip", "transformers"):
        assert f" {library} " in error("nosuch*")
    assert "'*vit_b*' fits" in error("vit_b")
    assert "'torchvision:*vit_b*' fits 2, such as torchvision:vit_b_16" in error(
        "torchvision:vit_b"
    )
    assert "before the colon stands one of timm, torchvision, open_clip, hf" in error("keras:vit*")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "open_clip" else found(name)
    )
    said = error("nosuch*")
    assert "not installed: open_clip, pip install 'vit-reciprocam[open-clip]'" in said
    assert "open_clip_torch" not in said.partition("not installed")[0]


def test_the_list_has_every_library():
    def listed(pattern):
        result = CliRunner().invoke(app, ["models", pattern, "--json"])
        return {row["model"]: (row["path"], row["why"]) for row in json.loads(result.stdout)}

    assert listed("torchvision:vit_b_*") == {
        "torchvision:vit_b_16": ("closed-form", ""),
        "torchvision:vit_b_32": ("closed-form", ""),
    }
    towers = listed("open_clip:ViT-B-32*")
    assert towers["open_clip:ViT-B-32"] == ("closed-form", "")
    assert towers["open_clip:ViT-B-32-SigLIP2-256"][0] == "direct"
    classes = listed("hf:*Dinov2*")
    assert set(classes) == {
        "hf:Dinov2ForImageClassification",
        "hf:Dinov2WithRegistersForImageClassification",
    }
    assert all(path == "direct" for path, _ in classes.values())
    assert listed("test_resnet") == {  # timm's, found by name only
        "timm:test_resnet": (
            "-",
            "it has no attention, which is where this method cuts",
        )
    }


def test_timm_s_transformers_are_listed_and_its_other_models_are_not():
    names = [one.spec.removeprefix("timm:") for one in architectures("timm:*") if one.listed]
    assert {"deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "crossvit_9_240"} <= set(names)
    assert "resnet50" not in names
    assert len(names) == len(set(names))
