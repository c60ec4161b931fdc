"""The layouts of data sets on disk, each read into rows with the columns of a listing.

A row has the column image, the picture's path, and may have the columns label or synset, boxes or
its four corners, mask, and problem. `datasets` says what they mean.
"""

from __future__ import annotations

import contextlib
import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from pyarrow import parquet

from vit_reciprocam.errors import ImageError, InputError
from vit_reciprocam.pictures.read import find_images
from vit_reciprocam.pictures.scenes import CLASSES, draw_scene
from vit_reciprocam.results.files import holds_results, is_ours

__all__ = ["CORNERS", "rows_of", "rows_of_scenes"]

CORNERS = ("xmin", "ymin", "xmax", "ymax")
_FIRST_SCENE = 800_000  # seeds of scenes on which the bundled model was neither trained nor tested
_GROUND_TRUTH = (
    "LOC_val_solution.csv",
    "val.txt",
    "imagenet_2012_validation_synset_labels.txt",
    "ILSVRC2012_validation_ground_truth.txt",
)


def rows_of(path: Path, ground_truth: Path | None, boxes: Path | None) -> Iterator[dict[str, Any]]:
    """Return the rows of a data set on disk, in any layout of `datasets.read_dataset`."""
    if path.is_file() and path.suffix.lower() not in (".csv", ".parquet"):
        raise InputError(f"{path} is not a listing: expected a .csv or .parquet file")
    listings = [path, path / "labels.csv", path / "labels.parquet"]
    listing = next((file for file in listings if file.is_file()), None)
    has_annotations = ground_truth is not None or boxes is not None
    if listing is not None:
        if has_annotations:
            raise InputError(
                "ground truth and boxes are for ILSVRC2012's pictures; the listing "
                f"{listing} must hold its own"
            )
        return _listing(listing)
    if ground_truth is None:
        places = (path, path.parent, path / "data", path.parent / "data")
        candidates = (folder / name for name in _GROUND_TRUTH for folder in places)
        ground_truth = next((file for file in candidates if file.is_file()), None)
    flat = sorted(file for file in path.iterdir() if file.suffix.lower() in (".jpeg", ".jpg"))
    if flat and ground_truth is not None:
        return _ilsvrc(flat, ground_truth, boxes)
    if has_annotations:
        raise InputError(
            f"ground truth and boxes are for ILSVRC2012's pictures: expected .JPEG files in {path} "
            "and their ground truth"
        )
    return _class_folders(path)


def rows_of_scenes(count: int) -> Iterator[dict[str, Any]]:
    """Yield rows of drawn scenes, each labelled by its first object."""
    for seed in range(_FIRST_SCENE, _FIRST_SCENE + count):
        yield {"image": f"scene {seed}", "label": list(CLASSES)[draw_scene(seed).labels[0]]}


def _listing(path: Path) -> Iterator[dict[str, Any]]:
    for row in _read_table(path):
        image = str(row.get("image") or "").strip()
        if not image:
            raise InputError(
                f"{path} has no column image, or a row without it; its columns: {', '.join(row)}"
            )
        mask = str(row.get("mask") or "").strip()
        yield {
            **row,
            "image": str(path.parent / image),
            "mask": mask and str(path.parent / mask),
        }


def _read_table(path: Path) -> list[dict[str, Any]]:
    if path.suffix.lower() == ".csv":
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                return list(csv.DictReader(file))
        except (ValueError, csv.Error) as error:
            raise InputError(f"{path} is not a CSV file in UTF-8: {error}") from error
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as Parquet: {error}") from error
    return [{key: _undo_float(value) for key, value in row.items()} for row in rows]


def _undo_float(value: Any) -> Any:
    """Return a whole float as int and NaN as None: pandas makes floats of integers with gaps."""
    if isinstance(value, float):
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    return value


def _class_folders(path: Path) -> Iterator[dict[str, Any]]:
    folders = sorted(
        folder
        for folder in path.iterdir()
        if folder.is_dir()
        and not folder.name.startswith(".")
        and not any(is_ours(folder / name) for name in ("run.json", "manifest.json"))
    )
    if not folders:
        raise InputError(
            f"{path} is not a data set: it holds neither class folders nor labels.csv, nor "
            f"ILSVRC2012's pictures with one of {', '.join(_GROUND_TRUTH)}"
        )
    for folder in folders:
        with contextlib.suppress(ImageError):  # a folder without pictures is not a class
            for file in find_images([folder], skip=holds_results):
                yield {"image": str(file), "label": folder.name}


def _ilsvrc(
    files: Sequence[Path], ground_truth: Path, boxes: Path | None
) -> Iterator[dict[str, Any]]:
    try:
        truth = _read_ground_truth(ground_truth, files)
    except (IndexError, KeyError, UnicodeDecodeError) as error:
        raise InputError(
            f"{ground_truth} is damaged or not a ground-truth file: {error!r}"
        ) from error
    if boxes is not None and not any((boxes / f"{file.stem}.xml").is_file() for file in files):
        raise InputError(f"{boxes} has no box file of these pictures, such as {files[0].stem}.xml")
    for file in files:
        row = {"image": str(file), **truth[file.stem]}
        if boxes is not None and (boxes / f"{file.stem}.xml").is_file():
            row |= _xml_boxes(boxes / f"{file.stem}.xml", str(row.get("synset") or ""))
        yield row


def _read_ground_truth(path: Path, files: Sequence[Path]) -> Mapping[str, dict[str, Any]]:
    """Return file name without ending -> label, or synset and perhaps boxes."""
    lines = path.read_text(encoding="utf-8").split("\n")
    lines = [line.strip() for line in lines if line.strip()]
    found: dict[str, dict[str, Any]] = {}
    if path.suffix.lower() == ".csv":  # ImageId, "synset xmin ymin xmax ymax synset …"
        for line in lines[1:]:
            stem, _, prediction = line.partition(",")
            words = prediction.split()
            corners = [words[i + 1 : i + 5] for i in range(0, len(words), 5)]
            found[stem] = {"synset": words[0], "boxes": corners}
    elif len(lines[0].split()) == 2:  # FILE INDEX
        for line in lines:
            words = line.split()
            found[Path(words[0]).stem] = {"label": words[1]}
    else:  # one synset per line, in the order of the files' numbers
        if len(lines) != len(files):
            raise InputError(
                f"{path} has {len(lines)} lines for {len(files)} pictures: expected one per "
                "picture, in the order of their names"
            )
        if lines[0].isdigit():
            raise InputError(
                f"{path} numbers classes as the development kit does, which is not the models' "
                "order, and the kit's meta.mat, which translates them, is not read. Give one "
                "synset per line, or lines of FILE and class INDEX, or a .csv listing with the "
                "columns image and synset, or class folders named by synset"
            )
        for file, line in zip(files, lines, strict=True):
            found[file.stem] = {"synset": line}
    missing = [file.name for file in files if file.stem not in found]
    if missing:
        raise InputError(f"{path} has no label for {len(missing)} picture(s), such as {missing[0]}")
    return found


def _xml_boxes(path: Path, synset: str) -> dict[str, Any]:
    """Return the boxes of a synset in a Pascal VOC annotation file; all boxes if it is ""."""
    try:
        objects = list(ElementTree.parse(path).getroot().iter("object"))
    except ElementTree.ParseError as error:
        return {"problem": f"box file {path} is damaged: {error}"}
    boxes = [one.find("bndbox") for one in objects if one.findtext("name") == synset or not synset]
    return {
        "boxes": [[box.findtext(corner) for corner in CORNERS] for box in boxes if box is not None]
    }
