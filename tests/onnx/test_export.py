"""Exported files: what two runtimes make of them, what they say of themselves, what is refused."""

import copy
import json
import logging
import subprocess
import sys
import warnings

import numpy as np
import onnxruntime
import open_clip
import openvino
import pytest
import timm
import torch
import torchvision
import transformers
from safetensors.torch import save_file
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from typer.testing import CliRunner

import onnx
import vit_reciprocam as vr
from conftest import tiny_images, tiny_model
from reference import naive_logits
from vit_reciprocam import ReciproCAM
from vit_reciprocam.cli import app
from vit_reciprocam.core.masks import Masking
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.libraries.common.zero_shot import ZeroShot
from vit_reciprocam.onnx.contract import Metadata
from vit_reciprocam.onnx.export import trace
from vit_reciprocam.onnx.export.export import export, export_prediction
from vit_reciprocam.pictures.preprocess import Preprocess

SIZE = (12, 20)
TIMM = {
    "img_size": SIZE,
    "patch_size": 4,
    "embed_dim": 12,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 5,
}
TRANSFORMERS = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 24,
}
TORCHVISION = {
    "image_size": 16,
    "patch_size": 4,
    "num_layers": 2,
    "num_heads": 3,
    "hidden_dim": 12,
    "mlp_dim": 24,
    "num_classes": 5,
}


