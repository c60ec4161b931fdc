"""What tests share: tiny seeded models, the data beside the repository, and `--core-only`."""

import functools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from dependencies import ROOT, TOOLS, beyond_core

# Modules in whose signatures shapes are checked while tests run. `reciprocam` is left out, since
# tests give it bad input.
SHAPES_CHECKED = [
    f"vit_reciprocam.{name}"
    for name in (
        "core.closed_form",
        "core.direct",
        "core.split",
        "core.stencil",
        "libraries.common.split",
        "libraries.common.multihead",
        "libraries.timm.blocks",
        "libraries.timm.last_block",
        "libraries.transformers.blocks",
        "methods.lrp",
        "onnx.export.attention",
    )
]
SHARED = Path(__file__).parents[2] / "shared" / "data"

# The model families of the method: names are test ids, values are what differs from a plain ViT.
MODELS = {
    "plain": {},
    "registers": {"reg_tokens": 3},
    "distilled": {"distilled": True},
    "qk_norm": {"qk_norm": True},
    "layer_scale": {"init_values": 0.5},
    "no_qkv_bias": {"qkv_bias": False},
    "clip": {"pre_norm": True, "norm_layer": "layernorm"},
    "scale_norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "deit3": {"no_embed_class": True, "init_values": 1e-1},
    "one_block": {"depth": 1},
    "all_at_once": {"reg_tokens": 2, "qk_norm": True, "init_values": 0.3, "pre_norm": True},
}


def pytest_addoption(parser):
    parser.addoption(
        "--core-only",
        action="store_true",
        help="Tests that need nothing but the package without extras, and pytest.",
    )


def pytest_configure(config):
    if not config.getoption("--core-only"):
        from jaxtyping import install_import_hook

        install_import_hook(SHAPES_CHECKED, "beartype.beartype")


def pytest_ignore_collect(collection_path, config):
    """With `--core-only`, leave out files that import more than the core."""
    if config.getoption("--core-only") and collection_path.suffix == ".py":
        return bool(beyond_core(collection_path)) or None
    return None  # pytest decides


def pytest_collection_modifyitems(config, items):
    if config.getoption("--core-only"):
        for item in items:
            if item.get_closest_marker("needs_extras"):
                item.add_marker(pytest.mark.skip(reason="needs libraries beyond the core"))


def pytest_terminal_summary(terminalreporter, config):
    """Say which files `--core-only` left out, and why."""
    if config.getoption("--core-only"):
        for path in sorted((ROOT / "tests").rglob("test_*.py")):
            if more := beyond_core(path):
                name = path.relative_to(ROOT).as_posix()
                terminalreporter.write_line(f"left out: {name}, which needs {', '.join(more)}")


def tiny_model(*, grid=(2, 3), seed=0, distilled=False, spread=0.3, **options):
    """A seeded ViT with patches of 4 pixels whose weights are large enough for masks to matter."""
    import torch
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    cls = VisionTransformerDistilled if distilled else VisionTransformer
    settings = {
        "img_size": (4 * grid[0], 4 * grid[1]),
        "patch_size": 4,
        "embed_dim": 12,
        "depth": 2,
        "num_heads": 3,
        "num_classes": 5,
    }
    model = cls(**(settings | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += spread * torch.randn_like(parameter)
    return model


def tiny_images(grid=(2, 3), count=2, seed=1):
    import torch

    return torch.randn(
        count, 3, 4 * grid[0], 4 * grid[1], generator=torch.Generator().manual_seed(seed)
    )


@pytest.fixture(scope="session")
def demo_torch_model():
    """The PyTorch model that the bundled demo file was exported from."""
    from safetensors.torch import load_file
    from timm.models.vision_transformer import VisionTransformer

    from train_demo import ARCHITECTURE

    model = VisionTransformer(**ARCHITECTURE).eval()
    model.load_state_dict(load_file(TOOLS / "demo.safetensors"))
    return model


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real weights and photographs that lies beside the repository."""
    if not SHARED.is_dir():
        if os.environ.get("VIT_RECIPROCAM_REQUIRE_DATA"):
            pytest.fail(f"VIT_RECIPROCAM_REQUIRE_DATA is set, but there is no {SHARED}")
        pytest.skip(f"needs the shared data in {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def chromium():
    """The path of a Chromium or Chrome, for tests that open a page."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    if os.environ.get("VIT_RECIPROCAM_REQUIRE_DATA"):
        pytest.fail("VIT_RECIPROCAM_REQUIRE_DATA is set, but there is no Chromium")
    pytest.skip("needs Chromium or Chrome")


@pytest.fixture(scope="session")
def deit_tiny_weights(shared_data):
    return shared_data / "models" / "deit_tiny_patch16_224" / "model.safetensors"


@pytest.fixture(scope="session")
def reference_images(shared_data):
    """The eight reference crops, preprocessed, and their labels."""
    import torch

    with np.load(shared_data / "reference" / "chefer2021.npz") as data:
        pixels, labels = data["pixels"], data["label"]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images - mean[:, None, None]) / std[:, None, None], labels


@pytest.fixture(scope="session")
def source_of(tmp_path_factory):
    """Names of a model and of a writer, as in `exporters` -> the ONNX file that it writes."""
    import exporters

    folder = tmp_path_factory.mktemp("sources")

    @functools.cache
    def write(name, writer):
        path = folder / f"{name}-{writer}.onnx".replace(" ", "-")
        exporters.WRITERS[writer](exporters.build(name), exporters.pictures(name), path)
        return path

    return write
