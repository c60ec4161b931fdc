"""The layout as a rule: arrows go down, torch-free rooms stay torch-free, importing is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vit_reciprocam

SOURCE = Path(vit_reciprocam.__file__).parent

# Lowest first; a module may import from its own row or from rows above it in this list.
ROWS = [
    {"errors"},
    {"files", "maps", "masks", "metrics", "perturbation", "scenes", "targets", "render"},
    {"methods.null"},
    {"images", "evaluate.labels", "onnx.header"},
    {"presets", "onnx.sessions"},
    {"evaluate.layouts"},
    {"evaluate.datasets"},
    {"explanation", "protocols", "split", "onnx.metadata"},
    {"adapters.parts", "adapters.zero_shot", "closed_form", "onnx.runtime"},
    {"onnx.foreign.graph", "onnx.foreign.weights"},
    {"onnx.foreign.finding", "onnx.foreign.rounding", "onnx.plain"},
    {"onnx.foreign.attention"},
    {"onnx.foreign.layout"},
    {"onnx.foreign.tail"},
    {"onnx.foreign.reading"},
    {"onnx.foreign.branch"},
    {"onnx.foreign.masked", "onnx.foreign.outputs", "onnx.foreign.proof"},
    {"onnx.insert"},
    {
        "adapters.blocks",
        "adapters.by_target",
        "adapters.multihead",
        "adapters.pooling",
        "adapters.timm_blocks",
        "adapters.timm_families",
        "adapters.timm_stages",
        "adapters.transformers_families",
        "adapters.weights",
    },
    {"adapters.layers", "adapters.timm", "adapters.torchvision", "adapters.transformers"},
    {
        "adapters.layers_timm",
        "adapters.layers_torchvision",
        "adapters.layers_transformers",
        "adapters.open_clip",
    },
    {
        "adapters",
        "adapters.open_clip_hub",
        "adapters.timm_families",
        "adapters.timm_hub",
        "adapters.timm_stages",
        "adapters.torchvision_hub",
        "adapters.transformers_hub",
    },
    {"catalogue.parts"},
    {"catalogue.timm"},
    {"catalogue.open_clip", "catalogue.torchvision", "catalogue.transformers"},
    {"catalogue"},
    {"methods.lrp", "reciprocam", "onnx.convolved", "torch_metrics"},
    {"onnx.traced", "onnx.written"},
    {"onnx.export"},
    {"catalogue.checks", "methods.baselines", "methods.peers"},
    {"methods"},
    {"torch_model"},
    {"classifier"},
    {"calls"},
    {"benchmark"},
    {"evaluate.bootstrap", "evaluate.store"},
    {"evaluate.run", "evaluate.tables"},
    {"evaluate.gallery", "evaluate.plots", "evaluate.sheets"},
    {"evaluate.formats"},
    {"evaluate.report"},
    {"cli.parts"},
    {"cli.several"},
    {"cli.evaluate", "cli.explain", "cli.insert", "cli.models", "cli.report"},
    {"cli.benchmark", "cli.demo", "cli.export"},
    {"cli.reproduce"},
    {"cli"},
    {"__main__"},
]
NEEDS_TORCH = {
    "split",
    "closed_form",
    "adapters",
    "adapters.blocks",
    "adapters.by_target",
    "adapters.layers",
    "adapters.layers_timm",
    "adapters.layers_torchvision",
    "adapters.layers_transformers",
    "adapters.parts",
    "adapters.pooling",
    "adapters.timm",
    "adapters.timm_blocks",
    "adapters.timm_families",
    "adapters.timm_hub",
    "adapters.timm_stages",
    "adapters.multihead",
    "adapters.open_clip",
    "adapters.open_clip_hub",
    "adapters.torchvision",
    "adapters.torchvision_hub",
    "adapters.transformers",
    "adapters.transformers_families",
    "adapters.transformers_hub",
    "adapters.weights",
    "adapters.zero_shot",
    "catalogue",
    "catalogue.open_clip",
    "catalogue.parts",
    "catalogue.timm",
    "catalogue.torchvision",
    "catalogue.transformers",
    "methods.baselines",
    "catalogue.checks",
    "methods.lrp",
    "methods.peers",
    "reciprocam",
    "onnx.convolved",
    "onnx.export",
    "onnx.traced",
    "onnx.written",
    "torch_metrics",
    "torch_model",
}
HEAVY = {
    "torch",
    "timm",
    "torchvision",
    "transformers",
    "open_clip",
    "onnx",
    "onnxscript",
    "safetensors",
    "torchmetrics",
}
PACKAGES = {"", "evaluate", "onnx", "onnx.foreign"}  # hold no logic of their own


def modules():
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


MODULES = dict(modules())


def imports(path, *, top_level_only=False):
    """Names of the modules that a file imports, and of what it imports from them."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(name):
    """The module of ours that an import names, or None."""
    inner = name.removeprefix("vit_reciprocam").removeprefix(".")
    return inner if name.startswith("vit_reciprocam") and inner in MODULES and inner else None


def row_of(module):
    return next(number for number, row in enumerate(ROWS) if module in row)


def test_every_module_has_its_row():
    assert set(MODULES) - PACKAGES == set().union(*ROWS)


@pytest.mark.parametrize("module", sorted(set(MODULES) - PACKAGES))
def test_arrows_go_down(module):
    for name in filter(None, map(own, imports(MODULES[module]))):
        if name not in PACKAGES:
            assert row_of(name) <= row_of(module), f"{module} imports {name}, which lies above it"


@pytest.mark.parametrize("module", sorted(set(MODULES) - NEEDS_TORCH))
def test_torch_free_modules_import_nothing_heavy_at_the_top(module):
    allowed = {"onnx"} if module == "onnx.insert" or module.startswith("onnx.foreign.") else set()
    for name in imports(MODULES[module], top_level_only=True):
        assert name.partition(".")[0] not in HEAVY - allowed
        assert own(name) not in NEEDS_TORCH


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
        "vr.explain(vr.classifier.ASSETS / 'demo.png', vr.load('demo')).maps;"
        "print(sorted({m.partition('.')[0] for m in sys.modules}))"
    )
    assert set(ast.literal_eval(run(code))).isdisjoint(HEAVY)


def test_public_names_exist_and_are_all_there_is():
    for name in vit_reciprocam.__all__:
        assert getattr(vit_reciprocam, name) is not None
    assert sorted(vit_reciprocam.__all__) == dir(vit_reciprocam)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vit_reciprocam.nothing  # noqa: B018


@pytest.mark.parametrize("path", MODULES.values(), ids=MODULES)
def test_modules_stay_small(path):
    assert len(path.read_text().splitlines()) <= 400
