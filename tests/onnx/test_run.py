"""Explained files in each runtime: every form, null baselines, options, external data, float16."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel
from typer.testing import CliRunner

import onnx
import vit_reciprocam as vr
from vit_reciprocam.classifier.load import ASSETS
from vit_reciprocam.cli import app
from vit_reciprocam.core.batch import Batch
from vit_reciprocam.errors import InputError, MissingDependencyError, ModelError, UnknownClassError
from vit_reciprocam.methods import METHODS
from vit_reciprocam.methods.null import NULLS
from vit_reciprocam.onnx.insert.insert import insert
from vit_reciprocam.onnx.run.explainer import OnnxExplainer
from vit_reciprocam.onnx.run.protobuf import digest, read_header
from vit_reciprocam.onnx.run.sessions import open_session
from vit_reciprocam.pictures.scenes import CLASSES, draw_scene

BACKENDS = ["onnxruntime", "openvino"]
both = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(scope="module")
def preprocess():
    return vr.load("demo").preprocess


@pytest.fixture(scope="module")
def images(preprocess):
    return np.stack([preprocess(draw_scene(seed).image) for seed in range(5)])


@pytest.fixture(scope="module")
def expected(demo_torch_model, images):
    """What PyTorch computes for all classes."""
    return vr.ReciproCAM(demo_torch_model)(torch.from_numpy(images), "all")


@pytest.fixture(scope="module")
def files(tmp_path_factory, preprocess):
    """The demo's plain file with each form of explanation inserted, also with a fixed batch."""
    folder = tmp_path_factory.mktemp("files")
    forms = {"all": {}, "top3": {"targets": "top3", "raw": True}, "input": {"targets": "input"}}
    for name, options in forms.items():
        insert(
            ASSETS / "demo-plain.onnx",
            folder / f"{name}.onnx",
            class_names=list(CLASSES),
            preprocess=preprocess,
            **options,
        )
        for batch in (1, 2):
            fixed = onnx.load(folder / f"{name}.onnx")
            for value in (*fixed.graph.input, *fixed.graph.output):
                value.type.tensor_type.shape.dim[0].dim_value = batch
            onnx.save(fixed, folder / f"{name}-{batch}.onnx")
    return folder


def agree(e, expected):
    np.testing.assert_allclose(e.logits, expected.logits, rtol=0, atol=1e-4)
    wanted = np.take_along_axis(expected.scores, e.targets[:, :, None, None], axis=1)
    np.testing.assert_allclose(e.scores, wanted, rtol=0, atol=1e-5)
    assert (e.logits.dtype, e.scores.dtype, e.targets.dtype) == (np.float32, np.float32, np.int64)


# --- every form ----------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("batch", ["", "-1", "-2"])
@pytest.mark.parametrize("form", ["all", "top3", "input"])
def test_every_form_gives_pytorchs_scores(files, images, expected, backend, form, batch):
    explainer = OnnxExplainer(files / f"{form}{batch}.onnx", backend=backend)
    ranked = np.argsort(-expected.logits, axis=1)
    for targets, chosen in (
        (None, ranked[:, :1]),
        (ranked[:, 1], ranked[:, 1:2]),
        (ranked[:, [2, 0]], ranked[:, [2, 0]]),
        (lambda logits: np.argsort(-logits)[:, :3], ranked[:, :3]),
    ):
        e = explainer(images, targets)
        assert e.targets.tolist() == chosen.tolist()
        agree(e, expected)
    np.testing.assert_allclose(explainer.predict(images), expected.logits, rtol=0, atol=1e-4)
    if form != "top3":
        agree(explainer(images, "all"), expected)


def test_known_logits_spare_a_run(files, images, expected):
    explainer = OnnxExplainer(files / "input.onnx")
    shifted = np.roll(expected.logits, 1, axis=1)
    e = explainer(Batch(images, logits=shifted))
    assert e.targets.tolist() == shifted.argmax(axis=1)[:, None].tolist(), "taken at their word"
    agree(e, expected)


