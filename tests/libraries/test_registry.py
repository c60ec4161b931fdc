"""A fifth library is one folder: what its record says is found everywhere, and nowhere else."""

import ast
import dataclasses
import importlib
import json
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import vit_reciprocam as vr
from vit_reciprocam import ReciproCAM, libraries
from vit_reciprocam.classifier.load import specs
from vit_reciprocam.cli import app
from vit_reciprocam.errors import InputError, MissingDependencyError, ModelError
from vit_reciprocam.libraries import LIBRARIES, find_libraries, library_of
from vit_reciprocam.libraries.dispatch import split_model
from vit_reciprocam.libraries.library import Library, import_on_call
from vit_reciprocam.libraries.listing import Architecture, nothing_fits
from vit_reciprocam.libraries.timm.split import split as split_timm
from vit_reciprocam.results.files import library_versions

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "vit_reciprocam"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# A library of somebody else's: patches of 4x4 pixels, a class token, one block, a head.
TOYLIB = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.mix = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        y = self.norm(x)
        return x + self.mix(y, y, y, need_weights=False)[0]


class ToyViT(nn.Module):

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 4, stride=4)
        self.token = nn.Parameter(torch.ones(1, 1, 6))
        self.block = Block()
        self.head = nn.Linear(6, 3)

    def forward(self, images):
        patches = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(images), -1, -1), patches], dim=1)
        return self.head(self.block(x)[:, 0])
"""

# The folder that makes it known: what a contributor writes.
RECORD = """
from vit_reciprocam.libraries.library import Library, import_on_call

LIBRARY = Library(
    spec="toy:NAME",
    module="toylib",
    package="toy-lib",
    extra="toys",
    split=import_on_call(f"{__name__}.models:split"),
    load=import_on_call(f"{__name__}.models:load"),
    listing=import_on_call(f"{__name__}.models:architectures"),
)
"""
MODELS = """
import toylib
import torch
from vit_reciprocam.core.split import Cut, Split, Tap
from vit_reciprocam.errors import ModelError
from vit_reciprocam.libraries.common.loading import Architecture
from vit_reciprocam.libraries.common.running import find_call
from vit_reciprocam.pictures.preprocess import Preprocess


def split(model, *, block=-1, pool=False, depth=1):
    tap = Tap((model.block.norm,))

    def cut(images):
        (x,), _ = find_call(model, model.block, images)

        def rest(normed, x):
            with tap.replaced(normed):
                return model.head(model.block(x)[:, 0])

        grid = images.shape[2] // 4, images.shape[3] // 4
        return Cut(grid, x, model.block.norm, rest)

    return Split(cut, prefix_tokens=1, block=model.block, tap=tap, direct_because="it is a toy")


def load(name, *, weights, options):
    if name != "tiny":
        raise ModelError(f"toylib has no model {name!r}")
    torch.manual_seed(0)
    preprocess = Preprocess((12, 16), mean=(0.5,) * 3, std=(0.5,) * 3)
    return toylib.ToyViT(**options).eval(), preprocess, ("ant", "bee", "cat")


def architectures():
    yield Architecture("toy:tiny", toylib.ToyViT)
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The record of a folder "toy", beside the others' folders."""
    (tmp_path / "toylib.py").write_text(TOYLIB)
    about = tmp_path / "toy_lib-1.2.3.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-lib\nVersion: 1.2.3\n")
    folder = tmp_path / "folders" / "toy"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(RECORD)
    (folder / "models.py").write_text(MODELS)
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(libraries, "__path__", [*libraries.__path__, str(folder.parent)])
    record = find_libraries()["toy"]
    monkeypatch.setitem(LIBRARIES, "toy", record)
    yield record
    for name in set(sys.modules) - before:
        if "toy" in name:
            del sys.modules[name]
    del libraries.toy


def picture():
    return np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)


def test_a_folder_with_a_record_is_all_a_library_needs(toy):
    assert [*find_libraries()] == ["timm", "torchvision", "open_clip", "hf", "toy"]
    assert "toylib" not in sys.modules, "a record must not import its library"


def test_a_fifth_library_is_loaded_and_explained(toy):
    classifier = vr.load("toy:tiny")
    assert (classifier.num_classes, classifier.class_names) == (3, ("ant", "bee", "cat"))
    e = vr.explain(picture(), classifier, targets="all")
    assert (e.maps.shape, e.path) == ((1, 3, 3, 4), "direct")
    assert e.class_names == ("ant", "bee", "cat")
    with pytest.raises(ModelError, match="toylib has no model 'huge'"):
        vr.load("toy:huge")


def test_its_scores_are_those_of_whole_forward_passes(toy):
    import toylib

    torch.manual_seed(0)
    model, images = toylib.ToyViT().eval(), torch.randn(1, 3, 12, 16)
    found = ReciproCAM(model, kernel="dirac")(images, targets=1)
    assert (found.scores.shape, found.path) == ((1, 1, 3, 4), "direct")
    for patch in (0, 7, 11):

        def keep_one(_module, _inputs, normed, patch=patch):
            kept = torch.zeros_like(normed)
            kept[:, [0, 1 + patch]] = normed[:, [0, 1 + patch]]  # and the class token
            return kept

        hook = model.block.norm.register_forward_hook(keep_one)
        with torch.no_grad():
            expected = model(images).softmax(dim=1)[0, 1]
        hook.remove()
        assert found.scores[0, 0].flat[patch] == pytest.approx(expected.item(), abs=1e-6)