def shaken(model, spread=0.3):
    """Weights large enough for masks to matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += spread * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def of_transformers(kind, **options):
    cls = getattr(transformers, f"{kind}ForImageClassification")
    return shaken(cls(cls.config_class(**TRANSFORMERS, num_labels=5, **options)))


def zero_shot(tower, width=8):
    prompts = torch.randn(4, width, generator=torch.Generator().manual_seed(2))
    return ZeroShot(tower, prompts, scale=3.0)


def of_clip():
    config = transformers.CLIPVisionConfig(**TRANSFORMERS, projection_dim=8)
    model = shaken(transformers.CLIPVisionModelWithProjection(config))
    return zero_shot(model)


def of_open_clip():
    settings = {"width": 12, "layers": 2, "heads": 3, "mlp_ratio": 2, "output_dim": 8}
    return zero_shot(
        shaken(open_clip.transformer.VisionTransformer(image_size=16, patch_size=4, **settings))
    )


def eva(**options):
    rotary = {"use_abs_pos_emb": False, "use_rot_pos_emb": True, "global_pool": "token"}
    return shaken(Eva(**TIMM | rotary | options))


def swin():
    settings = {"embed_dim": 6, "depths": (1, 2), "num_heads": (1, 3), "window_size": 2}
    return shaken(SwinTransformer(img_size=16, patch_size=2, num_classes=5, **settings))


ARCHITECTURES = {
    "timm vit": lambda: shaken(VisionTransformer(**TIMM)),
    "timm deit distilled": lambda: tiny_model(grid=(3, 5), distilled=True),
    "timm dinov2 registers": lambda: shaken(
        VisionTransformer(**TIMM, reg_tokens=4, init_values=0.5, no_embed_class=True)
    ),
    "timm dinov3 rotary": lambda: eva(rope_type="dinov3", rope_rotate_half=True, num_reg_tokens=2),
    "timm eva rotary, key bias": lambda: eva(attn_type="rope", qk_norm=True),
    "timm beit relative bias": lambda: shaken(
        Beit(**TIMM, global_pool="token", use_rel_pos_bias=True)
    ),
    "timm cait": lambda: shaken(Cait(**TIMM)),
    "timm vit, attention pool": lambda: shaken(
        VisionTransformer(**TIMM, global_pool="map", class_token=False)
    ),
    "timm vit, mean pool": lambda: shaken(VisionTransformer(**TIMM, global_pool="avg")),
    "timm swin": swin,
    "transformers vit": lambda: of_transformers("ViT"),
    "transformers dinov2": lambda: of_transformers("Dinov2", layerscale_value=0.5),
    "transformers beit": lambda: of_transformers(
        "Beit", use_relative_position_bias=True, use_mean_pooling=False
    ),
    "transformers clip zero-shot": of_clip,
    "torchvision vit": lambda: shaken(torchvision.models.VisionTransformer(**TORCHVISION)),
    "open_clip zero-shot": of_open_clip,
}
DIRECT = {"timm vit, attention pool", "timm vit, mean pool", "timm swin", "transformers dinov2"}


def size_of(name):
    small = name == "timm swin" or not name.startswith("timm")
    return (16, 16) if small else SIZE


def images_of(count, size):
    return tiny_images((size[0] // 4, size[1] // 4), count=count)


def onnx_runtime(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda **feeds: dict(zip(names, session.run(None, feeds), strict=True))


def open_vino(path):
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda **feeds: {
        name: value for output, value in compiled(feeds).to_dict().items() for name in output.names
    }


def near(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * abs(wanted).max())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_two_runtimes_agree_with_pytorch_for_any_batch(tmp_path, name):
    model, size = ARCHITECTURES[name](), size_of(name)
    path = tmp_path / "model.onnx"
    done = export(model, path, size=size)
    assert done.metadata.path == ("direct" if name in DIRECT else "closed-form")
    onnx.checker.check_model(path, full_check=True)
    images = images_of(5, size)
    exact = ReciproCAM(copy.deepcopy(model).double())(images.double(), "all")
    assert np.ptp(exact.scores, axis=(2, 3)).max() > 1e-3, "the masks do not matter"
    for run in (onnx_runtime(path), open_vino(path)):
        for start, stop in ((0, 1), (1, 3), (2, 5), (0, 5)):
            got = run(images=images[start:stop].numpy())
            near(got["logits"], exact.logits[start:stop])
            near(got["scores"], exact.scores[start:stop])
            # scaling to [0, 1] enlarges the rounding of scores that lie close together
            spread = np.ptp(exact.scores[start:stop], axis=(2, 3), keepdims=True)
            error = abs(got["saliency"] - exact.maps[start:stop])
            assert (error <= np.maximum(1e-4, 2e-6 / spread)).all(), error.max()


@pytest.fixture(scope="module")
def model():
    return shaken(VisionTransformer(**TIMM))


PREPROCESS = Preprocess(SIZE, crop_pct=1.0, mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel": "dirac", "layer": "block"},
        {"class_token": False, "opset": 17},
        {"class_token": False, "layer": "block", "opset": 21},
    ],
)
def test_settings_are_those_of_the_naive_loops(tmp_path, model, settings):
    export(model, tmp_path / "model.onnx", size=SIZE, **settings)
    masking = {"kernel": "gaussian", "class_token": True, "layer": "norm1"} | settings
    masking.pop("opset", None)
    images = images_of(3, SIZE)
    wanted, plain = naive_logits(model, images, (3, 5), **masking)
    for run in (onnx_runtime(tmp_path / "model.onnx"), open_vino(tmp_path / "model.onnx")):
        got = run(images=images.numpy())
        near(got["logits"], plain.numpy())
        near(got["scores"], wanted.softmax(dim=1).numpy())


@pytest.mark.parametrize("kind", ["closed form", "direct"])
def test_the_most_probable_classes(tmp_path, model, kind):
    if kind == "direct":
        model = ARCHITECTURES["timm vit, mean pool"]()
    done = export(model, tmp_path / "model.onnx", size=SIZE, targets="top2", raw=True)
    assert done.outputs == ("logits", "scores", "classes")
    images = images_of(3, SIZE)
    exact = ReciproCAM(model)(images, "all")
    wanted = exact.logits.argsort(axis=1)[:, ::-1][:, :2]
    for run in (onnx_runtime(tmp_path / "model.onnx"), open_vino(tmp_path / "model.onnx")):
        got = run(images=images.numpy())
        assert "saliency" not in got
        np.testing.assert_array_equal(got["classes"], wanted)
        near(got["scores"], np.take_along_axis(exact.scores, wanted[:, :, None, None], axis=1))


def test_classes_named_by_an_input(tmp_path, model):
    done = export(model, tmp_path / "model.onnx", size=SIZE, targets="input")
    assert (done.inputs, done.outputs) == (
        ("images", "targets"),
        ("logits", "saliency", "scores"),
    )
    images = images_of(2, SIZE)
    exact = ReciproCAM(model)(images, "all")
    for run in (onnx_runtime(tmp_path / "model.onnx"), open_vino(tmp_path / "model.onnx")):
        for targets in ([[3], [0]], [[1, 1, 4], [0, 2, 3]]):
            targets = np.array(targets)
            got = run(images=images.numpy(), targets=targets)
            wanted = np.take_along_axis(exact.scores, targets[:, :, None, None], axis=1)
            near(got["scores"], wanted)


def test_constant_scores_give_a_map_of_zeros(tmp_path):
    model = VisionTransformer(**TIMM)
    with torch.no_grad():
        model.head.weight.zero_()
    export(model.eval(), tmp_path / "model.onnx", size=SIZE)
    got = onnx_runtime(tmp_path / "model.onnx")(images=images_of(2, SIZE).numpy())
    np.testing.assert_array_equal(got["saliency"], 0)


@pytest.mark.parametrize("factor", [20, 40])
def test_attention_scores_far_apart(tmp_path, factor):
    """By hundreds they are exact; by thousands, where two of a window blur, the file is refused."""
    model = tiny_model(grid=(3, 5))
    with torch.no_grad():
        model.blocks[-1].attn.qkv.weight[:24] *= factor  # queries and keys
    if factor == 40:
        with pytest.raises(ModelError, match="scores differ from PyTorch's"):
            export(model, tmp_path / "model.onnx", size=SIZE)
        return
    export(model, tmp_path / "model.onnx", size=SIZE)
    images = images_of(3, SIZE)
    exact = ReciproCAM(copy.deepcopy(model).double())(images.double(), "all")
    near(onnx_runtime(tmp_path / "model.onnx")(images=images.numpy())["scores"], exact.scores)


def test_any_size_where_the_model_takes_it(tmp_path):
    model = shaken(timm.create_model("test_vit", dynamic_img_size=True), spread=0.02)
    weights, path = tmp_path / "model.safetensors", tmp_path / "model.onnx"
    save_file(model.state_dict(), weights)
    arguments = ["timm:test_vit", path, "--weights", weights, "--dynamic-size"]
    line = ["-m", "vit_reciprocam", "export", *map(str, arguments)]
    # in a process of its own: the tests' check of types knows no sizes that are open
    subprocess.run([sys.executable, *line, "--option", "dynamic_img_size=true"], check=True)
    run = onnx_runtime(path)
    for size in ((160, 160), (32, 48), (192, 128)):
        images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
        exact = ReciproCAM(model)(images, "all")
        got = run(images=images.numpy())
        near(got["logits"], exact.logits)
        near(got["scores"], exact.scores)


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


def test_float16_weights(tmp_path):
    model = tiny_model(grid=(3, 5), embed_dim=48)
    whole = export(model, tmp_path / "whole.onnx", size=SIZE)
    half = export(model, tmp_path / "half.onnx", size=SIZE, half=True)
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert whole.bytes - half.bytes > 1.8 * weights
    images = images_of(2, SIZE)
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in rounded.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.half())
    exact = ReciproCAM(rounded)(images, "all")
    for run in (onnx_runtime(tmp_path / "half.onnx"), open_vino(tmp_path / "half.onnx")):
        got = run(images=images.numpy())
        near(got["logits"], exact.logits)
        near(got["scores"], exact.scores)


def test_weights_in_a_file_of_their_own(tmp_path, model):
    path = tmp_path / "model.onnx"
    export(model, path, size=SIZE)
    done = export(model, path, size=SIZE, external_data=True)
    data = tmp_path / "model.onnx.data"
    assert done.files == (path, data)
    assert set(tmp_path.iterdir()) == {path, data}
    assert data.stat().st_size > 10_000
    images = images_of(2, SIZE)
    exact = ReciproCAM(model)(images, "all")
    for run in (onnx_runtime(path), open_vino(path)):
        near(run(images=images.numpy())["scores"], exact.scores)


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
    real = trace.attend_by_convolution
    monkeypatch.setattr(trace, "attend_by_convolution", lambda *args: 1.01 * real(*args))
    with pytest.raises(ModelError, match="logits differ from PyTorch's by"):
        export(model, tmp_path / "model.onnx", size=SIZE)
    assert not list(tmp_path.iterdir())


def state(model):
    """All that a module and the modules in it hold, hooks too."""
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_become_float32(tmp_path, model, dtype):
    other = copy.deepcopy(model).to(dtype)
    export(other, tmp_path / "model.onnx", size=SIZE)
    assert {parameter.dtype for parameter in other.parameters()} == {dtype}
    images = images_of(2, SIZE)
    exact = ReciproCAM(copy.deepcopy(other).float())(images, "all")
    near(onnx_runtime(tmp_path / "model.onnx")(images=images.numpy())["scores"], exact.scores)


def test_what_load_returns_brings_the_rest(tmp_path):
    classifier = vr.load("timm:test_vit", weights="random")
    done = vr.export(classifier, tmp_path / "model.onnx", targets="top1")
    assert done.metadata.name == "timm:test_vit"
    assert done.metadata.preprocess == classifier.preprocess
    assert done.metadata.class_names == classifier.class_names


def test_the_plain_model(tmp_path, model):
    export_prediction(model, tmp_path / "model.onnx", size=SIZE)
    images = images_of(3, SIZE)
    got = onnx_runtime(tmp_path / "model.onnx")(images=images.numpy())
    assert list(got) == ["logits"]
    near(got["logits"], model(images).numpy())


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
        (None, {"kernel": "box"}, InputError, "kernel must be one of"),
        (None, {"layer": "pool"}, InputError, "reads its class token"),
        (None, {"targets": "best"}, InputError, "targets of a file must be"),
        (None, {"targets": "top6"}, InputError, "'top6' of a model of 5 classes"),
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
