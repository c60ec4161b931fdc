"""What the docs say is so: links lead somewhere, commands and options exist, examples run."""

import dataclasses
import doctest
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import typer
from PIL import Image
from safetensors.torch import save_file

import vit_reciprocam as vr
from vit_reciprocam import reciprocam
from vit_reciprocam.classifier.load import ASSETS
from vit_reciprocam.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "src").rglob("README.md")]
)
COMMAND = typer.main.get_command(app)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page):
    text = page.read_text()
    for name, rest in re.findall(r"^ *`{0,3}vit-reciprocam ([a-z]+)(.*)$", text, re.MULTILINE):
        options = {
            option
            for parameter in COMMAND.commands[name].params
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        assert set(re.findall(r"--[a-z-]+", rest)) <= options, name
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"^ *make (\w+)", text, re.MULTILINE):
        assert target in targets
    for script in re.findall(r"python (tools/\S+\.py)", text):
        assert (ROOT / script).exists()


def test_the_examples_in_the_readme_run(tmp_path, monkeypatch):
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "small.safetensors")
    Image.new("RGB", (64, 48), "orange").save(tmp_path / "cat_and_dog.jpg")
    real_create, real_load = timm.create_model, vr.load
    monkeypatch.chdir(tmp_path)

    def create(name, *, pretrained=False, **options):
        return real_create("test_vit" if pretrained else name, **options)

    def local(spec):
        assert spec.startswith("timm:")
        return real_load("timm:test_vit", weights="small.safetensors")

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(vr, "load", local, raising=False)
    text = (ROOT / "README.md").read_text()
    from_file, own_model, beyond = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}  # each block runs as it is printed
    exec(from_file, names)
    assert (tmp_path / "out" / "manifest.json").exists()
    assert names["e"].targets.shape == (1, 3)
    names = {}
    exec(own_model, names)
    assert names["e"].targets.shape == (1, 1000)
    given = dataclasses.replace(
        names["e"], class_names=["a"] * 1000, pictures=[Image.new("L", (9, 9))]
    )
    assert given.overlay(0).size == (9, 9)
    exec(beyond, names | {"clf": real_load("timm:test_vit", weights="small.safetensors")})
    exec(beyond.partition("vr.explain")[0], names)
    assert names["e"].evidence.shape == (1, 1, 10, 10)


def test_the_adapter_in_the_docs_runs():
    text = (ROOT / "docs" / "adapters.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(block, names)
    assert (names["e"].maps.shape, names["e"].path) == ((1, 1, 10, 10), "direct")
    images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    expected = vr.ReciproCAM(names["model"]).scores(images, [3, 7])
    torch.testing.assert_close(names["explainer"].scores(images, [3, 7]), expected)


def test_the_examples_in_docstrings_run():
    result = doctest.testmod(reciprocam)
    assert result.attempted >= 4
    assert result.failed == 0


@pytest.mark.parametrize("name", sorted(set(vr.__all__) - {"__version__"}))
def test_public_names_say_what_they_are(name):
    thing = getattr(vr, name)
    if name == "METHODS":
        assert all(inspect.getdoc(method) for method in thing.values())
        return
    assert inspect.getdoc(thing)
    for method, function in inspect.getmembers(thing, inspect.isfunction):
        if not method.startswith("_"):
            assert inspect.getdoc(function), f"{name}.{method}"


def test_the_picture_in_the_readme_is_what_the_demo_writes():
    e = vr.explain(ASSETS / "demo.png", vr.load("demo"), top=3)
    with Image.open(ROOT / "docs" / "demo.png") as shown:
        difference = np.asarray(shown).astype(int) - np.asarray(e.grid())
    assert np.abs(difference).mean() < 1
