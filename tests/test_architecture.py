"""The house as a drawing: arrows go down, no loops, torch-free rooms, cheap imports, true names."""

import ast
import fnmatch
import functools
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import vit_reciprocam

SOURCE = Path(vit_reciprocam.__file__).parent

# The rooms, lowest first: a module imports from its own room and from the rows above it in this
# list, never from another room of its row.
ROWS = [
    {"errors"},
    {"core"},
    {"pictures"},
    {"libraries"},
    {"results"},
    {"reciprocam"},
    {"methods"},
    {"onnx"},
    {"classifier"},
    {"benchmark", "evaluate"},
    {"cli"},
    {"__main__"},
]
# What may load PyTorch when it is imported; everything else runs without it, also the records of
# the libraries, which stand in the __init__ of each folder.
NEEDS_TORCH = {
    "core.split",
    "core.closed_form",
    "core.direct",
    "core.own_queries",
    "core.precision",
    "core.scores",
    "core.seen",
    "core.stencil",
    "libraries.*.*",
    "libraries.cut_at",
    "libraries.dispatch",
    "libraries.listing",
    "libraries.validation",
    "reciprocam",
    "methods.baselines",
    "methods.lrp",
    "methods.peers",
    "methods.trace",
    "onnx.export.*",
    "classifier.torch_backend",
}
# What may load the package onnx, beside what may load PyTorch: it changes graphs.
NEEDS_ONNX = {"onnx.insert.*"}
HEAVY = {
    "torch",
    "timm",
    "torchvision",
    "transformers",
    "open_clip",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "safetensors",
}


def modules():
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


MODULES = {name: path for name, path in modules() if name}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imports(module, *, top_level_only=False):
    """(module, name or None) of everything that a module imports."""
    tree = TREES[module]
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole, None) if own(whole) else (node.module, alias.name)


def own(name):
    """The module of ours that a dotted name means, or None."""
    inner = name.removeprefix("vit_reciprocam.")
    return inner if inner != name and inner in MODULES else None


@functools.cache
def arrows(module, top_level_only=False):
    found = (own(name) for name, _ in imports(module, top_level_only=top_level_only))
    return {name for name in found if name and name != module}


def room(module):
    return module.partition(".")[0]


def row_of(module):
    return next(number for number, row in enumerate(ROWS) if room(module) in row)


def test_every_room_is_drawn():
    assert {room(module) for module in MODULES} == set().union(*ROWS)
    assert len(ROWS) <= 14


def test_the_house_has_few_rooms():
    entries = {path.name for path in SOURCE.iterdir() if path.name != "__pycache__"}
    assert len(entries) <= 16, sorted(entries)


@pytest.mark.parametrize("module", MODULES)
def test_arrows_go_down(module):
    for name in arrows(module):
        if room(name) != room(module):
            assert row_of(name) < row_of(module), f"{module} imports {name}, which lies above it"


def test_imports_are_absolute_and_name_their_module():
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module} imports by a relative name"
                if node.module == "vit_reciprocam" and module != "__main__":
                    names = {alias.name for alias in node.names}
                    assert all(own(f"vit_reciprocam.{name}") for name in names), (module, names)


def test_no_module_imports_itself_by_a_detour():
    for module in MODULES:
        seen, ahead = set(), list(arrows(module))
        while ahead:
            name = ahead.pop()
            if name not in seen:
                seen.add(name)
                ahead += arrows(name)
        assert module not in seen, f"{module} is in a loop of imports"


@pytest.mark.needs_extras
@pytest.mark.parametrize("module", MODULES)
def test_what_another_module_imports_is_in_all(module):
    for name, item in imports(module):
        if item and (there := own(name)):
            public = getattr(importlib.import_module(name), "__all__", ())
            assert item in public, f"{module} imports {item}, which {there}.__all__ lacks"


@pytest.mark.needs_extras
@pytest.mark.parametrize("module", sorted(set(MODULES) - {"__main__"}))
def test_all_names_what_is_there(module):
    here = importlib.import_module(f"vit_reciprocam.{module}")
    public = getattr(here, "__all__", ())
    assert len(set(public)) == len(public)
    for name in public:
        assert hasattr(here, name), f"{module}.__all__ names {name}, which is not there"


def matches(module, patterns):
    return any(fnmatch.fnmatchcase(module, pattern) for pattern in patterns)


def needs_torch(module):
    return matches(module, NEEDS_TORCH)


@pytest.mark.parametrize("module", [module for module in MODULES if not needs_torch(module)])
def test_torch_free_modules_reach_nothing_heavy(module):
    allowed = {"onnx", "onnx_ir"} if matches(module, NEEDS_ONNX) else set()
    for name, _ in imports(module, top_level_only=True):
        assert name.partition(".")[0] not in HEAVY - allowed
    for name in arrows(module, top_level_only=True):
        assert not needs_torch(name), f"{module} imports {name}, which needs torch"


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, vit_reciprocam; print(sorted({m.partition('.')[0] for m in sys.modules}))"
    loaded = set(ast.literal_eval(run(code)))
    assert loaded.isdisjoint(HEAVY | {"onnxruntime", "numpy", "PIL", "typer", "rich"})


def test_the_demo_model_loads_no_torch():
    code = (
        "import sys, vit_reciprocam as vr; from vit_reciprocam import cli;"
        "from vit_reciprocam.classifier.load import ASSETS;"
        "vr.explain(ASSETS / 'demo.png', vr.load('demo')).maps;"
        "print(sorted({m.partition('.')[0] for m in sys.modules}))"
    )
    assert set(ast.literal_eval(run(code))).isdisjoint(HEAVY)


@pytest.mark.needs_extras
def test_public_names_exist_and_are_all_there_is():
    for name in vit_reciprocam.__all__:
        assert getattr(vit_reciprocam, name) is not None
    assert sorted(vit_reciprocam.__all__) == dir(vit_reciprocam)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vit_reciprocam.nothing  # noqa: B018


@pytest.mark.parametrize("path", MODULES.values(), ids=MODULES)
def test_modules_stay_small(path):
    assert len(path.read_text().splitlines()) <= 400
