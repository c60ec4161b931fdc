"""What the tests of insertion share: references, runs of files, refusals that leave nothing."""

import functools

import numpy as np
import onnxruntime
import pytest

import exporters
import onnx
from reference import naive_deep_logits, naive_logits
from vit_reciprocam.errors import ModelError
from vit_reciprocam.onnx.insert.insert import insert


@functools.cache
def expected(name, count, kernel="gaussian", class_token=True):
    """Return the softmax scores of the naive loops in float64."""
    model = exporters.build(name)
    _, prefix, norm, _ = exporters.MODELS[name]

    def cut(model):
        module = model.get_submodule(norm)
        return module, [module], "output"

    images = exporters.pictures(name, count)
    grid = (4, images.shape[3] // 8)
    settings = {"kernel": kernel, "class_token": class_token, "layer": "norm1"}
    masked, _ = naive_logits(model, images, grid, **settings, find_cut=cut, prefix=prefix)
    return masked.softmax(dim=1).numpy()


@functools.cache
def expected_evidence(name, count, class_token=True):
    """Return the evidence of the naive loops in float64: log p over log p without any patch."""
    _, prefix, norm, _ = exporters.MODELS[name]

    def find_cuts(model):
        module = model.get_submodule(norm)
        return [(module, [module], "output")]

    images = exporters.pictures(name, count)
    masked, null = naive_deep_logits(
        exporters.build(name),
        images,
        (4, images.shape[3] // 8),
        kernel="gaussian",
        class_token=class_token,
        depth=1,
        find_cuts=find_cuts,
        prefix=prefix,
    )
    masked, null = masked.log_softmax(dim=1), null.log_softmax(dim=1)
    return (masked - null[..., None, None]).numpy()


def run(path, images, *, optimized=True, outputs=None, **more):
    """Return the outputs of a file in ONNX Runtime, by name."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    names = [value.name for value in session.get_outputs()] if outputs is None else outputs
    return dict(zip(names, session.run(names, {name: images, **more}), strict=True))


def batch_size(path):
    size = onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0]
    return size.dim_value or 3


def score_naively(model, norm):
    """Return the logits of the naive loops for a model of the size of "vit", cut at a LayerNorm."""
    settings = {"kernel": "gaussian", "class_token": True, "layer": "norm1"}

    def cut(model):
        module = model.get_submodule(norm)
        return module, [module], "output"

    images = exporters.pictures("vit")
    masked, _ = naive_logits(model, images, (4, 4), **settings, find_cut=cut, prefix=1)
    return masked


def export_model(model, tmp_path, *, opset=17):
    path = tmp_path / "model.onnx"
    exporters.export_torchscript(model.eval(), exporters.pictures("vit"), path, opset=opset)
    return path


def correlate(scores, wanted):
    """Return the mean correlation of maps."""
    rows = (each.reshape(-1, each.shape[2] * each.shape[3]) for each in (scores, wanted))
    return np.mean([np.corrcoef(*pair)[0, 1] for pair in zip(*rows, strict=True)])


def refuses(source, tmp_path, match, error=ModelError, **options):
    """Assert that insertion fails with these words, and that no file appeared or went."""
    before = set(tmp_path.rglob("*"))
    with pytest.raises(error, match=match):
        insert(source, tmp_path / "never.onnx", **options)
    assert set(tmp_path.rglob("*")) == before
