"""Mosaics of pictures that a model classifies rightly, for the grid pointing game (GridPG).

Böhle, Fritz, Schiele 2021 ("Convolutional Dynamic Alignment Networks") and Rao, Böhle, Schiele 2022
("Towards Better Understanding Attribution Methods"): n x n pictures of distinct classes stand in
the cells of one picture, and a map of one of these classes should lie in its own cell.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from vit_reciprocam.classifier.classifier import Classifier
from vit_reciprocam.errors import ImageError, InputError
from vit_reciprocam.evaluate.data.datasets import (
    Item,
    Picture,
    load_ahead,
    load_batches,
    picture_digest,
)
from vit_reciprocam.evaluate.metrics.registry import Objects
from vit_reciprocam.pictures.preprocess import Preprocess
from vit_reciprocam.results.explanation import softmax

__all__ = [
    "THRESHOLD",
    "Mosaic",
    "Mosaics",
    "find_mosaics",
    "group_pictures",
    "load_mosaics",
    "shuffle",
]

THRESHOLD = 0.5
"""Least probability of the label that a picture must have to stand in a mosaic."""


@dataclass(frozen=True)
class Mosaic:
    """Pictures of distinct classes, to be drawn as one picture row by row from the top left."""

    number: int  # its place among the mosaics of its model
    items: tuple[Item, ...]  # n² of them

    @property
    def cells(self) -> list[Item]:
        """One item per cell, with the class that stands in it."""
        names = " + ".join(item.source for item in self.items)
        return [
            Item(self.number * len(self.items) + cell, f"{names}, cell {cell}", item.label)
            for cell, item in enumerate(self.items)
        ]


@dataclass(frozen=True)
class Mosaics:
    """The mosaics of one model, and what became of the other pictures."""

    mosaics: tuple[Mosaic, ...]
    confident: int  # number of pictures whose label is predicted with `THRESHOLD` or more
    failures: tuple[dict[str, Any], ...]  # source, model and error of pictures that are unreadable

    def describe(self) -> dict[str, Any]:
        """Return numbers, and the SHA-256 of which pictures stand where, as JSON values."""
        placed = [[item.index for item in mosaic.items] for mosaic in self.mosaics]
        return {
            "confident": self.confident,
            "mosaics": len(placed),
            "left_out": self.confident - sum(map(len, placed)),
            "digest": hashlib.sha256(json.dumps(placed).encode()).hexdigest(),
        }


def find_mosaics(
    classifier: Classifier,
    items: Sequence[Item],
    preprocess: Preprocess,
    n: int,
    *,
    batch_size: int,
    workers: int,
    progress: Callable[[int, int], object] | None = None,
) -> Mosaics:
    """Predict the labelled pictures of a data set, and group those that stand in n x n mosaics.

    A picture does if its label is the model's top-1, with probability `THRESHOLD` or more.

    Args:
        classifier: Model that predicts.
        items: Pictures of the data set.
        preprocess: Preprocessing with the protocol's changes.
        n: Number of pictures along each side of a mosaic.
        batch_size: Number of pictures in one call.
        workers: Number of threads that read and prepare pictures.
        progress: Function that is called after each batch with the number of pictures predicted so
            far, and of all that will be.

    Raises:
        InputError: If no picture has a label, or there are too few for one mosaic.
    """
    labelled = [item for item in items if item.label is not None]
    if not labelled:
        raise InputError(
            f"a mosaic needs pictures with labels, and none of {len(items)} has one: add a column "
            "label, or take a data set of class folders"
        )
    confident: list[Item] = []
    failures: list[dict[str, Any]] = []
    done = 0
    for batch in load_batches(labelled, preprocess, batch_size, workers):
        good = [picture for picture in batch if picture.pixels is not None]
        failures += [
            {"source": one.item.source, "model": classifier.name, "error": one.error}
            for one in batch
            if one.error
        ]
        if good:
            images = np.stack([picture.pixels for picture in good if picture.pixels is not None])
            probs = softmax(classifier.backend.predict(images))
            for picture, each in zip(good, probs, strict=True):
                if each.argmax() == picture.item.label and each.max() >= THRESHOLD:
                    confident.append(picture.item)
        done += len(batch)
        if progress is not None:
            progress(done, len(labelled))
    groups = group_pictures(shuffle(confident), n * n)
    if not groups:
        classes = len({item.label for item in confident})
        raise InputError(
            f"a {n}x{n} mosaic needs {n * n} pictures of different classes that the model predicts "
            f"rightly, with probability {THRESHOLD} or more: {classifier.name} has "
            f"{len(confident)} such picture(s) of {classes} class(es), among {len(labelled)} with "
            "labels. Take more pictures, or a smaller mosaic"
        )
    mosaics = tuple(Mosaic(number, group) for number, group in enumerate(groups))
    return Mosaics(mosaics, len(confident), tuple(failures))


def shuffle(items: Sequence[Item]) -> list[Item]:
    """Return pictures in an order that a digest of their place in the data set gives.

    Data sets are often sorted by class, and neighbours among ImageNet's classes look alike.
    """
    return sorted(items, key=lambda item: hashlib.sha256(str(item.index).encode()).digest())


def group_pictures(items: Sequence[Item], count: int) -> list[tuple[Item, ...]]:
    """Return groups of `count` pictures of distinct labels, in the order in which they are full.

    In their order, pictures go to the first group that lacks their label and a picture. Groups that
    never become full are left out.
    """
    full: list[tuple[Item, ...]] = []
    waiting: list[dict[int | None, Item]] = []  # groups as label -> picture
    for item in items:
        place = next((at for at, group in enumerate(waiting) if item.label not in group), None)
        if place is None:
            place = len(waiting)
            waiting.append({})
        waiting[place][item.label] = item
        if len(waiting[place]) == count:
            full.append(tuple(waiting.pop(place).values()))
    return full


def load_mosaics(
    mosaics: Sequence[Mosaic], preprocess: Preprocess, n: int, batch_size: int, workers: int
) -> Iterator[list[Picture]]:
    """Yield batches of mosaics, drawn ahead by `workers` threads.

    Each mosaic is n² pictures that follow each other and have the same pixels: their items are the
    mosaic's cells, and their objects the region of the cell.
    """
    load = partial(_load, preprocess=preprocess, n=n)
    for batch in load_ahead(load, mosaics, batch_size, workers):
        yield [picture for mosaic in batch for picture in mosaic]


def _load(mosaic: Mosaic, *, preprocess: Preprocess, n: int) -> list[Picture]:
    boxes = _cell_boxes(preprocess.size, n)
    height, width = preprocess.size
    whole = Image.new("RGB", (width, height))
    try:
        for item, box in zip(mosaic.items, boxes, strict=True):
            size = (box[2] - box[0], box[3] - box[1])
            # what the model saw of the picture when it was predicted; Pillow's filters antialias
            region = preprocess.region(item.read())
            whole.paste(region.resize(size, Image.Resampling.BILINEAR), box)
    except (ImageError, OSError) as error:
        return [Picture(cell, error=str(error)) for cell in mosaic.cells]
    as_it_is = dataclasses.replace(preprocess, resize="squash", crop_pct=1.0)
    digest, pixels = picture_digest(whole), as_it_is(whole)
    pictures = []
    for cell, (left, top, right, bottom) in zip(mosaic.cells, boxes, strict=True):
        mask = np.zeros((height, width), bool)
        mask[top:bottom, left:right] = True
        pictures.append(Picture(cell, digest, pixels, Objects(mask, from_boxes=False)))
    return pictures


def _cell_boxes(size: tuple[int, int], n: int) -> list[tuple[int, int, int, int]]:
    """Return (left, top, right, bottom) of n x n cells of a picture, row by row."""
    rows, columns = ([side * edge // n for edge in range(n + 1)] for side in size)
    return [
        (columns[across], rows[down], columns[across + 1], rows[down + 1])
        for down in range(n)
        for across in range(n)
    ]
