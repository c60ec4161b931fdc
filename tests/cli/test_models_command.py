"""The list of models that can be explained."""

import json
import sys

from typer.testing import CliRunner

from vit_reciprocam.cli import app
from vit_reciprocam.libraries import listing


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_models_says_by_which_path_and_why_not():
    rows = json.loads(run("models", "*deit_tiny*", "--json").stdout)
    paths = {row["model"]: row["path"] for row in rows}
    assert paths["timm:deit_tiny_distilled_patch16_224"] == "closed-form"
    assert "demo" not in paths
    rows = json.loads(run("models", "test_*", "--json").stdout)
    by_name = {row["model"]: row for row in rows}
    assert by_name["timm:test_resnet"]["path"] == "-"
    assert "it has no attention" in by_name["timm:test_resnet"]["why"]
    assert by_name["timm:test_vit"]["path"] == "closed-form"
    (pooled,) = json.loads(run("models", "vit_base_patch16_gap_224", "--json").stdout)
    assert pooled["path"] == "direct"
    assert "global_pool='avg'" in pooled["why"]
    (demo,) = json.loads(run("models", "demo", "--json").stdout)
    assert demo["path"] == "closed-form"


def test_models_cuts_no_name_and_says_a_reason_once(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    names = ["a" * 60, "b", "c", "d", "e", "f"]
    why = {"a" * 60: ("closed-form", ""), "b": ("direct", "it pools")}
    found = [listing.Architecture(f"timm:{name}", None) for name in names]
    monkeypatch.setattr(listing, "architectures", lambda pattern: found)
    monkeypatch.setattr(
        listing,
        "describe",
        lambda one: why.get(one.spec.removeprefix("timm:"), ("-", "it is none")),
    )
    printed = run("models", "z*").stdout
    assert printed.count("a") >= 60
    assert "…" in printed, "of many names of one reason some are shown"
    assert "direct, 1: it pools\n    timm:b" in printed
    assert "not supported, 4: it is none\n    timm:c, timm:d, timm:e, …" in printed
    assert len(json.loads(run("models", "z*", "--json").stdout)) == 6


def test_models_without_a_wildcard_or_without_torch(monkeypatch):
    result = run("models", "deit_tiny")
    assert result.exit_code == 2
    assert "'*deit_tiny*' fits 2, such as timm:deit_tiny_" in result.stderr

    monkeypatch.setitem(sys.modules, listing.__name__, None)  # as where torch is not installed
    assert run("models", "deit*").exit_code == 2
    printed = run("models")
    assert printed.exit_code == 0
    assert "demo" in printed.stdout
    assert "[torch]" in printed.stderr


def test_the_check_says_where_it_went():
    result = run("models", "deit*", "--check")
    assert result.exit_code == 2
    assert "run python tools/check_models.py 'PATTERN' in a clone" in result.stderr
