"""DeiT-Tiny's file as the docs use it: with the core alone, and in int8 and float16."""

import json
import os
import re
import shutil
import subprocess
import venv
import warnings
from pathlib import Path

import numpy as np
import pytest

import vit_reciprocam as vr
from export_demo import export_prediction
from vit_reciprocam.onnx.run.explainer import OnnxExplainer
from vit_reciprocam.pictures.read import read_image

ROOT = Path(__file__).parents[2]
RUN = (ROOT / "docs" / "onnx.md").read_text().split("\n## Run\n")[1].split("\n## ")[0]


def test_an_exported_deit_in_an_environment_with_the_core_only(
    tmp_path, shared_data, deit_tiny_weights
):
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    venv.create(tmp_path / "env", with_pip=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", ROOT]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode and not os.environ.get("VIT_RECIPROCAM_REQUIRE_DATA"):
        pytest.skip(f"the core cannot be installed here: {done.stderr.strip()[-200:]}")
    assert not done.returncode, done.stderr

    classifier = vr.load("timm:deit_tiny_patch16_224", weights=deit_tiny_weights)
    vr.export(classifier, tmp_path / "deit.onnx")
    picture = next((shared_data / "multi-object").glob("*.[jp][pn]g"))
    expected = vr.explain(picture, classifier, top=3)

    def run(*command):
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [str(part) for part in (python, *command)],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env=clean,
        )
        assert not done.returncode, done.stderr
        return done.stdout

    report = json.loads(
        run(
            "-m",
            "vit_reciprocam",
            "explain",
            picture,
            "--model",
            "deit.onnx",
            "--target",
            "top3",
            "--out",
            "out",
            "--json",
        )
    )
    names = [target["name"] for target in report["images"][0]["targets"]]
    assert names == list(expected.names[0])
    with np.load(tmp_path / report["images"][0]["folder"] / "maps.npz") as saved:
        np.testing.assert_allclose(saved["logits"], expected.logits, rtol=0, atol=1e-4)
        np.testing.assert_allclose(saved["maps"], expected.maps, rtol=0, atol=1e-3)
    heavy = ("torch", "timm", "torchvision", "transformers", "onnx", "openvino", "vit_reciprocam")
    find = f"import importlib.util as u; print([n for n in {heavy} if u.find_spec(n)])"
    assert run("-c", find).strip() == "['vit_reciprocam']"
    inside = run("-c", "import vit_reciprocam; print(vit_reciprocam.__file__)").strip()
    assert Path(inside).is_relative_to(tmp_path / "env"), "installed, not the working tree"


def test_the_recipes_for_int8_and_float16(tmp_path, monkeypatch, shared_data, deit_tiny_weights):
    """Run the recipes as the docs print them, on fewer photographs than the table of the docs."""
    classifier = vr.load("timm:deit_tiny_patch16_224", weights=deit_tiny_weights)
    export_prediction(classifier.model, tmp_path / "deit-plain.onnx", size=(224, 224))
    photographs = sorted((shared_data / "imagenet-samples").glob("*.jpg"))
    (tmp_path / "photos").mkdir()
    for photograph in photographs[::25]:
        shutil.copy(photograph, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    for recipe in re.findall(r"```python\n(.*?)```", RUN, re.DOTALL):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the converters warn
            exec(recipe, {})
    pictures = photographs[7::63]
    batch = np.stack([classifier.preprocess(read_image(one)) for one in pictures])
    expected = OnnxExplainer("deit-explained.onnx")(batch)
    for name, least, agreeing in (("int8", 0.95, 6), ("half", 0.97, 8)):
        for backend in ("onnxruntime", "openvino"):
            explainer = OnnxExplainer(f"deit-{name}-explained.onnx", backend=backend)
            e = explainer(batch, expected.targets)
            assert e.path == "closed-form"
            maps = zip(e.scores[:, 0], expected.scores[:, 0], strict=True)
            pearson = [np.corrcoef(one.ravel(), other.ravel())[0, 1] for one, other in maps]
            assert np.mean(pearson) >= least, name
            same = e.logits.argmax(axis=1) == expected.logits.argmax(axis=1)
            assert len(same) == 8
            assert same.sum() >= agreeing
    sizes = [Path(f"deit{name}.onnx").stat().st_size for name in ("-plain", "-int8", "-half")]
    assert sizes[1] < 0.4 * sizes[0]
    assert sizes[2] < 0.6 * sizes[0]
