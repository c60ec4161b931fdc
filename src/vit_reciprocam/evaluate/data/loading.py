"""Load batches of pictures for the model, while it computes on an earlier batch."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from vit_reciprocam.errors import ImageError
from vit_reciprocam.evaluate.data.datasets import Item, picture_digest
from vit_reciprocam.evaluate.metrics.registry import Objects
from vit_reciprocam.pictures.preprocess import Preprocess

__all__ = ["Picture", "load_batches"]

_AHEAD = 3  # batches that are read while one is computed


@dataclass(frozen=True)
class Picture:
    """A picture ready for the model, or why it is not."""

    item: Item
    digest: str = ""
    pixels: np.ndarray | None = None  # (3, H, W)
    objects: Objects | None = None
    note: str | None = None  # why there are no objects although the data set has some
    error: str = ""  # why there are no pixels


def load_batches(
    items: Sequence[Item], preprocess: Preprocess, batch_size: int, workers: int
) -> Iterator[list[Picture]]:
    """Yield batches of pictures in their order, while `workers` threads load the next ones."""
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Any] = deque()
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            ahead.append([pool.submit(_load, item, preprocess) for item in batch])
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
    linear = dataclasses.replace(preprocess, interpolation="bilinear")
    grey = np.asarray(linear.view(drawn))
    mask = grey > 127
    if not mask.any():  # objects too small to cover half of a pixel get every pixel they touch
        mask = grey > 0
    if not mask.any():
        note = "the objects lie outside the part that the model sees"
        return Picture(item, digest, pixels, note=note)
    objects = Objects(mask, from_boxes=bool(item.boxes) and not item.mask)
    return Picture(item, digest, pixels, objects)