def test_classes_that_a_file_does_not_explain(files, images, expected):
    explainer = OnnxExplainer(files / "top3.onnx")
    last = int(expected.logits[0].argmin())
    with pytest.raises(
        InputError, match=rf"class {last} is not among the 3 most probable of image"
    ):
        explainer(images, last)
    with pytest.raises(InputError, match="ask for these"):
        explainer(images, "all")
    with pytest.raises(UnknownClassError, match="class 12 does not exist"):
        OnnxExplainer(files / "input.onnx")(images, 12)
    classifier = vr.load(files / "top3.onnx")
    picture = draw_scene(0).image
    assert vr.explain(picture, classifier, top=3).targets.shape == (1, 3)
    with pytest.raises(InputError, match="on the command line --target top3"):
        vr.explain(picture, classifier, top=4)


@both
def test_a_file_is_a_classifier_like_any_other(files, preprocess, expected, backend):
    pictures = [draw_scene(seed).image for seed in range(5)]
    classifier = vr.load(str(files / "all.onnx"), backend=backend, threads=1)
    e = vr.explain(pictures, classifier, targets=["fish", "top2"])
    agree(e, expected)
    assert classifier.name == e.settings["model"] == str(files / "all.onnx")
    assert (classifier.num_classes, classifier.class_names) == (12, tuple(CLASSES))
    assert classifier.preprocess == preprocess
    assert classifier.device.startswith(f"{backend} CPU")
    assert (e.path, e.settings["backend"], e.names[0][0]) == ("closed-form", backend, "fish")
    np.testing.assert_allclose(
        e.maps,
        vr.explain(pictures, vr.load(files / "all-2.onnx"), targets=["fish", "top2"]).maps,
        rtol=0,
        atol=2e-3,
    )


# --- null baselines ------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("name", NULLS)
@pytest.mark.parametrize("form", ["all-2", "top3", "input"])
def test_null_baselines_are_those_of_the_model(
    demo_torch_model, files, images, expected, backend, form, name
):
    settings = {"random": {"seed": 3, "cells": 5}, "center": {"sigma": 0.3}}.get(name, {})
    classifier = vr.load(files / f"{form}.onnx", backend=backend)
    explain = classifier.backend.make_explainer(method=name, **settings)
    least = np.argsort(expected.logits, axis=1)[:, :2]  # a top3 file has no maps of these
    for targets, chosen in (
        (None, expected.logits.argmax(axis=1)[:, None]),
        (least, least),
        (lambda logits: np.argsort(logits)[:, :2], least),
    ):
        e = explain(images, targets)
        assert e.targets.tolist() == chosen.tolist()
        wanted = METHODS[name](demo_torch_model, torch.from_numpy(images), chosen, **settings)
        np.testing.assert_allclose(e.maps, wanted, rtol=0, atol=1e-6)
        np.testing.assert_allclose(e.probs, expected.probs, rtol=0, atol=1e-4)
        assert (e.maps.dtype, e.path) == (np.float32, "")
        assert e.settings == {
            "method": name,
            "model": classifier.backend.metadata.name,
            **settings,
            "backend": backend,
        }


def test_null_baselines_share_what_is_known(files, images, expected):
    explain = OnnxExplainer(files / "input.onnx").make_explainer(method="center")
    batch = Batch(images, logits=np.roll(expected.logits, 1, axis=1))
    e = explain(batch)
    assert e.targets.tolist() == batch.logits.argmax(axis=1)[:, None].tolist()
    batch = Batch(images)
    explain(batch)
    np.testing.assert_allclose(batch.logits, expected.logits, rtol=0, atol=1e-4)


@both
@pytest.mark.parametrize("form", ["all", "top3", "input"])
def test_null_baselines_of_a_graph_that_leaves_its_grid_open(
    files, tmp_path, images, backend, form
):
    graph = onnx.load(files / f"{form}.onnx")
    (scores,) = [value for value in graph.graph.output if value.name == "scores"]
    for side in scores.type.tensor_type.shape.dim[2:]:
        side.dim_param = f"side{side.dim_value}"
    onnx.save(graph, tmp_path / "open.onnx")
    explain = OnnxExplainer(tmp_path / "open.onnx", backend=backend).make_explainer(method="center")
    assert explain(images, 3).maps.shape == (5, 1, 14, 14)


