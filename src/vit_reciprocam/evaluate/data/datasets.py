"""Data sets of labelled pictures: class folders, listings, ILSVRC2012's layout, drawn scenes.

Reading a data set finds names, labels and boxes; a picture is opened when its turn comes, while the
model computes on an earlier batch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageDraw

from vit_reciprocam.core.targets import find_class
from vit_reciprocam.errors import ImageError, InputError, UnknownClassError
from vit_reciprocam.evaluate.data.layouts import CORNERS, rows_of, rows_of_scenes
from vit_reciprocam.evaluate.metrics.registry import Objects
from vit_reciprocam.pictures.preprocess import Preprocess
from vit_reciprocam.pictures.read import read_image
from vit_reciprocam.pictures.scenes import Scene, draw_scene

__all__ = [
    "DataSet",
    "Item",
    "Labels",
    "Picture",
    "check_dataset",
    "load_ahead",
    "load_batches",
    "picture_digest",
    "read_dataset",
]

Box = tuple[float, float, float, float]
"""xmin, ymin, xmax and ymax in pixels; those at xmax and ymax still belong to the object."""

_Wanted = TypeVar("_Wanted")
_Loaded = TypeVar("_Loaded")

_SYNSET = re.compile(r"n\d{8}")
_IMAGENET_CLASSES = 1000
_AHEAD = 3  # batches that are read while one is computed
_BEYOND = 1  # pixels by which a box may leave the picture: published boxes count from 0 or 1


@dataclass(frozen=True)
class Item:
    """One picture and what is known of it."""

    index: int  # its place in the data set
    source: str  # its file, or "scene SEED"
    label: int | None = None
    boxes: tuple[Box, ...] = ()  # the label's objects
    mask: str = ""  # file with the label's objects, a picture of the same size that is 0 elsewhere
    problem: str = ""  # why it cannot be read, if that is known in advance

    def read(self) -> Image.Image:
        """Read the picture, or draw it if it is a scene."""
        if self.problem:
            raise ImageError(self.problem)
        scene = self._scene()
        return read_image(self.source) if scene is None else scene.image

    def read_objects(self, size: tuple[int, int]) -> Image.Image | None:
        """Return the label's objects, 255 in a picture in mode "L" of this size, if known."""
        scene = self._scene()
        if scene is not None:
            return Image.fromarray(scene.masks[0].astype(np.uint8) * 255)
        if self.mask:
            mask = _read_mask(self.mask)
            if mask.size != size:
                raise ImageError(
                    f"mask {self.mask} is {mask.width}x{mask.height} pixels, its picture "
                    f"{self.source} {size[0]}x{size[1]}: they must be alike"
                )
            return mask
        return self._draw_boxes(size) if self.boxes else None

    def _scene(self) -> Scene | None:
        seed = re.fullmatch(r"scene (\d+)", self.source)
        return draw_scene(int(seed[1])) if seed else None

    def _draw_boxes(self, size: tuple[int, int]) -> Image.Image:
        mask = Image.new("L", size)
        for box in self.boxes:
            left, top, right, bottom = box
            inside = 0 <= left <= right <= size[0] - 1 + _BEYOND
            if not (inside and 0 <= top <= bottom <= size[1] - 1 + _BEYOND):
                raise ImageError(
                    f"box {box} is not inside {self.source}, which is {size[0]}x{size[1]} pixels: "
                    "expected 0 <= xmin <= xmax <= width and 0 <= ymin <= ymax <= height"
                )
            ImageDraw.Draw(mask).rectangle(box, fill=255)
        return mask


@dataclass(frozen=True)
class DataSet:
    """Pictures to measure on."""

    name: str  # as the user gave it
    items: tuple[Item, ...]
    duplicates: int = 0  # number of rows that were left out because an equal one came before

    def digest(self) -> str:
        """Return the SHA-256 of names, labels, boxes and the content of masks.

        The pictures' own content is left to `picture_digest`, as they are not read yet.
        """
        summary = hashlib.sha256()
        for item in self.items:
            mask = Path(item.mask)
            content = mask.read_bytes() if item.mask and mask.is_file() else b""
            row = [Path(item.source).name, item.label, item.boxes, mask.name]
            summary.update(json.dumps(row).encode() + hashlib.sha256(content).digest())
        return summary.hexdigest()


@dataclass(frozen=True)
class Labels:
    """The classes of a model, whose names may be unknown, to be found by a data set's labels."""

    num_classes: int
    class_names: Sequence[str] | None = None

    def find(self, label: Any, where: str) -> int:
        """Return the class index of a label: an index, a WordNet synset or a class name."""
        if isinstance(label, str) and _SYNSET.fullmatch(label.strip()):
            if label.strip() in self._synsets:
                return self._synsets[label.strip()]
            raise UnknownClassError(
                f"{where}: synset {label.strip()} is not among the model's {self.num_classes} "
                "classes; synsets are known for models of ImageNet-1k's 1000 classes"
            )
        try:
            return find_class(label, self.class_names or self.num_classes)
        except InputError as error:
            raise UnknownClassError(f"{where}: {error}") from error

    @cached_property
    def _synsets(self) -> dict[str, int]:
        if self.num_classes != _IMAGENET_CLASSES:
            return {}
        try:
            from timm.data import ImageNetInfo
        except ModuleNotFoundError:
            return {}
        return {synset: index for index, synset in enumerate(ImageNetInfo().label_names())}


