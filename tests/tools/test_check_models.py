"""The check of architectures, and whether docs/models.md says what the code does."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import check_models as checks
import small_models
from vit_reciprocam.errors import ModelError
from vit_reciprocam.libraries.listing import architectures
from vit_reciprocam.libraries.transformers.families import FAMILIES

TABLE = Path(__file__).parents[2] / "docs" / "models.md"
SAMPLE = [
    "timm:test_vit",
    "timm:test_vit2",
    "timm:test_vit3",
    "timm:test_vit_relpos",
    "timm:beit_base_patch16_224",
    "timm:cait_xxs24_224",
    "timm:deit_tiny_distilled_patch16_224",
    "timm:eva02_tiny_patch14_336",
    "timm:naflexvit_base_patch16_gap",
    "timm:vit_base_patch16_rope_224",
    "timm:vit_base_patch16_rpn_224",
    "timm:vit_base_patch16_sapiens2",
    "timm:vit_base_patch16_xp_224",
    "timm:vit_dpwee_patch16_reg1_gap_256",
    "timm:vit_relpos_base_patch16_cls_224",
    "timm:vit_small_patch16_18x2_224",
    "timm:vit_small_r26_s32_224",
    # others: each layout of tokens and each kind of tap
    "timm:crossvit_9_240",
    "timm:efficientvit_m0",
    "timm:gcvit_xxtiny",
    "timm:hiera_tiny_224",
    "timm:levit_128s",
    "timm:pit_ti_distilled_224",
    "timm:swinv2_cr_tiny_224",
    "timm:test_coatnet",
    "timm:tiny_vit_5m_224",
    "timm:swin_large_patch4_window7_224",
    "hf:BeitForImageClassification(use_mean_pooling=False)",
    "hf:DeiTForImageClassificationWithTeacher",
    "hf:Dinov2ForImageClassification",
    "hf:PvtForImageClassification",
    "hf:SiglipModel",
    "hf:Siglip2ForImageClassification",
    "hf:Swinv2ForImageClassification",
    "open_clip:MobileCLIP-B",
    "open_clip:RN50",
    "open_clip:ViT-B-32",
    "torchvision:maxvit_t",
    "torchvision:vit_b_32",
]


def documented():
    """Spec -> path, cost, what was compared and status, of the table of names."""
    cells = [line.strip("| ").split(" | ") for line in TABLE.read_text().splitlines()]
    return {row[0].strip("`"): row[1:] for row in cells if row[0].startswith("`")}


def one(spec):
    (candidate,) = [found for found in small_models.find_candidates(spec) if found.spec == spec]
    return candidate


@pytest.mark.filterwarnings("ignore")  # the libraries' own builders warn
@pytest.mark.parametrize("spec", SAMPLE)
def test_the_table_says_what_the_code_does(spec):
    found = checks.check(one(spec))
    path, cost, compared, status = documented()[spec]
    assert (found.path, found.compared) == (path, compared), found.reason
    said, _, reason = status.removesuffix(", with a head").partition(": ")
    assert (found.status, found.status == "refused" and found.reason) == (said, reason or False)
    assert found.status in ("equal", "refused")
    if found.cost is not None:
        assert found.cost == pytest.approx(float(cost), abs=0.02)


def test_the_table_has_every_name():
    libraries = ("timm", "torchvision", "open_clip_torch", "transformers")
    text = " ".join(TABLE.read_text().split())
    for library in libraries:
        if f"{library} {version(library)}," not in text:
            pytest.skip(f"the table was made with another {library} than {version(library)}")
    everything = list(architectures())
    names = documented()
    assert {one.spec for one in everything if one.listed} <= set(names)
    assert set(names) <= {one.spec for one in everything}
    failed = [name for name, row in names.items() if not row[-1].startswith(("equal", "refused:"))]
    assert not failed


def test_every_family_of_transformers_is_in_the_catalogue():
    specs = {one.spec for one in architectures("hf:*")}
    assert {f"hf:{family}" for family in FAMILIES} <= specs
    for family in FAMILIES:
        one(f"hf:{family}").small()


def test_a_wrong_map_is_found(monkeypatch):
    monkeypatch.setattr(checks, "mask_matrix", lambda *args, **kwargs: 1 - MASKS(*args, **kwargs))
    result = CliRunner().invoke(checks.app, ["test_vit"])
    assert "DIFFERENT" in result.output
    assert result.exit_code == 1


@torch.no_grad()
def without_head(model):
    model.head.weight.zero_()
    return model.eval()


def test_masks_that_make_no_difference_prove_nothing(monkeypatch):
    monkeypatch.setattr(checks, "_shake", without_head)
    monkeypatch.setattr(checks, "mask_matrix", lambda *args, **kwargs: 1 - MASKS(*args, **kwargs))
    found = checks.check(one("timm:test_vit"))  # wrong masks, and no logit tells
    assert (found.status, found.error) == ("unproven", None)
    assert "| closed-form: masks make no difference to its logits |" in checks.report([found])
    result = CliRunner().invoke(checks.app, ["test_vit"])
    assert "unproven" in result.output
    assert result.exit_code == 1


def test_a_head_of_zeros_is_shaken_awake():
    plain = one("timm:test_vit")

    def small():
        model, images = plain.small()
        return without_head(model), images

    zeroed = small_models.Candidate("timm:zeroed", plain.whole, small)
    assert checks.check(zeroed).status == "equal"  # and not "unproven"


def test_what_float32_cannot_tell_float64_can(monkeypatch):
    monkeypatch.setattr(checks, "_TOLERANCE", 1e-9)
    found = checks.check(one("timm:test_vit"))
    assert (found.status, found.compared) == ("equal", "cut, 12 masks")


def test_one_that_cannot_be_built_does_not_end_the_check(monkeypatch, tmp_path):
    def fail():
        raise RuntimeError("no such thing")

    broken = small_models.Candidate("timm:broken", fail, fail)
    monkeypatch.setattr(checks, "find_candidates", lambda _pattern: [broken])
    table = tmp_path / "models.md"
    result = CliRunner().invoke(checks.app, ["--out", str(table)])
    assert result.exit_code == 1
    assert "| `timm:broken` | - |  |  | failed |" in table.read_text()
    assert f"timm {version('timm')}" in table.read_text()


def test_a_small_model_of_another_kind_is_no_proof():
    whole, other = one("timm:test_vit").whole, one("timm:test_vit2").small
    found = checks.check(small_models.Candidate("timm:mixed", whole, other))
    assert found.status == "failed"
    assert "another kind" in found.reason


def test_what_is_refused_before_it_is_built():
    def refuse():
        raise ModelError("timm's Odd is not supported: it is odd. Supported are all others")

    found = checks.check(small_models.Candidate("timm:odd", refuse, refuse, listed=False))
    assert (found.status, found.path, found.reason) == ("refused", "-", "it is odd")
    report = checks.report([found])
    assert "| timm | others | 1 | it is odd |" in report
    assert "`timm:odd`" not in report


def test_a_pattern_that_fits_nothing_says_where_it_was_looked_for():
    def error(pattern):
        result = CliRunner().invoke(checks.app, [pattern])
        assert result.exit_code == 2
        return result.stderr

    assert error("torchvision:nothing*") == (
        "error: no model fits 'torchvision:nothing*'. "
        f"Searched: torchvision {version('torchvision')}\n"
    )
    assert "'*vit_b*' fits" in error("vit_b")
    assert "before the colon stands one of timm, torchvision, open_clip, hf" in error("keras:vit*")


def test_ctrl_c_before_anything_is_measured(monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(checks, "check", interrupted)
    result = CliRunner().invoke(checks.app, ["test_vit", "--out", str(tmp_path / "m.md")])
    assert (result.exit_code, result.stderr) == (130, "stopped: nothing is written\n")
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_as_json():
    result = CliRunner().invoke(checks.app, ["timm:test_vit", "--json"])
    assert result.exit_code == 0
    (row,) = json.loads(result.stdout)
    assert (row["spec"], row["path"], row["status"]) == ("timm:test_vit", "closed-form", "equal")


MASKS = checks.mask_matrix