def test_what_null_baselines_refuse(images):
    explainer = OnnxExplainer(ASSETS / "demo.onnx")
    for settings, words in (
        ({"method": "uniform", "kernel": "dirac"}, "uniform has no settings; got 'kernel'"),
        ({"method": "center", "score": "logit"}, "of center must be one of 'sigma'; got 'score'"),
        (
            {"method": "rollout"},
            "'reciprocam', 'deep', 'deep:fast', 'random', 'center', 'uniform', 'image_edges'; got",
        ),
    ):
        with pytest.raises(InputError, match=words):
            explainer.make_explainer(**settings)
    with pytest.raises(InputError, match=r"images must be \(B, 3, 112, 112\)"):
        explainer.make_explainer(method="center")(images[..., :96])
    with pytest.raises(UnknownClassError, match="class 12 does not exist"):
        explainer.make_explainer(method="center")(images, 12)


def test_a_null_baseline_on_the_command_line(tmp_path):
    draw_scene(0).image.save(tmp_path / "scene.png")
    command = ["explain", str(tmp_path / "scene.png"), "--model", str(ASSETS / "demo.onnx")]
    command += ["--method", "center:sigma=0.3", "--out", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["settings"] == {"method": "center", "sigma": 0.3}
    with np.load(tmp_path / "out" / "scene" / "maps.npz") as saved:
        (saliency,) = saved["maps"].reshape(-1, 14, 14)
    assert saliency[6:8, 6:8].min() == 1
    assert saliency.min() == saliency[0, 0] == 0


# --- options -------------------------------------------------------------------------------------


def test_several_streams_share_a_batch(files, images, expected):
    for name in ("all", "all-2", "input"):
        explainer = OnnxExplainer(files / f"{name}.onnx", backend="openvino", streams=2)
        agree(explainer(images, "all"), expected)
    session = explainer.session
    feeds = [{"images": images[:1], "targets": np.zeros((1, 1), np.int64)} for _ in range(4)]
    feeds[1] = {**feeds[1], "images": images[:1, :, :64]}
    with pytest.raises(ModelError, match="failed in OpenVINO"):
        session.run_all(["scores"], feeds)
    agree(explainer(images, "all"), expected)  # the runs that had begun are not in the way
    with pytest.raises(InputError, match="streams are OpenVINO's"):
        OnnxExplainer(files / "all.onnx", streams=2)


THREADS = """
import re, sys
from pathlib import Path
from vit_reciprocam.onnx.run.sessions import open_session
def running():
    return int(re.findall(r"Threads:\\s*(\\d+)", Path("/proc/self/status").read_text())[0])
import onnxruntime
before = running()
session = open_session(sys.argv[1], backend=sys.argv[2], threads=int(sys.argv[3]))
print(running() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts threads as Linux does")
def test_threads(files):
    command = [sys.executable, "-c", THREADS, str(files / "all.onnx"), "onnxruntime"]
    more = [
        int(subprocess.run([*command, str(n)], check=True, capture_output=True, text=True).stdout)
        for n in (1, 3)
    ]
    assert more == [0, 2]


def test_openvino_computes_in_float32_with_the_threads_that_it_is_told(files, monkeypatch):
    real, seen = openvino.Core.compile_model, []

    def compile_model(core, path, device, config):
        seen.append((device, config))
        return real(core, path, device, config)

    monkeypatch.setattr(openvino.Core, "compile_model", compile_model)
    for device in ("cpu", "AUTO", "HETERO:CPU"):
        open_session(files / "all.onnx", backend="openvino", device=device, threads=1)
    assert [device for device, _ in seen] == ["CPU", "AUTO", "HETERO:CPU"]
    for _, config in seen:
        assert config["INFERENCE_PRECISION_HINT"] == "f32"
        assert config["INFERENCE_NUM_THREADS"] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "tvm"}, "backend must be one of 'onnxruntime', 'openvino'; got 'tvm'"),
        ({"device": "TensorrtExecutionProvider"}, "no 'TensorrtExecutionProvider' here; available"),
        ({"device": "abacus"}, "available: .*CPUExecutionProvider"),
        ({"device": "abacus", "backend": "openvino"}, "no device 'ABACUS' here; available: .*CPU"),
        ({"device": "AUTO:ABACUS,CPU", "backend": "openvino"}, "no device 'ABACUS' here"),
        ({"threads": 0}, "threads must be 1 or more; got 0"),
        ({"streams": 0, "backend": "openvino"}, "streams must be 1 or more; got 0"),
        ({"class_names": ["a"]}, "1 class names given for a model of 12 classes"),
        ({"preprocess": vr.Preprocess((224, 224))}, "112x112 pixels and no others; .* 224x224"),
        ({"preprocess": "imagenet:size=9"}, "112x112 pixels and no others; preprocess gives 9x9"),
        ({"preprocess": "image"}, "preprocess must be one of 'imagenet', 'inception', 'clip'"),
        ({"preprocess": "clip:crop=1"}, "a setting of preprocess must be one of 'crop_pct', "),
        ({"preprocess": "clip:mean=1/2"}, "mean cannot be '1/2'"),
        ({"preprocess": "clip:size"}, "expected NAME or NAME:KEY=VALUE"),
        ({"weights": "w.safetensors"}, "has its own weights and classes: drop --weights"),
        ({"prompts": ["a cat"]}, "drop --weights and --prompt"),
        ({"img_size": 224}, "all options but backend, device"),
    ],
)
def test_options_that_do_not_fit(files, options, words):
    with pytest.raises(InputError, match=words):
        vr.load(files / "all.onnx", **options)


def test_options_of_onnx_files_are_refused_for_others():
    with pytest.raises(InputError, match="backend, threads: for ONNX files only"):
        vr.load("timm:test_vit", backend="openvino", threads=2)


def test_a_provider_that_does_not_start_is_no_silent_cpu(files, monkeypatch):
    offered = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: offered)
    with pytest.raises(
        ModelError,
        match=r"has CUDAExecutionProvider but could not start it, .* on "
        "CPUExecutionProvider instead",
    ):
        vr.load(files / "all.onnx", device="cuda")


def test_a_missing_runtime_says_how_to_install_it(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match=r"vit-reciprocam\[openvino\]"):
        vr.load(files / "all.onnx", backend="openvino")


def test_a_file_that_knows_neither_names_nor_preprocessing(tmp_path, images, preprocess):
    path = tmp_path / "other.onnx"
    insert(ASSETS / "demo-plain.onnx", path, kernel="dirac")
    with pytest.raises(InputError, match=r"does not say how pictures .* --preprocess imagenet"):
        vr.load(path)
    assert OnnxExplainer(path)(images).scores.shape == (5, 1, 14, 14), "arrays need neither"
    own = vr.load(
        path, preprocess="inception:crop_pct=1.0", class_names=[f"k{i}" for i in range(12)]
    )
    assert own.preprocess == preprocess
    e = vr.explain(draw_scene(0).image, own, targets="k3")
    assert e.names == (("k3",),)
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    draw_scene(0).image.save(tmp_path / "scene.png")
    command = ["explain", tmp_path / "scene.png", "--model", path, "--backend", "openvino"]
    command += ["--threads", "1", "--preprocess", "inception:crop_pct=1.0", "--json", "--target"]
    command += ["fish", "--class-names", tmp_path / "names.txt", "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, [str(part) for part in command])
    assert result.stderr == ""
    report = json.loads(result.stdout)
    assert report["settings"]["kernel"] == "dirac", "the file's own, when none is asked for"
    assert report["images"][0]["targets"][0]["name"] == "fish"
    result = CliRunner().invoke(app, [*map(str, command), "--kernel", "gaussian"])
    assert result.exit_code == 2
    assert "fixed when its file was written: kernel='dirac'" in result.stderr


@both
def test_evaluate_runs_files(files, tmp_path, backend):
    command = [
        "evaluate",
        "scenes:4",
        "--model",
        files / "all.onnx",
        "--backend",
        backend,
        "--json",
    ]
    command += ["--streams", "2"] if backend == "openvino" else []
    result = CliRunner().invoke(app, [*map(str, command), "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.stderr
    (about,) = json.loads(result.stdout)["models"].values()
    assert about["device"].startswith(backend)
    assert about["weights"] == digest(files / "all.onnx")
    command[3] = files / "top3.onnx"
    result = CliRunner().invoke(app, [*map(str, command), "--out", str(tmp_path / "other")])
    assert result.exit_code == 2
    assert "cannot explain" in result.stderr


def test_a_graph_that_ends_in_a_softmax(tmp_path, images, expected, preprocess):
    model = onnx.load(ASSETS / "demo-plain.onnx")
    model.graph.node.append(onnx.helper.make_node("Softmax", ["logits"], ["probabilities"]))
    model.graph.output[0].name = "probabilities"
    onnx.save(model, tmp_path / "plain.onnx")
    insert(tmp_path / "plain.onnx", tmp_path / "m.onnx", preprocess=preprocess)
    explainer = OnnxExplainer(tmp_path / "m.onnx")
    assert explainer.metadata.probabilities
    e = explainer(images)
    np.testing.assert_allclose(e.probs, expected.probs, rtol=0, atol=1e-5)
    assert e.targets.tolist() == expected.probs.argmax(axis=1)[:, None].tolist()


# --- external data -------------------------------------------------------------------------------


@both
def test_external_data(files, tmp_path, images, expected, backend):
    path, weights = tmp_path / "m.onnx", tmp_path / "weights" / "m.bin"
    weights.parent.mkdir()
    onnx.save(
        onnx.load(files / "all.onnx"),
        path,
        save_as_external_data=True,
        location="weights/m.bin",
        size_threshold=1024,
    )
    assert read_header(path).external == (weights,)
    agree(OnnxExplainer(path, backend=backend)(images, "all"), expected)
    content, before = weights.read_bytes(), digest(path)
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert digest(path) != before, "weights count, not only the graph"
    weights.write_bytes(content[:-64])
    with pytest.raises(ModelError, match=r"m\.bin, which holds weights of m\.onnx, is truncated"):
        OnnxExplainer(path, backend=backend)
    weights.unlink()
    with pytest.raises(ModelError, match=r"'weights/m\.bin', which is missing: copy"):
        OnnxExplainer(path, backend=backend)
    outside = tmp_path / "outside.bin"
    outside.write_bytes(content)
    path = tmp_path / "deeper" / "m.onnx"
    path.parent.mkdir()
    for where in ("../outside.bin", str(outside), "weights/../../outside.bin", "C:\\m.bin"):
        moved = onnx.load(tmp_path / "m.onnx", load_external_data=False)
        for weight in moved.graph.initializer:
            for entry in weight.external_data:
                entry.value = where if entry.key == "location" else entry.value
        path.write_bytes(moved.SerializeToString())
        with pytest.raises(ModelError, match="asks for weights outside its folder, in '"):
            OnnxExplainer(path, backend=backend)


# --- float16 -------------------------------------------------------------------------------------


@both
def test_a_half_precision_file(tmp_path, images, expected, backend):
    model = OnnxModel(convert_float_to_float16(onnx.load(ASSETS / "demo.onnx")))
    model.topological_sort()
    onnx.save(model.model, tmp_path / "half.onnx")
    explainer = OnnxExplainer(tmp_path / "half.onnx", backend=backend)
    assert explainer.session.inputs["images"].dtype == np.float16
    e = explainer(images, "all")
    assert (e.logits.dtype, e.scores.dtype) == (np.float32, np.float32)
    np.testing.assert_allclose(e.logits, expected.logits, rtol=0, atol=0.05)
    np.testing.assert_allclose(e.scores, expected.scores, rtol=0, atol=0.01)