@dataclass(frozen=True)
class Picture:
    """A picture ready for the model, or why it is not."""

    item: Item
    digest: str = ""
    pixels: np.ndarray | None = None  # (3, H, W)
    objects: Objects | None = None
    note: str | None = None  # why there are no objects although the data set has some
    error: str = ""  # why there are no pixels


def read_dataset(
    data: str, labels: Labels, *, ground_truth: Path | None = None, boxes: Path | None = None
) -> DataSet:
    """Find the pictures of a data set, in any layout of docs/evaluation.md, "Data sets".

    Ground truth is the file with the labels of ILSVRC2012's pictures, and boxes the folder of their
    XML files. `InputError` is raised if there is no such data set, it is empty, a label is not a
    class of the model, or an annotation file is missing, damaged or not for this layout.
    """
    items: dict[Item, None] = {}
    duplicates = 0
    for number, row in enumerate(_rows(data, ground_truth, boxes)):
        item = _item(row, labels, f"{data}, row {number + 1}")
        duplicates += item in items
        items.setdefault(item)
    numbered = (replace(item, index=index) for index, item in enumerate(items))
    return DataSet(data, tuple(numbered), duplicates)


def check_dataset(
    data: str, *, ground_truth: Path | None = None, boxes: Path | None = None
) -> None:
    """Check a data set up to its first row, before a model is loaded for it."""
    _rows(data, ground_truth, boxes)


def picture_digest(picture: Image.Image) -> str:
    """Return the SHA-256 of a picture's size and pixels, whatever file format holds them."""
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()


def _rows(data: str, ground_truth: Path | None, boxes: Path | None) -> Iterator[dict[str, Any]]:
    """Return the rows of a data set in any layout; there is at least one."""
    for name, place in (("ground truth", ground_truth), ("folder of boxes", boxes)):
        if place is not None and not place.exists():
            raise InputError(f"no such {name}: {place}")
    if scenes := re.fullmatch(r"scenes:(\d+)", data):
        rows = rows_of_scenes(int(scenes[1]))
    else:
        path = Path(data)
        if not path.exists():
            raise InputError(
                f"no such data set: {data}. Expected a folder, a .csv or .parquet listing, or "
                "scenes:N"
            )
        rows = rows_of(path, ground_truth, boxes)
    first = next(rows, None)
    if first is None:
        raise InputError(f"data set {data} is empty: there is no picture in it")
    return itertools.chain([first], rows)


def _item(row: Mapping[str, Any], labels: Labels, where: str) -> Item:
    label = row.get("label") if row.get("label") not in (None, "") else row.get("synset")
    boxes = row.get("boxes") or ()
    if not boxes and all(row.get(corner) not in (None, "") for corner in CORNERS):
        boxes = [[row[corner] for corner in CORNERS]]
    try:
        boxes = json.loads(boxes) if isinstance(boxes, str) else boxes
        corners = tuple(
            (float(xmin), float(ymin), float(xmax), float(ymax)) for xmin, ymin, xmax, ymax in boxes
        )
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{where}: boxes must be [[xmin, ymin, xmax, ymax], …]; got {boxes!r}"
        ) from error
    source = str(row["image"])
    exists = source.startswith("scene ") or Path(source).is_file()
    return Item(
        index=-1,
        source=source,
        label=None if label in (None, "") else labels.find(label, where),
        boxes=corners,
        mask=str(row.get("mask") or ""),
        problem=row.get("problem", "") if exists else f"no such file: {source}",
    )


def _read_mask(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return Image.fromarray((np.asarray(image.convert("L")) > 0).astype(np.uint8) * 255)
    except Exception as error:  # Pillow's decoders raise errors of many kinds on damaged data
        raise ImageError(f"mask {path} cannot be read: {error}") from error


def load_batches(
    items: Sequence[Item], preprocess: Preprocess, batch_size: int, workers: int
) -> Iterator[list[Picture]]:
    """Yield batches of pictures in their order, while `workers` threads load the next ones."""
    return load_ahead(partial(_load, preprocess=preprocess), items, batch_size, workers)


def load_ahead(
    load: Callable[[_Wanted], _Loaded], wanted: Sequence[_Wanted], batch_size: int, workers: int
) -> Iterator[list[_Loaded]]:
    """Yield batches of what `load` returns, while `workers` threads load the next ones."""
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Any] = deque()
        for start in range(0, len(wanted), batch_size):
            batch = wanted[start : start + batch_size]
            ahead.append([pool.submit(load, one) for one in batch])
            if len(ahead) > _AHEAD:
                yield [future.result() for future in ahead.popleft()]
        for futures in ahead:
            yield [future.result() for future in futures]


def _load(item: Item, preprocess: Preprocess) -> Picture:
    try:
        picture = item.read()
        digest, pixels = picture_digest(picture), preprocess(picture)
    except (ImageError, OSError) as error:
        return Picture(item, error=str(error))
    try:
        drawn = item.read_objects(picture.size)
    except (ImageError, OSError) as error:
        return Picture(item, digest, pixels, note=str(error))
    if drawn is None:
        return Picture(item, digest, pixels)
    # interpolated linearly, a pixel's grey level is the share of it that the objects cover
    linear = replace(preprocess, interpolation="bilinear")
    grey = np.asarray(linear.view(drawn))
    mask = grey > 127
    if not mask.any():  # objects too small to cover half of a pixel get every pixel they touch
        mask = grey > 0
    if not mask.any():
        note = "the objects lie outside the part that the model sees"
        return Picture(item, digest, pixels, note=note)
    objects = Objects(mask, from_boxes=bool(item.boxes) and not item.mask)
    return Picture(item, digest, pixels, objects)