def test_the_command_lists_it(toy):
    result = CliRunner().invoke(app, ["models", "toy:*", "--json"])
    assert json.loads(result.stdout) == [
        {"model": "toy:tiny", "path": "direct", "why": "it is a toy"}
    ]
    assert str(nothing_fits("toy:big")) == "no model fits 'toy:big'. Searched: toylib 1.2.3"
    assert "'toy:*tin*' fits 1, such as toy:tiny" in str(nothing_fits("toy:tin"))
    assert "before the colon stands one of timm, torchvision, open_clip, hf, toy" in str(
        nothing_fits("keras:*")
    )


def test_versions_and_errors_name_it(toy):
    assert library_versions()["toy-lib"] == "1.2.3"
    assert "toy:NAME" in specs()
    with pytest.raises(ModelError, match=r"model must be one of .*'hf:ID', 'toy:NAME', "):
        vr.load("toy")
    with pytest.raises(InputError, match="prompts are for open_clip: and hf:"):
        vr.load("toy:tiny", prompts=["an ant"])
    with pytest.raises(ModelError, match="torchvision, open_clip, transformers and toylib"):
        split_model(nn.Linear(2, 2))
    model = vr.load("toy:tiny").model
    with pytest.raises(ModelError, match=r"It holds toylib's ToyViT at \.0: pass model\.0, or"):
        split_model(nn.Sequential(model))


def test_a_library_that_is_not_installed_is_named_with_its_extra(toy, tmp_path):
    (tmp_path / "toylib.py").unlink()
    importlib.invalidate_caches()
    with pytest.raises(MissingDependencyError, match=r"model 'toy:tiny' needs .*\[toys\]"):
        vr.load("toy:tiny")
    assert not toy.is_installed()
    assert "not installed: toylib, pip install 'vit-reciprocam[toys]'" in str(
        nothing_fits("toy:tiny")
    )


def test_a_record_alone_will_do(monkeypatch):
    class Mine(nn.Sequential):
        pass

    def split(model, **options):
        return split_timm(model[0], **options)

    record = Library("mine:NAME", Mine.__module__, "mine", "torch", split, None, None)
    with pytest.raises(ModelError, match="is not a supported model"):
        split_model(Mine(nn.Identity()))
    monkeypatch.setitem(LIBRARIES, "mine", record)
    assert library_of(Mine()) is record
    model = vr.load("timm:test_vit", weights="random").model
    assert split_model(Mine(model)).block is model.blocks[-1]


def test_a_derived_class_is_of_the_first_library_above_it():
    timm, torchvision = LIBRARIES["timm"].module, LIBRARIES["torchvision"].module
    own = type("Own", (), {"__module__": "mine"})
    ours = type("Ours", (), {"__module__": f"{timm}.models"})
    theirs = type("Theirs", (), {"__module__": f"{torchvision}.models"})
    assert library_of(type("A", (own, ours, theirs), {"__module__": "mine"})()).prefix == "timm"
    assert library_of(type("B", (own, theirs), {"__module__": "mine"})()).prefix == "torchvision"
    assert library_of(own()) is None
    assert library_of(type("C", (), {"__module__": "timm_of_mine"})()) is None


def test_a_function_is_imported_when_it_is_called():
    missing = import_on_call("vit_reciprocam.no_such_module:function")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        missing()
    assert import_on_call("operator:add")(2, 3) == 5


@pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)
def test_every_record_names_functions_that_are_there(library):
    assert library.is_installed()
    assert library.package in library_versions()
    extras = PROJECT["project"]["optional-dependencies"]
    assert library.extra in extras
    assert any(one.startswith(library.package) for one in extras[library.extra])
    next(iter(library.listing()))
    with pytest.raises(ModelError):  # and not an error of the import
        library.load("no such model", weights=None, options={}, **texts(library))
    for function in (library.split, library.split_tower, library.encoder):
        if function is not None:
            with pytest.raises(ModelError):
                function(nn.Identity())


def texts(library):
    return {"prompts": ["a"]} if library.prefix == "open_clip" else {}


FOLDERS = [path.parent.name for path in (SOURCE / "libraries").glob("*/__init__.py")]


def test_no_module_outside_libraries_names_a_folder_of_one():
    records = [name for name in FOLDERS if name != "common"]
    assert len(records) == len(LIBRARIES)
    for path in SOURCE.rglob("*.py"):
        if not path.is_relative_to(SOURCE / "libraries"):
            text = path.read_text()
            for name in records:
                assert f"libraries.{name}" not in text, f"{path} names libraries.{name}"
    for path in (SOURCE / "libraries").glob("*.py"):  # nor what is above the folders
        for name in records:
            assert f"libraries.{name}" not in path.read_text(), f"{path} names libraries.{name}"


def test_the_wheel_holds_no_checking_of_architectures():
    targets = PROJECT["tool"]["hatch"]["build"]["targets"]
    assert targets["wheel"] == {"packages": ["src/vit_reciprocam"]}

    def public(path):
        tree = ast.parse(path.read_text())
        names = {node.name for node in tree.body if hasattr(node, "name")}
        return {name for name in names if not name.startswith("_")}

    tools = [ROOT / "tools" / name for name in ("check_models.py", "small_models.py")]
    checking = set().union(*map(public, tools))
    assert {"check", "report", "find_candidates"} <= checking
    assert not checking & set().union(*map(public, (SOURCE / "libraries").rglob("*.py")))
    assert {field.name for field in dataclasses.fields(Architecture)} == {"spec", "build", "listed"}
    assert not any("FlopCounterMode" in path.read_text() for path in SOURCE.rglob("*.py"))
