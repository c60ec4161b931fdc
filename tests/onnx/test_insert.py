"""Maps put into ONNX files that others wrote, against whole forward passes of the PyTorch model."""

import dataclasses
import functools
import json
import re

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import ParallelThingsBlock, VisionTransformer
from typer.testing import CliRunner

import exporters
import onnx
import vit_reciprocam as vr
from reference import naive_logits
from vit_reciprocam.cli import app
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.onnx.insert.insert import insert

FIXED = {"batch": "fixed"}
WRITERS = {
    "dynamo 18": functools.partial(exporters.dynamo, opset=18),
    "dynamo fixed": functools.partial(exporters.dynamo, **FIXED),
    "dynamo 23": functools.partial(exporters.dynamo, opset=23),  # has a node Attention
    "torchscript 14": functools.partial(exporters.torchscript, opset=14, **FIXED),  # no LayerNorm
    "torchscript 17": functools.partial(exporters.torchscript, opset=17),
    "timm": exporters.timm_export,
}
CASES = [
    *(("vit", writer) for writer in WRITERS),
    *(("rectangle", writer) for writer in ("dynamo 23", "torchscript 14")),
    *(("distilled", writer) for writer in ("dynamo 18", "torchscript 14")),
    *(("registers", writer) for writer in ("dynamo fixed", "torchscript 17")),
    *(("qk_norm", writer) for writer in ("dynamo 18", "torchscript 14")),
    *(("rotary", writer) for writer in ("dynamo 18", "dynamo 23")),
    *(("relative", writer) for writer in ("torchscript 14", "torchscript 17")),
    *(("torchvision", writer) for writer in ("dynamo 18", "dynamo 23", "torchscript 14")),
    *(("hub vit", writer) for writer in ("dynamo 18", "dynamo 23", "torchscript 14")),
    *(("hub deit", writer) for writer in ("dynamo fixed", "torchscript 17")),
    *(("hub dinov2", writer) for writer in ("dynamo 18", "torchscript 14")),
    *(("mean", writer) for writer in ("dynamo 18", "dynamo 23", "torchscript 14")),
    ("attention pool", "dynamo 18"),
    *(("cait", writer) for writer in ("dynamo 23", "torchscript 17")),
    *(("swin", writer) for writer in ("dynamo 18", "torchscript 14")),
]


def pictures(name, count=3):
    shape = (32, 48) if name == "rectangle" else (32, 32)
    return torch.randn(count, 3, *shape, generator=torch.Generator().manual_seed(5))


