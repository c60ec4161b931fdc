"""Run folders for tests of tables and reports, and the one that an earlier version wrote."""

import hashlib
import json
from pathlib import Path

import numpy as np

from vit_reciprocam.evaluate.data.datasets import Item
from vit_reciprocam.evaluate.metrics.protocols import PROTOCOLS
from vit_reciprocam.evaluate.store import RunFolder
from vit_reciprocam.methods import MethodSpec
from vit_reciprocam.pictures.preprocess import Preprocess

# evaluate("scenes:4", [load("demo")], ["reciprocam", "center", "random"], insertion=True), as
# version 0.1.0 wrote it at its first commit with rooms. The file beside it has that version's
# summaries, and the figures and differences of its tables with 50 resamples: [value, low, high].
OLD_RUN = Path(__file__).parent / "data" / "run-0.1.0"
EXPECTED = json.loads(OLD_RUN.with_name("run-0.1.0.json").read_text())

VARIANTS = ["reciprocam", "reciprocam:kernel=dirac", "reciprocam:class_token=false", "center"]


NASTY = r"my_50%&#$~^\{model}|<script>alert(1)</script>"  # a model's name


def digest(picture):
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()


SCENE = digest(Item(0, "scene 800000").read())  # every picture is this one unless it says else


def figures(random, pictures):
    """One method's columns, in fractions: what a picture's record must have."""
    p, o, coherency, complexity = random.uniform(0.05, 0.95, size=(4, pictures))
    drop = np.maximum(0, p - o) / p
    return {
        "p": p,
        "o": o,
        "drop": drop,
        "increase": (o > p).astype(float),
        "coherency": coherency,
        "complexity": complexity,
        "adcc": 3 / (1 / coherency + 1 / (1 - complexity) + 1 / (1 - drop)),
    }


def write_run(
    path,
    columns,
    *,
    model="demo",
    protocol="byun2023",
    sources=None,
    failed=(),
    finished=True,
    data="d",
    weights="w" * 64,
    versions=None,
    digests=None,
    seed=0,
):
    """A run's folder with the given columns for each method, maps drawn at random."""
    random = np.random.default_rng(seed)
    pictures = len(next(iter(columns.values()))["drop"])
    sources = sources or ["scene 800000"] * pictures
    settings = {
        "protocol": PROTOCOLS[protocol].to_dict(),
        "insertion": False,
        "data": {"name": f"data/{data}", "digest": data * 32, "pictures": pictures},
        "models": {model: {"weights": weights, "preprocess": Preprocess((112, 112)).to_dict()}},
        "methods": {
            method: {"method": MethodSpec.parse(method).name, **MethodSpec.parse(method).settings}
            for method in columns
        },
        "versions": versions or {"vit-reciprocam": "0.1.0", "numpy": "2"},
    }
    records = [
        {
            "index": index,
            "source": sources[index],
            "digest": digests[index] if digests else SCENE,
            "model": model,
            "method": method,
            "label": 3,
            "target": 3,
            "predicted": 4,
            "map": random.random(49).tolist(),
            "rows": 7,
            **{
                name: None if np.isnan(values[index]) else float(values[index])
                for name, values in each.items()
            },
        }
        for method, each in columns.items()
        for index in range(pictures)
        if index not in failed
    ]
    records += [
        {"index": index, "source": "gone", "model": model, "method": method, "error": "it is gone"}
        for method in columns
        for index in failed
    ]
    with RunFolder.open(path, settings) as run:
        run.write(records)
        if finished:
            run.finish({"duplicates": 0})
    return path


def write_default_run(path):
    """A run of four methods, 40 pictures, insertion and deletion, and objects known of half."""
    random = np.random.default_rng(1)
    columns = {method: figures(random, 40) for method in VARIANTS}
    known = random.random(40) < 0.5
    for each in columns.values():
        each |= {"insertion": random.random(40), "deletion": random.random(40)}
        each["pointing_game"] = np.where(known, random.integers(2, size=40), np.nan)
    return write_run(path, columns)


def rows_of(table):
    return {row.method: row for row in table.models[0].rows}


def columns_for(*methods, pictures=6):
    random = np.random.default_rng(0)
    return {method: figures(random, pictures) for method in methods}


def estimates(found):
    return {name: [one.value, one.low, one.high] for name, one in found.items()}
