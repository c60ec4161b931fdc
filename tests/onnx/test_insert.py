"""Maps put into ONNX files that others wrote, against whole forward passes of the PyTorch model."""

import dataclasses
import json

import numpy as np
import openvino
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import exporters
import onnx
import vit_reciprocam as vr
from insertion import batch_size, correlate, expected, expected_evidence, run
from vit_reciprocam.cli import app
from vit_reciprocam.onnx.insert.insert import insert
from vit_reciprocam.onnx.run.explainer import OnnxExplainer

CASES = [
    *(("vit", writer) for writer in exporters.WRITERS),
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


@pytest.mark.parametrize(("name", "writer"), CASES)
def test_files_are_explained_as_pytorch_would(name, writer, source_of, tmp_path):
    source, explained = source_of(name, writer), tmp_path / "explained.onnx"
    done = insert(source, explained)
    closed = exporters.MODELS[name][3]
    assert done.path == ("closed-form" if closed else "direct"), done.direct_because
    count = batch_size(source)
    images = exporters.pictures(name, count).numpy()
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
    rounding = 1e-6 * largest / (high - low)  # the scores', enlarged if they are nearly flat
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
def test_openvino_runs_what_was_inserted(name, writer, source_of, tmp_path):
    insert(source_of(name, writer), tmp_path / "x.onnx")
    count = batch_size(tmp_path / "x.onnx")
    images = exporters.pictures(name, count).numpy()
    model = openvino.compile_model(tmp_path / "x.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    scores = model(images)["scores"]
    np.testing.assert_allclose(scores, expected(name, count), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", ["gaussian", "dirac"])
@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("name", ["distilled", "qk_norm", "rotary", "mean"])
def test_settings(name, kernel, class_token, source_of, tmp_path):
    settings = {"kernel": kernel, "class_token": class_token}
    insert(source_of(name, "dynamo 18"), tmp_path / "x.onnx", **settings)
    scores = run(tmp_path / "x.onnx", exporters.pictures(name, 2).numpy())["scores"]
    np.testing.assert_allclose(scores, expected(name, 2, **settings), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "writer", "settings"),
    [
        ("vit", "torchscript 17", {}),
        ("registers", "dynamo fixed", {}),
        ("distilled", "dynamo 18", {"class_token": False}),
        ("qk_norm", "dynamo 18", {}),
        ("relative", "torchscript 14", {}),
        ("cait", "dynamo 23", {}),  # the direct path, by a loop
        ("mean", "dynamo 18", {}),
    ],
)
def test_evidence(name, writer, settings, source_of, tmp_path):
    path = tmp_path / "x.onnx"
    insert(source_of(name, writer), path, normalize="evidence", **settings)
    count = batch_size(path)
    images, wanted = exporters.pictures(name, count), expected_evidence(name, count, **settings)
    assert wanted.min() < 0 < wanted.max()
    outputs = run(path, images.numpy())
    np.testing.assert_allclose(outputs["scores"], wanted, rtol=0, atol=1e-5)
    positive = outputs["scores"].clip(0)
    most = positive.max(axis=(2, 3), keepdims=True)
    np.testing.assert_allclose(
        outputs["saliency"], positive / np.where(most > 0, most, 1), rtol=0, atol=1e-6
    )
    model = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(model(images.numpy())["scores"], wanted, rtol=0, atol=1e-5)
    explained = OnnxExplainer(path)(images.numpy(), "all")
    assert (explained.evidence == explained.scores).all()
    assert explained.settings["normalize"] == "evidence"


def test_evidence_of_the_most_probable_classes(source_of, tmp_path):
    path = tmp_path / "x.onnx"
    insert(source_of("vit", "dynamo 18"), path, normalize="evidence", targets="top2", raw=True)
    outputs = run(path, exporters.pictures("vit").numpy())
    chosen = outputs["classes"][:, :, None, None]
    wanted = np.take_along_axis(expected_evidence("vit", 3), chosen, axis=1)
    np.testing.assert_allclose(outputs["scores"], wanted, rtol=0, atol=1e-5)
    assert "saliency" not in outputs


@pytest.mark.parametrize("targets", ["top2", "input"])
@pytest.mark.parametrize("raw", [True, False])
def test_targets(targets, raw, source_of, tmp_path):
    insert(source_of("vit", "dynamo 18"), tmp_path / "x.onnx", targets=targets, raw=raw)
    chosen = np.array([[3, 0], [1, 1], [6, 2]])
    more = {"targets": chosen} if targets == "input" else {}
    images = exporters.pictures("vit").numpy()
    outputs = run(tmp_path / "x.onnx", images, **more)
    if targets == "top2":
        logits = run(source_of("vit", "dynamo 18"), images).popitem()[1]
        chosen = np.argsort(-logits, axis=1)[:, :2]
        np.testing.assert_array_equal(outputs["classes"], chosen)
    wanted = np.take_along_axis(expected("vit", 3), chosen[:, :, None, None], axis=1)
    np.testing.assert_allclose(outputs["scores"], wanted, rtol=0, atol=1e-6)
    assert ("saliency" in outputs) is not raw


def test_nothing_of_the_file_is_changed(source_of, tmp_path):
    source = onnx.load(source_of("vit", "torchscript 14"))
    insert(source_of("vit", "torchscript 14"), tmp_path / "x.onnx")
    after = onnx.load(tmp_path / "x.onnx")
    assert list(after.graph.node)[: len(source.graph.node)] == list(source.graph.node)
    assert list(after.graph.input) == list(source.graph.input)
    assert list(after.graph.output)[: len(source.graph.output)] == list(source.graph.output)
    weights = list(after.graph.initializer)
    assert weights[: len(source.graph.initializer)] == list(source.graph.initializer)
    onnx.checker.check_model(after, full_check=True)


@pytest.mark.parametrize("tool", ["optimize_with_onnxruntime", "optimize_with_transformers"])
@pytest.mark.parametrize(
    ("name", "writer"),
    [("vit", "torchscript 14"), ("vit", "dynamo 18"), ("hub vit", "dynamo 18")],
)
def test_files_of_optimizers(tool, name, writer, source_of, tmp_path):
    source = tmp_path / "optimized.onnx"
    getattr(exporters, tool)(source_of(name, writer), source)
    assert insert(source, tmp_path / "x.onnx").path == "closed-form"
    count = batch_size(source)
    scores = run(tmp_path / "x.onnx", exporters.pictures(name, count).numpy())["scores"]
    np.testing.assert_allclose(scores, expected(name, count), rtol=0, atol=1e-5)


@pytest.mark.parametrize("keep_io", [True, False])
def test_float16(keep_io, source_of, tmp_path):
    source = tmp_path / "half.onnx"
    exporters.convert_to_float16(source_of("vit", "dynamo 18"), source, keep_io=keep_io)
    assert insert(source, tmp_path / "x.onnx").path == "closed-form"
    images = exporters.pictures("vit").numpy().astype(np.float32 if keep_io else np.float16)
    scores = run(tmp_path / "x.onnx", images)["scores"]
    assert scores.dtype == np.float32
    assert correlate(scores, expected("vit", 3)) > 0.98


def test_int8(source_of, tmp_path):
    source = tmp_path / "int8.onnx"
    batches = [exporters.pictures("vit", 1).numpy() for _ in range(4)]
    exporters.quantize(source_of("vit", "torchscript 17"), source, batches)
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(source).graph.node}
    assert insert(source, tmp_path / "x.onnx").path == "closed-form"
    scores = run(tmp_path / "x.onnx", exporters.pictures("vit", 1).numpy())["scores"]
    assert correlate(scores, expected("vit", 1)) > 0.9


def test_weights_beside_the_file_come_along(source_of, tmp_path):
    source = tmp_path / "in" / "model.onnx"
    source.parent.mkdir()
    (tmp_path / "out").mkdir()
    model = onnx.load(source_of("vit", "dynamo 18"))
    onnx.save(model, source, save_as_external_data=True, location="w.bin", size_threshold=1024)
    explained = tmp_path / "out" / "x.onnx"
    insert(source, explained)
    (tmp_path / "in" / "w.bin").unlink()
    scores = run(explained, exporters.pictures("vit").numpy())["scores"]
    np.testing.assert_allclose(scores, expected("vit", 3), rtol=0, atol=1e-6)


def test_what_was_inserted_explains_pictures(source_of, tmp_path):
    explained = tmp_path / "x.onnx"
    names = [f"thing {number}" for number in range(7)]
    insert(
        source_of("vit", "torchscript 17"),
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


def test_command(source_of, tmp_path):
    source, explained = str(source_of("mean", "dynamo 18")), str(tmp_path / "x.onnx")
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


def test_what_is_returned(source_of, tmp_path):
    done = insert(source_of("registers", "torchscript 17"), tmp_path / "x.onnx")
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
