"""Files that cannot be run: not ONNX, damaged, contradicting themselves, beyond the runtime."""

import json

import numpy as np
import pytest

import onnx
import vit_reciprocam as vr
from vit_reciprocam.classifier.load import ASSETS
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.onnx.run.explainer import OnnxExplainer
from vit_reciprocam.pictures.scenes import draw_scene

both = pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
WHOLE = (ASSETS / "demo.onnx").read_bytes()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"no such model file: .*m\.onnx"),
        (b"", r"m\.onnx is empty \(0 bytes\)"),
        (b"hello, this is text", r"is not an ONNX file: it begins with b'hello"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9",
            "is not an ONNX file",
        ),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "is not an ONNX file"),
        (WHOLE[: len(WHOLE) // 2], "is truncated or damaged: fetch or write it anew"),
        (WHOLE[:-1], "is truncated or damaged"),
        (WHOLE[:2], "is truncated or damaged: it holds no graph"),
        ((ASSETS / "demo-plain.onnx").read_bytes(), "holds no explanation. `vit-reciprocam insert"),
    ],
)
@both
def test_files_that_are_none(tmp_path, content, words, backend):
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=words):
        vr.load(path, backend=backend)


def changed(folder, change, **about):
    """Write the demo file with its graph and its metadata changed."""
    model = onnx.load(ASSETS / "demo.onnx")
    change(model)
    (property_,) = model.metadata_props
    property_.value = json.dumps(json.loads(property_.value) | about)
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def nothing(model):
    pass


def custom_operator(model):
    model.graph.node[0].domain = "com.example"
    model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))


def newer(model):
    model.opset_import[0].version = 999


def without_scores(model):
    (scores,) = [value for value in model.graph.output if value.name == "scores"]
    model.graph.output.remove(scores)


def five_dimensions(model):
    model.graph.input[0].type.tensor_type.shape.dim.add().dim_value = 1


@both
@pytest.mark.parametrize(
    ("change", "about", "words"),
    [
        (custom_operator, {}, r"of opset 18, cannot be loaded by \w+ ?\w* [\d.]+: .*upgrade"),
        (nothing, {"class_names": ["a", "b"]}, "2 class names by the metadata, 12 classes in the"),
        (nothing, {"class_names": "abcdefghijkl"}, "class_names have to be text"),
        (nothing, {"path": "winding"}, "path must be one of"),
        (nothing, {"targets": "best"}, "cannot be read.*targets of a file"),
        (nothing, {"logits": "prediction"}, r"outputs \['prediction', 'scores'\] by the metadata"),
        (without_scores, {}, r"outputs \['logits', 'scores'\] by the metadata, \['logits', 'sal"),
        (nothing, {"images": "pixels"}, r"inputs \['pixels'\] by the metadata, \['images'\] in"),
        (nothing, {"targets": "input"}, r"inputs \['images', 'targets'\] by the metadata"),
        (nothing, {"targets": "top3"}, r"outputs \['classes', 'logits', 'scores'\]"),
        (
            nothing,
            {"preprocess": vr.Preprocess((64, 112)).to_dict()},
            r"pictures of \(64, 112\) by the metadata, \(112, 112\) in the graph",
        ),
        (
            nothing,
            {"schema": 1},
            r"written by vit-reciprocam [\d.]+, in a layout that this version does not read",
        ),
        (nothing, {"masking": {"kernel": "disk"}}, "kernel must be one of|cannot be read"),
    ],
)
def test_files_that_contradict_themselves(tmp_path, change, about, words, backend):
    with pytest.raises((ModelError, InputError), match=words):
        OnnxExplainer(changed(tmp_path, change, **about), backend=backend)


def test_an_opset_that_the_runtime_lacks(tmp_path):
    with pytest.raises(ModelError, match=r"of opset 999, cannot be loaded by ONNX Runtime .*lower"):
        OnnxExplainer(changed(tmp_path, newer))


def any_size(model):
    for side in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        side.dim_param = f"side{side.dim_value}"


@both
def test_pictures_of_the_wrong_size(tmp_path, backend):
    preprocess = vr.load("demo").preprocess
    images = np.stack([preprocess(draw_scene(seed).image) for seed in range(5)])
    explainer = OnnxExplainer(ASSETS / "demo.onnx", backend=backend)
    with pytest.raises(InputError, match=r"must be \(B, 3, 112, 112\), got \(5, 3, 112, 96\)"):
        explainer(images[..., :96])
    open_size = OnnxExplainer(changed(tmp_path, any_size), backend=backend)
    assert open_size.size is None
    np.testing.assert_allclose(
        open_size(images).logits, explainer(images).logits, rtol=0, atol=1e-5
    )
    with pytest.raises(ModelError, match=r"m\.onnx failed in O"):
        open_size(images[..., :96])
    with pytest.raises(InputError, match=r"must be \(B, 3, H, W\), got \(5, 1, 112, 112\)"):
        open_size(images[:, :1])
