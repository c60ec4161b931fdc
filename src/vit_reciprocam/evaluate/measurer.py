"""Measure methods on batches of pictures, and return records for the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vit_reciprocam.classifier.classifier import Classifier, Explainer
from vit_reciprocam.core.batch import Batch
from vit_reciprocam.errors import ReciproCAMError
from vit_reciprocam.evaluate.data.datasets import Picture
from vit_reciprocam.evaluate.metrics.protocols import Protocol
from vit_reciprocam.evaluate.metrics.registry import KINDS, Observation, measure
from vit_reciprocam.pictures.preprocess import Preprocess
from vit_reciprocam.results.explanation import softmax

__all__ = ["Measurer"]


@dataclass(frozen=True)
class Measurer:
    """Measures the methods of one model on pictures, and returns records for the store."""

    classifier: Classifier
    explainers: Mapping[str, Explainer]
    protocol: Protocol
    preprocess: Preprocess
    insertion: bool
    cells: int = 1  # number of pictures in a row that are the cells of one mosaic: same pixels

    def records(self, batch: Sequence[Picture]) -> list[dict[str, Any]]:
        """Return one record per picture and method, also for pictures that fail."""
        good = [picture for picture in batch if not picture.error]
        records = [
            self._begin_record(picture, method) | {"error": picture.error}
            for picture in batch
            if picture.error
            for method in self.explainers
        ]
        if good:
            pixels = [picture.pixels for picture in good if picture.pixels is not None]
            images = np.stack(pixels[:: self.cells])
            shared = self.classifier.backend.batch(images)  # what all methods need, computed once
            for method in self.explainers:
                records += self._measure(method, good, images, shared)
        return records

    def _begin_record(self, picture: Picture, method: str) -> dict[str, Any]:
        """Return the part of a record that says what was measured."""
        return {
            "index": picture.item.index,
            "source": picture.item.source,
            "digest": picture.digest,
            "model": self.classifier.name,
            "method": method,
            "label": picture.item.label,
        }

    def _measure(
        self, method: str, batch: Sequence[Picture], images: np.ndarray, shared: Batch | None
    ) -> list[dict[str, Any]]:
        """Measure one method on a batch, or picture by picture if it fails on the whole batch."""
        try:
            find = self._columns if self.cells == 1 else self._mosaic_columns
            columns = find(method, batch, images, shared)
        except ReciproCAMError as error:
            if len(images) == 1:
                return [self._begin_record(one, method) | {"error": str(error)} for one in batch]
            return [
                record
                for row in range(len(images))
                for record in self._measure(
                    method,
                    batch[row * self.cells : (row + 1) * self.cells],
                    images[row : row + 1],
                    None,
                )
            ]
        maps = columns.pop("map")
        records = []
        for row, picture in enumerate(batch):
            record = self._begin_record(picture, method)
            for name, column in columns.items():
                if not np.isnan(column[row]):
                    record[name] = column[row].tolist()
            record |= {"map": maps[row].ravel().tolist(), "rows": len(maps[row])}
            records.append(record | {"note": picture.note})
        return records

    def _columns(
        self, method: str, batch: Sequence[Picture], images: np.ndarray, shared: Batch | None
    ) -> dict[str, np.ndarray]:
        """Return the store's columns (B, ...) for one method on a batch."""
        explain = self.explainers[method]
        labels = np.array([-1 if one.item.label is None else one.item.label for one in batch])
        first = explain(
            images if shared is None else shared,
            lambda logits: self.protocol.targets(logits, labels)[:, None],
        )
        maps, targets = first.maps[:, 0], first.targets[:, 0]
        masked = explain(self.protocol.masked_images(images, maps), targets[:, None])
        seen = Observation(
            protocol=self.protocol,
            preprocess=self.preprocess,
            images=images,
            targets=targets,
            maps=maps,
            ranking=first.ranking[:, 0],
            masked_maps=masked.maps[:, 0],
            p=_pick(first.probs, targets),
            o=_pick(masked.probs, targets),
            predict=lambda x: softmax(self.classifier.backend.predict(x)),
            objects=[
                one.objects if target == one.item.label else None
                for one, target in zip(batch, targets, strict=True)
            ],
        )
        left_out = {"mosaic"} if self.insertion else {"mosaic", "order"}
        columns = measure(seen, KINDS.keys() - left_out)
        return columns | {"map": maps, "target": targets, "predicted": first.logits.argmax(axis=1)}

    def _mosaic_columns(
        self, method: str, batch: Sequence[Picture], images: np.ndarray, shared: Batch | None
    ) -> dict[str, np.ndarray]:
        """Return the store's columns (B, ...) for the cells of images (B / cells, 3, H, W).

        The maps of all classes of a mosaic come from one call.
        """
        labels = np.array([one.item.label for one in batch])
        wanted = labels.reshape(len(images), self.cells)
        found = self.explainers[method](images if shared is None else shared, wanted)
        grid = found.maps.shape[2:]
        maps = found.maps.reshape(-1, *grid)
        mosaic = np.arange(len(batch)) // self.cells  # that each cell is in
        seen = Observation(
            protocol=self.protocol,
            preprocess=self.preprocess,
            images=images[mosaic],
            targets=labels,
            maps=maps,
            ranking=found.ranking.reshape(-1, *grid),
            masked_maps=np.full_like(maps, np.nan),
            p=_pick(found.probs[mosaic], labels),
            o=np.full(len(batch), np.nan),
            predict=lambda x: softmax(self.classifier.backend.predict(x)),
            objects=[one.objects for one in batch],
        )
        columns = measure(seen, {"mosaic"})
        predicted = found.logits.argmax(axis=1)[mosaic]
        return columns | {"map": maps, "target": labels, "predicted": predicted}


def _pick(probs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the probability (B,) of each picture's target."""
    return np.take_along_axis(probs, targets[:, None], axis=1)[:, 0]
