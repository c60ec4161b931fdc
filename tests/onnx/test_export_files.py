"""Exporting: what a file says of itself, how it is written, what is refused, and the command."""

import json
import logging
import warnings

import pytest
import torch
from architectures import (
    ARCHITECTURES,
    SIZE,
    TIMM,
    shaken,
)
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from typer.testing import CliRunner

import onnx
import vit_reciprocam as vr
from vit_reciprocam.cli import app
from vit_reciprocam.core.masks import Masking
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.onnx.contract import Metadata
from vit_reciprocam.onnx.export import trace
from vit_reciprocam.onnx.export.edit import chunk_size
from vit_reciprocam.onnx.export.export import export
from vit_reciprocam.pictures.preprocess import Preprocess

PREPROCESS = Preprocess(SIZE, crop_pct=1.0, mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.fixture(scope="module")
def model():
    return shaken(VisionTransformer(**TIMM))


def test_what_the_file_says(tmp_path, model):
    path = tmp_path / "model.onnx"
    done = export(
        model,
        path,
        class_names=list("abcde"),
        preprocess=PREPROCESS,
        name="small",
        kernel="dirac",
    )
    file = onnx.load(path)
    properties = {each.key: each.value for each in file.metadata_props}
    read = Metadata.from_properties(properties, file="model.onnx")
    assert read == done.metadata
    assert (read.name, read.masking, read.targets) == ("small", Masking("dirac"), "all")
    assert (read.class_names, read.preprocess) == (tuple("abcde"), PREPROCESS)
    assert read.versions["torch"].startswith(torch.__version__.partition("+")[0])
    assert {opset.domain: opset.version for opset in file.opset_import} == {"": 18}
    assert done.bytes == path.stat().st_size
    assert list(tmp_path.iterdir()) == [path]
    content = path.read_bytes()
    assert b".py" not in content
    assert str(tmp_path).encode() not in content


def test_class_names_do_not_flood_a_notebook():
    names = tuple(f"class {number}" for number in range(1000))
    shown = repr(Metadata("small", Masking(), "direct", class_names=names, versions={"a": "1"}))
    assert "name='small'" in shown
    assert len(shown) < 300


def test_only_standard_operators_also_in_loops(tmp_path):
    export(ARCHITECTURES["timm vit, mean pool"](), tmp_path / "model.onnx", size=SIZE)
    file = onnx.load(tmp_path / "model.onnx")
    nodes = list(file.graph.node)
    for node in nodes:
        nodes.extend(inner for each in node.attribute for inner in each.g.node)
    assert {node.domain for node in nodes} == {""}
    assert not file.functions
    assert sum(node.op_type == "Loop" for node in nodes) == 1


def test_an_interrupted_export_leaves_what_was_there(tmp_path, model, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_text("before")

    def interrupted(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr("vit_reciprocam.onnx.export.export.compare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(model, path, size=SIZE, external_data=True)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "before"


def test_a_graph_that_computes_something_else_is_not_kept(tmp_path, model, monkeypatch):
    real = trace.CONVOLUTION
    wrong = real._replace(unmasked=lambda *args: 1.01 * real.unmasked(*args))
    monkeypatch.setattr(trace, "CONVOLUTION", wrong)
    with pytest.raises(ModelError, match="logits differ from PyTorch's by"):
        export(model, tmp_path / "model.onnx", size=SIZE)
    assert not list(tmp_path.iterdir())


def state(model):
    """Return all that a module and the modules in it hold, hooks too."""
    held = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if not isinstance(value, (nn.Module, torch.Tensor)):
                held[name, key] = repr(value)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        held[name] = (tensor.dtype, tensor.requires_grad, tensor.grad, tensor.sum().item())
    return held


@pytest.mark.parametrize("name", ["timm dinov3 rotary", "timm vit, mean pool"])
def test_the_model_is_left_as_it_was(tmp_path, name, caplog, capsys):
    model = ARCHITECTURES[name]()
    model.train()
    model.blocks[0].requires_grad_(True)
    hook = model.patch_embed.register_forward_hook(lambda *_args: None)
    before = state(model)
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        export(model, tmp_path / "model.onnx", size=SIZE)
    assert state(model) == before
    assert model.training
    assert not caplog.records
    assert capsys.readouterr() == ("", "")
    hook.remove()


class Convolutions(nn.Module):
    def forward(self, images):
        return images.mean(dim=(2, 3))


def dropping():
    return VisionTransformer(**TIMM, proj_drop_rate=0.5).train()


def on_meta():
    with torch.device("meta"):
        return VisionTransformer(**TIMM)


def huge():
    model = VisionTransformer(**TIMM)
    with torch.no_grad():
        model.head.weight[0, 0] = 1e6
    return model


@pytest.mark.parametrize(
    ("build", "options", "error", "words"),
    [
        (Convolutions, {}, ModelError, "not a supported model"),
        (lambda: "timm:vit", {}, ModelError, r"torch.nn.Module or what .*load returns, got str"),
        (lambda: vr.load("demo"), {}, ModelError, "an ONNX file already"),
        (dropping, {}, ModelError, r"call model.eval\(\) first"),
        (on_meta, {}, ModelError, "meta device"),
        (huge, {"half": True}, ModelError, "exceed float16"),
        (None, {"size": None}, InputError, r"pass size=\(height, width\) or preprocess="),
        (None, {"size": (224, 224)}, InputError, "takes images of 12x20"),
        (None, {"size": (12, 0)}, InputError, "size must be"),
        (None, {"dynamic_size": True}, InputError, "cannot stay open: this model takes images of"),
        (None, {"kernel": "disk"}, InputError, "kernel must be one of"),
        (None, {"layer": "pool"}, InputError, "reads its class token"),
        (None, {"targets": "best"}, InputError, "targets of a file must be"),
        (None, {"targets": "top6"}, InputError, "'top6', but the model has 5 classes"),
        (None, {"opset": 16}, InputError, "opset must be between 17"),
        (None, {"opset": 99}, InputError, "opset must be between 17"),
        (None, {"class_names": ["a"]}, InputError, "1 class names given for a model of 5"),
    ],
)
def test_refused_before_it_begins(tmp_path, model, monkeypatch, build, options, error, words):
    monkeypatch.setattr(torch.onnx, "export", lambda *_a, **_k: pytest.fail("it began"))
    with pytest.raises(error, match=words):
        export(build() if build else model, tmp_path / "m.onnx", **{"size": SIZE} | options)
    assert not list(tmp_path.iterdir())


def test_refused_places(tmp_path, model):
    (tmp_path / "folder.onnx").mkdir()
    for name, words in (
        ("model.bin", "must end in .onnx"),
        ("none/model.onnx", "there is no folder"),
        ("folder.onnx", "is a folder"),
    ):
        with pytest.raises(InputError, match=words):
            export(model, tmp_path / name, size=SIZE)


def test_a_step_of_the_loop_takes_up_to_eight_masks_and_divides_their_number():
    assert [chunk_size(masks) for masks in (1, 8, 13, 15, 196)] == [1, 8, 1, 5, 7]


def test_a_loop_has_one_size(tmp_path):
    model = ARCHITECTURES["timm vit, mean pool"]()
    with pytest.raises(InputError, match="loop over the masks of one image size"):
        export(model, tmp_path / "model.onnx", size=SIZE, dynamic_size=True)


def command(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_the_command(tmp_path):
    path = tmp_path / "model.onnx"
    result = command("timm:test_vit", path, "--weights", "random", "--target", "top3", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["files"] == [str(path)]
    assert summary["bytes"] == path.stat().st_size
    assert summary["path"] == "closed-form"
    assert summary["outputs"] == ["logits", "saliency", "scores", "classes"]
    assert summary["settings"]["targets"] == "top3"
    assert summary["difference"] <= 1e-4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "100x"], "--size must be HEIGHTxWIDTH"),
        (["--opset", "9"], "opset must be between 17"),
        (["--size", "96x128"], "takes images of 224x224"),
        (["--dynamic-size"], "cannot stay open"),
    ],
)
def test_what_the_command_refuses(tmp_path, arguments, words):
    spec, path = "timm:deit_tiny_patch16_224", tmp_path / "model.onnx"
    result = command(spec, path, "--weights", "random", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not list(tmp_path.iterdir())
