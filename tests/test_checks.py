"""The check of architectures, and whether docs/models.md says what the code does."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from vit_reciprocam import checks
from vit_reciprocam.cli import app

TABLE = Path(__file__).parents[1] / "docs" / "models.md"
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
    "open_clip:RN50",
    "open_clip:ViT-B-32",
    "torchvision:vit_b_32",
]


def documented():
    """Spec -> path, cost and status of the second table."""
    cells = [line.strip("| ").split(" | ") for line in TABLE.read_text().splitlines()]
    return {row[0].strip("`"): row[1:] for row in cells if row[0].startswith("`")}


@pytest.mark.filterwarnings("ignore")  # of the libraries' own builders
@pytest.mark.parametrize("spec", SAMPLE)
def test_the_table_says_what_the_code_does(spec):
    (architecture,) = checks.architectures(spec)
    one = checks.check(architecture)
    path, cost, status = documented()[spec]
    assert (one.path, one.status) == (path, status), one.reason
    assert one.status in ("equal", "refused")
    if one.cost is not None:
        assert one.cost == pytest.approx(float(cost), abs=0.02)


def test_a_wrong_map_is_found(monkeypatch):
    monkeypatch.setattr(checks, "mask_matrix", lambda *args, **kwargs: 1 - MASKS(*args, **kwargs))
    result = CliRunner().invoke(app, ["models", "--check", "test_vit"])
    assert "DIFFERENT" in result.output
    assert result.exit_code == 1


def test_one_that_cannot_be_built_does_not_end_the_check(monkeypatch, tmp_path):
    def fail():
        raise RuntimeError("no such thing")

    broken = checks.Architecture("timm:broken", fail, fail)
    monkeypatch.setattr(checks, "architectures", lambda _pattern: [broken])
    table = tmp_path / "models.md"
    result = CliRunner().invoke(app, ["models", "--check", "--out", str(table)])
    assert result.exit_code == 1
    assert "| `timm:broken` | - |  | failed |" in table.read_text()


def test_a_pattern_that_fits_nothing():
    result = CliRunner().invoke(app, ["models", "--check", "resnet*"])
    assert result.exit_code == 2
    assert "no architecture" in result.output


MASKS = checks.mask_matrix
