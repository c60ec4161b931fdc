"""The result: maps and scores with the prediction that they explain, to be drawn and saved."""

from __future__ import annotations

import base64
import dataclasses
import functools
import html
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from vit_reciprocam.core.maps import min_max, positive_part
from vit_reciprocam.core.targets import find_class
from vit_reciprocam.errors import InputError
from vit_reciprocam.pictures import render
from vit_reciprocam.pictures.preprocess import Preprocess
from vit_reciprocam.pictures.read import ImageSource, read_image
from vit_reciprocam.results.files import write_folder
from vit_reciprocam.results.region import find_region

__all__ = ["MOST_DRAWN", "Explanation", "softmax"]

MOST_DRAWN = 12
"""Largest number of targets that are drawn and listed; if there are more, the most probable are."""

_SCHEMA = 1


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities over the last axis, float32."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: np.ndarray = powers / powers.sum(axis=-1, keepdims=True)
    return probabilities.astype(np.float32)


@dataclass(frozen=True, eq=False)
class Explanation:
    """Saliency maps of B images for K classes each, and the prediction they explain; read-only.

    Attributes:
        scores: Scores (B, K, h, w) float32: the target's softmax probability with only that
            patch's window kept, or its logit, see `settings["score"]`. They can be compared between
            classes and images, unlike `maps`. For other methods they are the maps themselves.
        logits: Logits (B, C) float32 of the unmasked images.
        probs: Softmax (B, C) float32 of the logits.
        targets: Explained classes (B, K) int64.
        path: Path by which the scores were computed, "closed-form" or "direct"; "" for other
            methods.
        settings: Method, model and the method's settings.
        class_names: Names of the C classes; None if not known.
        pictures: Region of each image that the model saw, RGB; None if not known.
        sources: File name of each image; None if not known.
        preprocess: Preprocessing that cut these regions out of the pictures; None if not known.
        scores_are_maps: Whether `scores` are maps already, as for other methods.
        evidence: Signed evidence (B, K, h, w) float32 in nats: log-probability of the target with
            only that patch's window kept, minus that with no patch kept. Positive speaks for the
            class, negative against it. If several settings are fused, the sum of their evidence,
            each divided by its own maximum. None with `settings["normalize"] == "minmax"` and for
            other methods.
    """

    scores: np.ndarray
    logits: np.ndarray
    probs: np.ndarray
    targets: np.ndarray
    path: str
    settings: Mapping[str, Any]
    class_names: tuple[str, ...] | None = None
    pictures: tuple[Image.Image, ...] | None = field(default=None, repr=False)
    sources: tuple[str, ...] | None = None
    preprocess: Preprocess | None = field(default=None, repr=False)
    scores_are_maps: bool = field(default=False, repr=False)
    evidence: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Make the arrays and settings read-only; the caller's own stay writeable."""
        for name in ("scores", "logits", "probs", "targets", "evidence"):
            array = getattr(self, name)
            if array is not None:
                array = array.view()
                array.flags.writeable = False
                object.__setattr__(self, name, array)
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what a pickle needs to build this again; pickles hold no read-only mappings."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return functools.partial(Explanation, **values | {"settings": dict(self.settings)}), ()

    @functools.cached_property
    def _scaled(self) -> tuple[np.ndarray, np.ndarray]:
        """Maps, and whether each is degenerate; read-only."""
        if self.evidence is not None:
            maps, degenerate = positive_part(self.evidence)
        else:
            maps, degenerate = min_max(self.scores)
            maps = self.scores.view() if self.scores_are_maps else maps
        maps.flags.writeable = degenerate.flags.writeable = False
        return maps, degenerate

    @property
    def maps(self) -> np.ndarray:
        """Maps (B, K, h, w) float32 in [0, 1]; zeros if degenerate.

        They are the `scores`, scaled from their smallest to their largest, or the positive part of
        the `evidence`, divided by its largest.
        """
        return self._scaled[0]

    @property
    def degenerate(self) -> np.ndarray:
        """Whether a map says nothing: (B, K).

        Then the target's score is the same for all patches, or no patch has positive evidence.
        """
        return self._scaled[1]

    @property
    def ranking(self) -> np.ndarray:
        """Values (B, K, h, w) that put the patches of a map in order.

        They are the signed evidence, in which patches that speak against a class differ, or else
        the maps.
        """
        return self.maps if self.evidence is None else self.evidence

    @property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """Class names of the targets, K for each of the B images."""
        return tuple(tuple(self.name(target) for target in row) for row in self.targets)

    def name(self, class_index: int) -> str:
        """Return a class's name, or one such as "class 7" if names are not known."""
        if self.class_names is None:
            return f"class {class_index}"
        return self.class_names[class_index]

    def __len__(self) -> int:
        """Return B, the number of images."""
        return len(self.scores)

    def __getitem__(self, image: int) -> Explanation:
        """Return the explanation of one image, with B = 1."""
        if not -len(self) <= image < len(self):
            raise IndexError(f"image {image} of an explanation of {len(self)} image(s)")
        one = slice(image % len(self), image % len(self) + 1)
        return dataclasses.replace(
            self,
            scores=self.scores[one],
            logits=self.logits[one],
            probs=self.probs[one],
            targets=self.targets[one],
            evidence=None if self.evidence is None else self.evidence[one],
            pictures=self.pictures and self.pictures[one],
            sources=self.sources and self.sources[one],
        )

    def __repr__(self) -> str:
        """Return shapes and the first image's targets; the arrays would fill the screen."""
        images, targets, rows, columns = self.scores.shape
        shown = ", ".join(
            f"{name} {self.probs[0, target]:.1%}"
            for name, target in list(zip(self.names[0], self.targets[0], strict=True))[:3]
        )
        more = ", …" if targets > 3 or images > 1 else ""
        return (
            f"Explanation({images} image(s) × {targets} target(s), grid {rows}×{columns}, "
            f"{self.path}: {shown}{more})"
        )

    # --- pictures -------------------------------------------------------------------------

    def overlay(
        self,
        target: int | str = 0,
        *,
        image: int = 0,
        picture: ImageSource | None = None,
        colormap: str = "viridis",
        opacity: float = 0.55,
    ) -> Image.Image:
        """Draw one map over its picture; in viridis bright yellow is strong and dark purple weak.

        Each map is scaled on its own, so its colours compare patches, but not classes or images.

        Args:
            target: One of the K targets, by position or by class name.
            image: One of the B images, by position.
            picture: Picture to draw on: the region that the model saw, which is the default, or the
                whole picture, in which the map then covers that region only.
            colormap: Colours of the map: "viridis", "inferno", "cividis", "jet" or "gray".
            opacity: Opacity of the map, 0 to 1.

        Raises:
            InputError: If there is no such target or image, no picture to draw on, or `picture` is
                neither the region nor the whole picture.
        """
        position = self._position(target, image)
        canvas = read_image(self._picture(image) if picture is None else picture)
        box = find_region(
            canvas,
            seen=self.pictures[image].size if self.pictures else None,
            preprocess=self.preprocess,
            grid=(self.scores.shape[2], self.scores.shape[3]),
        )
        drawn = render.overlay(
            canvas.crop(box), self.maps[image, position], colormap=colormap, opacity=opacity
        )
        canvas.paste(drawn, box)
        return canvas

    def grid(
        self, *, image: int = 0, colormap: str = "viridis", opacity: float = 0.55
    ) -> Image.Image:
        """Draw the picture and each target's overlay side by side, with class and probability.

        A legend says which colours are strong; each map is scaled on its own. If there are more
        than 12 targets, the 12 most probable are drawn. Arguments and errors are those of
        `overlay`.
        """
        positions = self._pick_targets(image)
        pictures, captions = [self._picture(image)], ["what the model saw"]
        if len(positions) < self.targets.shape[1]:
            captions = [f"top {len(positions)} of {self.targets.shape[1]} targets"]
        for position in positions:
            target = self.targets[image, position]
            pictures.append(self.overlay(position, image=image, colormap=colormap, opacity=opacity))
            nothing = "no preference" if self.evidence is None else "no evidence"
            flat = f" ({nothing})" if self.degenerate[image, position] else ""
            captions.append(f"{self.probs[image, target]:.1%} {_short(self.name(target))}{flat}")
        return render.panels(pictures, captions, colormap=colormap)

    def show(self) -> None:
        """Show the grid of each image, inline in a notebook, else in the system's viewer.

        Raises:
            InputError: If there are no pictures to draw on.
        """
        grids = [self.grid(image=image) for image in range(len(self))]
        try:
            from IPython import get_ipython

            in_notebook = get_ipython() is not None
        except ImportError:
            in_notebook = False
        for grid in grids:
            if in_notebook:
                from IPython.display import display

                display(grid)
            else:
                grid.show()

    def _repr_html_(self) -> str:
        """Return the grid of each image as HTML, which notebooks show."""
        if self.pictures is None:
            return f"<pre>{html.escape(repr(self))}</pre>"
        figures = []
        for image in range(len(self)):
            data = base64.b64encode(render.png(self.grid(image=image))).decode()
            names = ", ".join(self.names[image][target] for target in self._pick_targets(image))
            alt = html.escape(f"Saliency maps: {names}")
            source = f"data:image/png;base64,{data}"
            figures.append(f'<img style="max-width:100%" alt="{alt}" src="{source}">')
        return "<br>".join(figures)

    def _pick_targets(self, image: int) -> list[int]:
        """Return positions of the targets to draw: all in their order, or the most probable."""
        targets = self.targets[image]
        if len(targets) <= MOST_DRAWN:
            return list(range(len(targets)))
        best = np.argsort(-self.probs[image, targets], kind="stable")[:MOST_DRAWN]
        return [int(position) for position in best]

    def _position(self, target: int | str, image: int) -> int:
        """Return the position of a target among those of its image."""
        images, targets = self.targets.shape
        if not 0 <= image < images:
            raise InputError(f"no image {image}: there are {images} image(s), counted from 0")
        if isinstance(target, str):
            index = find_class(target, self.class_names or self.probs.shape[1])
            found = np.flatnonzero(self.targets[image] == index)
            if not len(found):
                names = ", ".join(self.names[image][:MOST_DRAWN])
                raise InputError(f"{target!r} was not explained for this image, but: {names}")
            return int(found[0])
        if not isinstance(target, (int, np.integer)) or not 0 <= target < targets:
            raise InputError(
                f"target must be a class name or a position, 0 to {targets - 1}; got {target!r}"
            )
        return int(target)

    def _picture(self, image: int) -> Image.Image:
        """Return the region that the model saw."""
        if self.pictures is None:
            raise InputError(
                "this explanation was made from tensors and has no pictures to draw on: pass "
                "picture= to overlay, or make it with vit_reciprocam.explain, which keeps them"
            )
        return self.pictures[image]

    # --- files ----------------------------------------------------------------------------

    def save(
        self, directory: str | os.PathLike[str], *, colormap: str = "viridis", opacity: float = 0.55
    ) -> Path:
        """Write overlays and grids (PNG), `maps.npz`, and at the end `manifest.json`.

        The manifest says what was run; a folder without one is incomplete. An earlier explanation
        in the same place is replaced; other files stay. If there are more than 12 targets, the
        12 most probable are drawn; `maps.npz` holds them all.

        Args:
            directory: Folder to write to; it is made if it does not exist.
            colormap: Colours of the maps, as in `overlay`.
            opacity: Opacity of the maps, 0 to 1.

        Returns:
            The folder.

        Raises:
            InputError: If a file that is not ours is in the way, or the folder cannot be written
                to.
        """
        maps = io.BytesIO()
        names = ("maps", "scores", "evidence", "targets", "logits", "probs")
        arrays = {name: getattr(self, name) for name in names}
        np.savez_compressed(maps, **{k: v for k, v in arrays.items() if v is not None})
        files = {"maps.npz": maps.getvalue()}
        records = []
        for image in range(len(self)):
            record = self.record(image)
            prefix = f"{image}-" if len(self) > 1 else ""
            if self.pictures is not None:
                record["grid"] = f"{prefix}grid.png"
                grid = self.grid(image=image, colormap=colormap, opacity=opacity)
                files[record["grid"]] = render.png(grid)
                for number, target in enumerate(self._pick_targets(image), 1):
                    picture = self.overlay(target, image=image, colormap=colormap, opacity=opacity)
                    about = record["targets"][target]
                    about["overlay"] = f"{prefix}{number}-{_slug(_short(about['name']))}.png"
                    files[about["overlay"]] = render.png(picture)
            records.append(record)
        manifest = {
            "schema": _SCHEMA,
            "settings": dict(self.settings),
            "path": self.path,
            "grid": list(self.scores.shape[2:]),
            "maps": "maps.npz",
            "images": records,
        }
        folder = Path(directory)
        write_folder(folder, files, manifest)
        return folder

    def record(self, image: int = 0) -> dict[str, Any]:
        """Return the prediction and the targets of one image as plain JSON values."""

        def describe(target: int) -> dict[str, Any]:
            return {
                "index": int(target),
                "name": self.name(int(target)),
                "probability": float(self.probs[image, target]),
            }

        return {
            "source": self.sources[image] if self.sources else None,
            "prediction": describe(int(self.probs[image].argmax())),
            "targets": [
                describe(int(target)) | {"degenerate": bool(flat)}
                for target, flat in zip(self.targets[image], self.degenerate[image], strict=True)
            ],
        }


def _short(name: str) -> str:
    """Return the first of a class's comma-separated synonyms."""
    return name.split(",")[0].strip()


def _slug(name: str) -> str:
    """Return a class name as part of a file name."""
    return re.sub(r"[^\w.-]+", "-", name)[:60].strip("-.") or "unnamed"