@functools.cache
def expected(name, count, kernel="gaussian", class_token=True):
    """Softmax scores of the naive loops in float64."""
    model = exporters.build(name)
    _, prefix, norm, _ = exporters.MODELS[name]

    def cut(model):
        module = model.get_submodule(norm)
        return module, [module], "output"

    images = pictures(name, count)
    grid = (4, images.shape[3] // 8)
    settings = {"kernel": kernel, "class_token": class_token, "layer": "norm1"}
    masked, _ = naive_logits(model, images, grid, **settings, find_cut=cut, prefix=prefix)
    return masked.softmax(dim=1).numpy()


def run(path, images, *, optimized=True, outputs=None, **more):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    names = [value.name for value in session.get_outputs()] if outputs is None else outputs
    return dict(zip(names, session.run(names, {name: images, **more}), strict=True))


def batch_of(path):
    size = onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0]
    return size.dim_value or 3


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Model and writer -> its file."""
    folder = tmp_path_factory.mktemp("foreign")

    @functools.cache
    def write(name, writer):
        path = folder / f"{name}-{writer}.onnx".replace(" ", "-")
        WRITERS[writer](exporters.build(name), pictures(name), path)
        return path

    return write


@pytest.mark.parametrize(("name", "writer"), CASES)
def test_foreign_files_are_explained_as_pytorch_would(name, writer, written, tmp_path):
    source, explained = written(name, writer), tmp_path / "explained.onnx"
    done = insert(source, explained)
    closed = exporters.MODELS[name][3]
    assert done.path == ("closed-form" if closed else "direct"), done.direct_because
    count = batch_of(source)
    images = pictures(name, count).numpy()
    for optimized, tolerance in ((False, 0), (True, 1e-5)):
        before = run(source, images, optimized=optimized)
        after = run(explained, images, optimized=optimized)
        for output, value in before.items():
            np.testing.assert_allclose(after[output], value, rtol=0, atol=tolerance)
        largest = expected(name, count).max()
        off = np.abs(after["scores"] - expected(name, count)).max()
        assert off <= 1e-5 * largest
    low, high = (f(expected(name, count), axis=(2, 3), keepdims=True) for f in (np.min, np.max))
    maps = (expected(name, count) - low) / (high - low)
    rounding = 1e-6 * largest / (high - low)  # of scores, enlarged where they are nearly flat
    assert (np.abs(after["saliency"] - maps) <= np.maximum(1e-4, rounding)).all()


@pytest.mark.parametrize(
    ("name", "writer"),
    [
        ("vit", "torchscript 17"),
        ("vit", "torchscript 14"),  # these and the next with a fixed batch
        ("registers", "dynamo fixed"),
        ("relative", "torchscript 14"),
        ("torchvision", "torchscript 14"),
        ("qk_norm", "torchscript 14"),
        ("rotary", "dynamo 18"),
        ("distilled", "dynamo 18"),
        ("mean", "dynamo 18"),
    ],
)
def test_openvino_runs_what_was_inserted(name, writer, written, tmp_path):
    insert(written(name, writer), tmp_path / "x.onnx")
    count = batch_of(tmp_path / "x.onnx")
    images = pictures(name, count).numpy()
    model = openvino.compile_model(tmp_path / "x.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    scores = model(images)["scores"]
    np.testing.assert_allclose(scores, expected(name, count), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", ["gaussian", "dirac"])
@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("name", ["distilled", "qk_norm", "rotary", "mean"])
def test_settings(name, kernel, class_token, written, tmp_path):
    settings = {"kernel": kernel, "class_token": class_token}
    insert(written(name, "dynamo 18"), tmp_path / "x.onnx", **settings)
    scores = run(tmp_path / "x.onnx", pictures(name, 2).numpy())["scores"]
    np.testing.assert_allclose(scores, expected(name, 2, **settings), rtol=0, atol=1e-6)


@pytest.mark.parametrize("targets", ["top2", "input"])
@pytest.mark.parametrize("raw", [True, False])
def test_targets(targets, raw, written, tmp_path):
    insert(written("vit", "dynamo 18"), tmp_path / "x.onnx", targets=targets, raw=raw)
    chosen = np.array([[3, 0], [1, 1], [6, 2]])
    more = {"targets": chosen} if targets == "input" else {}
    images = pictures("vit").numpy()
    outputs = run(tmp_path / "x.onnx", images, **more)
    if targets == "top2":
        logits = run(written("vit", "dynamo 18"), images).popitem()[1]
        chosen = np.argsort(-logits, axis=1)[:, :2]
        np.testing.assert_array_equal(outputs["classes"], chosen)
    wanted = np.take_along_axis(expected("vit", 3), chosen[:, :, None, None], axis=1)
    np.testing.assert_allclose(outputs["scores"], wanted, rtol=0, atol=1e-6)
    assert ("saliency" in outputs) is not raw


def test_nothing_of_the_file_is_changed(written, tmp_path):
    source = onnx.load(written("vit", "torchscript 14"))
    insert(written("vit", "torchscript 14"), tmp_path / "x.onnx")
    after = onnx.load(tmp_path / "x.onnx")
    assert list(after.graph.node)[: len(source.graph.node)] == list(source.graph.node)
    assert list(after.graph.input) == list(source.graph.input)
    assert list(after.graph.output)[: len(source.graph.output)] == list(source.graph.output)
    weights = list(after.graph.initializer)
    assert weights[: len(source.graph.initializer)] == list(source.graph.initializer)
    onnx.checker.check_model(after, full_check=True)


@pytest.mark.parametrize("tool", ["onnxruntime_optimized", "transformers_optimized"])
@pytest.mark.parametrize(
    ("name", "writer"),
    [("vit", "torchscript 14"), ("vit", "dynamo 18"), ("hub vit", "dynamo 18")],
)
def test_optimized_files(tool, name, writer, written, tmp_path):
    source = tmp_path / "optimized.onnx"
    getattr(exporters, tool)(written(name, writer), source)
    assert insert(source, tmp_path / "x.onnx").path == "closed-form"
    count = batch_of(source)
    scores = run(tmp_path / "x.onnx", pictures(name, count).numpy())["scores"]
    np.testing.assert_allclose(scores, expected(name, count), rtol=0, atol=1e-5)


@pytest.mark.parametrize("keep_io", [True, False])
def test_float16(keep_io, written, tmp_path):
    source = tmp_path / "half.onnx"
    exporters.halved(written("vit", "dynamo 18"), source, keep_io=keep_io)
    assert insert(source, tmp_path / "x.onnx").path == "closed-form"
    images = pictures("vit").numpy().astype(np.float32 if keep_io else np.float16)
    scores = run(tmp_path / "x.onnx", images)["scores"]
    assert scores.dtype == np.float32
    assert alike(scores, expected("vit", 3)) > 0.98


def test_int8(written, tmp_path):
    source = tmp_path / "int8.onnx"
    batches = [pictures("vit", 1).numpy() for _ in range(4)]
    exporters.quantized(written("vit", "torchscript 17"), source, batches)
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(source).graph.node}
    assert insert(source, tmp_path / "x.onnx").path == "closed-form"
    scores = run(tmp_path / "x.onnx", pictures("vit", 1).numpy())["scores"]
    assert alike(scores, expected("vit", 1)) > 0.9


def alike(scores, wanted):
    """Mean correlation of maps."""
    rows = (each.reshape(-1, each.shape[2] * each.shape[3]) for each in (scores, wanted))
    return np.mean([np.corrcoef(*pair)[0, 1] for pair in zip(*rows, strict=True)])


def test_weights_beside_the_file_come_along(written, tmp_path):
    source = tmp_path / "in" / "model.onnx"
    source.parent.mkdir()
    (tmp_path / "out").mkdir()
    model = onnx.load(written("vit", "dynamo 18"))
    onnx.save(model, source, save_as_external_data=True, location="w.bin", size_threshold=1024)
    explained = tmp_path / "out" / "x.onnx"
    insert(source, explained)
    (tmp_path / "in" / "w.bin").unlink()
    scores = run(explained, pictures("vit").numpy())["scores"]
    np.testing.assert_allclose(scores, expected("vit", 3), rtol=0, atol=1e-6)


def test_what_was_inserted_explains_pictures(written, tmp_path):
    explained = tmp_path / "x.onnx"
    names = [f"thing {number}" for number in range(7)]
    insert(
        written("vit", "torchscript 17"),
        explained,
        class_names=names,
        preprocess="imagenet:size=32",
    )
    classifier = vr.load(str(explained))
    assert classifier.class_names == tuple(names)
    picture = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    e = vr.explain(picture, classifier, targets="all")
    images = torch.from_numpy(classifier.preprocess(Image.fromarray(picture)))[None]
    ours = vr.ReciproCAM(exporters.build("vit"))(images, "all")
    np.testing.assert_allclose(e.scores, ours.scores, rtol=0, atol=1e-6)
    assert e.path == "closed-form"


def test_command(written, tmp_path):
    source, explained = str(written("mean", "dynamo 18")), str(tmp_path / "x.onnx")
    result = CliRunner().invoke(app, ["insert", source, explained, "--json", "--target", "top1"])
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["path"] == "direct"
    assert said["direct_because"] == "the head reads all tokens, not prefix tokens alone"
    assert said["difference"] < 1e-5
    result = CliRunner().invoke(app, ["insert", explained, str(tmp_path / "y.onnx")])
    assert result.exit_code == 2
    assert "holds an explanation already" in result.stderr
    assert not (tmp_path / "y.onnx").exists()


# Unusual models: each would give wrong maps if it were taken for an ordinary one


class Reordered(torch.nn.Module):
    """Tokens after a module, in another order."""

    def __init__(self, module, order, prefix):
        super().__init__()
        self.module, self.order = module, list(range(prefix)) + [prefix + n for n in order]

    def forward(self, tokens):
        return self.module(tokens)[:, self.order]


class Ending(torch.nn.Module):
    """A tiny ViT with another end: `end` makes the output of it, its tokens and its logits."""

    def __init__(self, end):
        super().__init__()
        self.model, self.end = exporters.build("vit"), end

    def forward(self, images):
        tokens = self.model.forward_features(images)
        return self.end(self.model, tokens, self.model.forward_head(tokens))


def file_of(model, tmp_path, *, opset=17):
    exporters.torchscript(model.eval(), pictures("vit"), tmp_path / "model.onnx", opset=opset)
    return tmp_path / "model.onnx"


def naive(model, norm):
    settings = {"kernel": "gaussian", "class_token": True, "layer": "norm1"}

    def cut(model):
        module = model.get_submodule(norm)
        return module, [module], "output"

    return naive_logits(model, pictures("vit"), (4, 4), **settings, find_cut=cut, prefix=1)[0]


BY_COLUMNS = np.arange(16).reshape(4, 4).T.ravel().tolist()


def test_tokens_column_by_column(tmp_path):
    model = exporters.build("vit")
    model.patch_embed = Reordered(model.patch_embed, BY_COLUMNS, prefix=0)
    refuses(file_of(model, tmp_path), tmp_path, "do not lie as 1 prefix tokens and a grid")


def test_tokens_that_change_places(tmp_path):
    model = exporters.build("vit")
    model.blocks[0] = Reordered(model.blocks[0], BY_COLUMNS, prefix=1)
    refuses(file_of(model, tmp_path), tmp_path, "the tokens change places")


def test_two_attentions_side_by_side(tmp_path):
    torch.manual_seed(0)
    model = VisionTransformer(**exporters.TIMM, block_fn=ParallelThingsBlock)
    refuses(file_of(model, tmp_path), tmp_path, "through Softmax node .*attns.0/attn/Softmax")


def test_probabilities_as_the_output(tmp_path):
    model = Ending(lambda _model, _tokens, logits: logits.softmax(dim=-1).double().float())
    done = insert(file_of(model, tmp_path), tmp_path / "x.onnx")
    assert done.path == "closed-form"
    scores = run(tmp_path / "x.onnx", pictures("vit").numpy())["scores"]
    np.testing.assert_allclose(scores, expected("vit", 3), rtol=0, atol=1e-6)


def test_independent_probabilities(tmp_path):
    model = Ending(lambda _model, _tokens, logits: logits.sigmoid())
    refuses(file_of(model, tmp_path), tmp_path, "is a sigmoid's")


def test_weights_that_are_not_numbers(tmp_path):
    model = exporters.build("vit")
    with torch.no_grad():
        model.head.bias[0] = torch.nan
    refuses(file_of(model, tmp_path), tmp_path, "holds NaN or infinity")


ENDS = {
    "seldom": (  # reads patches only where they are large
        lambda _model, tokens, logits: (
            logits + torch.relu(tokens[:, 1:].mean(dim=(1, 2)) - 1)[:, None] * torch.arange(7.0)
        ),
        "reads all tokens|cannot run",
    ),
    "view": (
        lambda model, tokens, _logits: model.head(
            tokens[:, 0].view(tokens.shape[0], 2, 12).reshape(tokens.shape[0], 24)
        ),
        "cannot run",
    ),
    "sum": (
        lambda model, tokens, _logits: model.head((tokens * torch.eye(17)[:1].T).sum(dim=1)),
        "cannot run|one token",
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_ends_that_take_the_direct_path(end, tmp_path):
    model = Ending(ENDS[end][0])
    done = insert(file_of(model, tmp_path), tmp_path / "x.onnx")
    assert done.path == "direct"
    assert re.search(ENDS[end][1], done.direct_because)
    scores = run(tmp_path / "x.onnx", pictures("vit").numpy())["scores"]
    wanted = naive(model, "model.blocks.1.norm1").softmax(dim=1).numpy()
    np.testing.assert_allclose(scores, wanted, rtol=0, atol=1e-6)


def test_a_relu_left_to_the_quantiser(tmp_path):
    torch.manual_seed(0)
    model = VisionTransformer(**exporters.TIMM, act_layer=torch.nn.ReLU).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    source = file_of(model, tmp_path)
    exporters.quantized(source, tmp_path / "int8.onnx", [pictures("vit").numpy()])
    kinds = {node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node}
    assert "Relu" not in kinds
    assert insert(tmp_path / "int8.onnx", tmp_path / "x.onnx").path == "closed-form"
    scores = run(tmp_path / "x.onnx", pictures("vit").numpy())["scores"]
    assert alike(scores, naive(model, "blocks.1.norm1").softmax(dim=1).numpy()) > 0.95


# Bad input


def refuses(source, tmp_path, match, error=ModelError, **options):
    before = set(tmp_path.rglob("*"))
    with pytest.raises(error, match=match):
        insert(source, tmp_path / "never.onnx", **options)
    assert set(tmp_path.rglob("*")) == before


def test_no_onnx_file(tmp_path):
    refuses(tmp_path / "none.onnx", tmp_path, "no such model file")
    (tmp_path / "text.onnx").write_text("hello, I am a text")
    refuses(tmp_path / "text.onnx", tmp_path, "not an ONNX file")
    (tmp_path / "empty.onnx").write_bytes(b"")
    refuses(tmp_path / "empty.onnx", tmp_path, "not an ONNX file")


def test_truncated_file(written, tmp_path):
    content = written("vit", "dynamo 18").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(content[: len(content) // 2])
    refuses(tmp_path / "cut.onnx", tmp_path, "was cut short")


@pytest.mark.parametrize(
    ("place", "match"),
    [("../w.bin", "outside its folder"), ("/etc/passwd", "outside its folder"), ("no", "missing")],
)
def test_weights_elsewhere(place, match, written, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "w.bin").write_bytes(bytes(1 << 20))
    source = tmp_path / "m" / "model.onnx"
    model = onnx.load(written("vit", "dynamo 18"))
    onnx.save(model, source, save_as_external_data=True, location="w", size_threshold=1024)
    model = onnx.load(source, load_external_data=False)
    for weight in model.graph.initializer:
        for entry in weight.external_data:
            if entry.key == "location":
                entry.value = place
    source.write_bytes(model.SerializeToString())
    refuses(source, tmp_path, match)


def test_a_link_out_of_the_folder(written, tmp_path):
    (tmp_path / "m").mkdir()
    source = tmp_path / "m" / "model.onnx"
    model = onnx.load(written("vit", "dynamo 18"))
    onnx.save(model, source, save_as_external_data=True, location="w", size_threshold=1024)
    (tmp_path / "m" / "w").rename(tmp_path / "w")
    (tmp_path / "m" / "w").symlink_to(tmp_path / "w")
    refuses(source, tmp_path, "outside its folder")


def test_a_cnn(tmp_path):
    import torchvision

    model = torchvision.models.resnet18(num_classes=7).eval()
    exporters.torchscript(model, pictures("vit"), tmp_path / "cnn.onnx", opset=17)
    refuses(tmp_path / "cnn.onnx", tmp_path, "no self-attention was found.*looks like a CNN")


def test_a_text_model(tmp_path):
    class Text(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(10, 8)
            self.head = torch.nn.Linear(8, 3)

        def forward(self, ids):
            return self.head(self.embedding(ids).mean(dim=1))

    ids = torch.ones(2, 5, dtype=torch.long)
    exporters.torchscript(Text(), ids, tmp_path / "text.onnx", opset=17)
    refuses(tmp_path / "text.onnx", tmp_path, r"no single input of images .* inputs are: images")


def test_an_encoder_without_a_head(written, tmp_path):
    model = exporters.build("vit")
    model.reset_classifier(0)
    model.forward = model.forward_features
    exporters.torchscript(model, pictures("vit"), tmp_path / "features.onnx", opset=17)
    refuses(tmp_path / "features.onnx", tmp_path, "no classifier")


def test_features_without_a_head(tmp_path):
    model = VisionTransformer(**{**exporters.TIMM, "num_classes": 0})
    refuses(file_of(model, tmp_path), tmp_path, "features, not classes")


def test_opset(written, tmp_path):
    model = onnx.load(written("vit", "torchscript 14"))
    model.opset_import[0].version = 9
    onnx.save(model, tmp_path / "old.onnx")
    refuses(tmp_path / "old.onnx", tmp_path, "written in opset 9; 11 to")


def test_open_size(written, tmp_path):
    model = onnx.load(written("rectangle", "dynamo 23"))
    for dim, name in zip(model.graph.input[0].type.tensor_type.shape.dim[2:], "hw", strict=True):
        dim.dim_param = name
    onnx.save(model, tmp_path / "open.onnx")
    refuses(tmp_path / "open.onnx", tmp_path, "leaves the pictures' size open: size=")
    assert insert(tmp_path / "open.onnx", tmp_path / "x.onnx", size=(32, 48)).grid == (4, 6)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"size": (64, 64)}, ModelError, r"takes pictures of 32x32, not of \(64, 64\)"),
        ({"grid": (5, 5)}, ModelError, "more patches than there are tokens"),
        ({"grid": (2, 8)}, ModelError, "do not lie as"),
        ({"target_node": "nothing"}, ModelError, "no node or value 'nothing'"),
        ({"class_names": ["a"]}, InputError, "1 class names given for a model of 7"),
        ({"targets": "top9"}, InputError, "the model has 7 classes"),
        ({"targets": "best"}, InputError, "targets of a file must be"),
        ({"kernel": "box"}, InputError, "kernel must be one of"),
        ({"preprocess": "imagenet:size=48"}, InputError, r"of \(48, 48\), the maps hold for"),
        ({"preprocess": "photos"}, InputError, "preprocess must be one of"),
    ],
)
def test_settings_that_do_not_fit(options, error, match, written, tmp_path):
    refuses(written("vit", "torchscript 14"), tmp_path, match, error, **options)


def test_values_of_that_name(written, tmp_path):
    model = onnx.load(written("vit", "dynamo 18"))
    name = model.graph.output[0].name
    model.graph.node.append(onnx.helper.make_node("Identity", [name], ["saliency"]))
    model.graph.output.append(onnx.ValueInfoProto(name="saliency"))
    onnx.save(model, tmp_path / "taken.onnx")
    refuses(tmp_path / "taken.onnx", tmp_path, "values of its own named saliency")


def test_target_node_names_another_cut(written, tmp_path):
    """The LayerNorm before the MLP: no attention below it, so the direct path."""
    source = written("vit", "dynamo 18")
    norms = [n for n in onnx.load(source).graph.node if n.op_type == "LayerNormalization"]
    done = insert(source, tmp_path / "x.onnx", target_node=norms[-2].name)
    assert done.path == "direct"
    model = exporters.build("vit")

    def cut(model):
        return model.blocks[1], [model.blocks[1].norm2], "output"

    settings = {"kernel": "gaussian", "class_token": True, "layer": "norm1"}
    masked, _ = naive_logits(model, pictures("vit"), (4, 4), **settings, find_cut=cut)
    scores = run(tmp_path / "x.onnx", pictures("vit").numpy())["scores"]
    np.testing.assert_allclose(scores, masked.softmax(dim=1).numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("place", "match"),
    [
        ("none/x.onnx", "there is no folder"),
        ("folder.onnx", "is a folder"),
        ("x.txt", "must end in .onnx"),
        ("model.onnx", "belongs to the file to read"),
        ("w.onnx", "belongs to the file to read"),
    ],
)
def test_places_that_cannot_be_written(place, match, written, tmp_path):
    (tmp_path / "folder.onnx").mkdir()
    model = onnx.load(written("vit", "dynamo 18"))
    source = tmp_path / "model.onnx"
    onnx.save(model, source, save_as_external_data=True, location="w.onnx", size_threshold=1024)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(InputError, match=match):
        insert(source, tmp_path / place)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_is_returned(written, tmp_path):
    done = insert(written("registers", "torchscript 17"), tmp_path / "x.onnx")
    said = dataclasses.asdict(done)
    assert said.pop("difference") < 1e-5
    assert "norm1" in said.pop("normed")
    assert said == {
        "path": "closed-form",
        "direct_because": "",
        "grid": (4, 4),
        "prefix_tokens": 3,
        "classes": 7,
    }
