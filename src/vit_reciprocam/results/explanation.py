"""The result: maps and scores with the prediction that they explain, to be drawn and saved."""

from __future__ import annotations

import dataclasses
import functools
import html
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from vit_reciprocam.core.maps import min_max, positive_part
from vit_reciprocam.core.targets import softmax
from vit_reciprocam.errors import InputError
from vit_reciprocam.pictures import render
from vit_reciprocam.pictures.preprocess import Preprocess
from vit_reciprocam.pictures.read import ImageSource, read_image
from vit_reciprocam.results.files import npz, write_folder
from vit_reciprocam.results.pick import file_name, find_target, first_synonym, pick_targets
from vit_reciprocam.results.ranges import (
    are_beyond_rounding,
    find_ranges,
    name_with_range,
    write_caption,
)
from vit_reciprocam.results.region import find_region
from vit_reciprocam.results.show import show_pictures, write_img

__all__ = ["Explanation", "softmax"]

_SCHEMA = 1


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
            each divided by its own maximum; for methods such as "trace", their signed values. None
            with `settings["normalize"] == "minmax"` and for all else.
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

    @functools.cached_property
    def ranges(self) -> np.ndarray:
        """Lowest and highest value (B, K, 2) of what each map is scaled from.

        That is the `evidence`, if there is any, or else the `scores`. A map is scaled on its own,
        so its colours do not tell a range of 90.3 % to 90.5 % from one of 0 % to 90 %.
        """
        ranges = find_ranges(self.scores if self.evidence is None else self.evidence)
        ranges.flags.writeable = False
        return ranges

    @functools.cached_property
    def reliable(self) -> np.ndarray:
        """Whether the range of a map is wider than ten roundings of float32: (B, K) bool.

        That is 10 * eps * max(1, largest absolute logit of the image), and the range is in nats:
        for probabilities the logarithm of the highest over the lowest, else the highest minus the
        lowest. A degenerate map is not reliable. Fused evidence, whose parts are divided by their
        own maxima, and other methods' maps are reliable if they are not degenerate. A model that
        rounds more than float32, such as an ONNX file in float16 or int8, needs a wider range.
        """
        reliable = ~self.degenerate
        if not self.scores_are_maps and self._unit is not None:
            reliable &= are_beyond_rounding(self.ranges, self.logits, self._unit)
        reliable.flags.writeable = False
        return reliable

    @property
    def _unit(self) -> str | None:
        """Unit of the ranges; None for fused evidence, a sum of shares, and for other methods."""
        if self.evidence is not None:
            return None if self.scores_are_maps or "fuse" in self.settings else "nats"
        return str(self.settings.get("score", "probability"))

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
        names = ("scores", "logits", "probs", "targets", "evidence", "pictures", "sources")
        parts = {name: getattr(self, name) for name in names}
        taken: dict[str, Any] = {n: None if p is None else p[one] for n, p in parts.items()}
        return dataclasses.replace(self, **taken)

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
        against: bool = False,
    ) -> Image.Image:
        """Draw one map over its picture; in viridis bright yellow is strong and dark purple weak.

        Each map is scaled on its own, so its colours compare patches, but not classes or images;
        `ranges` says how much lies between them.

        Args:
            target: One of the K targets, by position or by class name.
            image: One of the B images, by position.
            picture: Picture to draw on: the region that the model saw, which is the default, or the
                whole picture, in which the map then covers that region only.
            colormap: Colours of the map: "viridis", "inferno", "cividis", "jet" or "gray".
            opacity: Opacity of the map, 0 to 1.
            against: True draws the signed evidence, over its largest absolute value, on the
                picture in grey, without `colormap`: orange is for the class, blue against it.

        Raises:
            InputError: If there is no such target or image, no picture to draw on, `picture` is
                neither the region nor the whole picture, or `against` asks for evidence where there
                is none.
        """
        if against and self.evidence is None:
            raise InputError(
                "against=True shows signed evidence, and this explanation has none: make it with "
                "normalize='evidence', or with method='deep:fast', which computes it"
            )
        if not 0 <= image < len(self):
            raise InputError(f"no image {image}: there are {len(self)} image(s), counted from 0")
        classes = self.class_names or self.probs.shape[1]
        position = find_target(target, self.targets[image], self.names[image], classes)
        canvas = read_image(self._picture(image) if picture is None else picture)
        seen = self.pictures[image].size if self.pictures else None
        box = find_region(canvas, seen, self.preprocess, self.scores.shape[2:])
        region, place = canvas.crop(box), (image, position)
        if against:
            drawn = render.overlay_signed(region, self.ranking[place], opacity=opacity)
        else:
            drawn = render.overlay(region, self.maps[place], colormap=colormap, opacity=opacity)
        canvas.paste(drawn, box)
        return canvas

    def grid(
        self,
        *,
        image: int = 0,
        colormap: str = "viridis",
        opacity: float = 0.55,
        against: bool = False,
    ) -> Image.Image:
        """Draw the picture and each target's overlay side by side, with class and probability.

        Below these stands the range that the map is scaled from, and below that "within rounding"
        if the map is not `reliable`. A legend says which colours are strong; each map is scaled on
        its own. If there are more than 12 targets, the 12 most probable are drawn. Arguments and
        errors are those of `overlay`.
        """
        style: dict[str, Any] = {"colormap": colormap, "opacity": opacity, "against": against}
        described = self.record(image)["targets"]
        positions = self._pick_targets(image)
        pictures, captions = [self._picture(image)], ["what the model saw"]
        if len(positions) < self.targets.shape[1]:
            captions = [f"top {len(positions)} of {self.targets.shape[1]} targets"]
        for position in positions:
            about = described[position]
            pictures.append(self.overlay(position, image=image, **style))
            captions.append(write_caption(about, first_synonym(about["name"])))
        return render.panels(pictures, captions, colormap=colormap, against=against)

    def show(self) -> None:
        """Show the grid of each image, inline in a notebook, else in the system's viewer.

        Raises:
            InputError: If there are no pictures to draw on.
        """
        show_pictures([self.grid(image=image) for image in range(len(self))])

    def _repr_html_(self) -> str:
        """Return the grid of each image as HTML, which notebooks show."""
        if self.pictures is None:
            return f"<pre>{html.escape(repr(self))}</pre>"
        figures = []
        for image in range(len(self)):
            about = self.record(image)["targets"]
            maps = (name_with_range(about[position]) for position in self._pick_targets(image))
            figures.append(write_img(self.grid(image=image), f"Saliency maps: {', '.join(maps)}"))
        return "<br>".join(figures)

    def _pick_targets(self, image: int) -> list[int]:
        """Return positions of the targets to draw: all in their order, or the most probable."""
        return pick_targets(self.probs[image, self.targets[image]])

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
        self,
        directory: str | os.PathLike[str],
        *,
        colormap: str = "viridis",
        opacity: float = 0.55,
        against: bool = False,
    ) -> Path:
        """Write overlays and grids (PNG), `maps.npz`, and at the end `manifest.json`.

        The manifest says what was run; a folder without one is incomplete. An earlier explanation
        in the same place is replaced; other files stay. If there are more than 12 targets, the
        12 most probable are drawn; `maps.npz` holds them all.

        Args:
            directory: Folder to write to; it is made if it does not exist.
            colormap: Colours of the maps, as in `overlay`.
            opacity: Opacity of the maps, 0 to 1.
            against: True draws what speaks against the classes too, as in `overlay`.

        Returns:
            The folder.

        Raises:
            InputError: If a file that is not ours is in the way, the folder cannot be written to,
                or `against` asks for evidence where there is none.
        """
        style: dict[str, Any] = {"colormap": colormap, "opacity": opacity, "against": against}
        names = ("maps", "scores", "evidence", "targets", "logits", "probs")
        files = {"maps.npz": npz({name: getattr(self, name) for name in names})}
        records = []
        for image in range(len(self)):
            record = self.record(image)
            prefix = f"{image}-" if len(self) > 1 else ""
            if self.pictures is not None:
                record["grid"] = f"{prefix}grid.png"
                files[record["grid"]] = render.png(self.grid(image=image, **style))
                for number, target in enumerate(self._pick_targets(image), 1):
                    picture = self.overlay(target, image=image, **style)
                    about = record["targets"][target]
                    about["overlay"] = f"{prefix}{number}-{file_name(about['name'])}.png"
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
        """Return the prediction and the targets of one image as plain JSON values.

        A target's "lowest" and "highest" are its `ranges`, in the "unit" probability,
        log-probability, logit or nats (evidence), or None (fused evidence, and what other methods
        give with a sign). Other methods' maps that are scaled already have none of the three.
        """

        def describe(target: int) -> dict[str, Any]:
            return {
                "index": int(target),
                "name": self.name(int(target)),
                "probability": float(self.probs[image, target]),
            }

        targets = []
        for position, target in enumerate(self.targets[image]):
            about = describe(int(target))
            about["degenerate"] = bool(self.degenerate[image, position])
            about["reliable"] = bool(self.reliable[image, position])
            if self.evidence is not None or not self.scores_are_maps:
                lowest, highest = self.ranges[image, position].tolist()
                about |= {"lowest": lowest, "highest": highest, "unit": self._unit}
            targets.append(about)
        return {
            "source": self.sources[image] if self.sources else None,
            "prediction": describe(int(self.probs[image].argmax())),
            "targets": targets,
        }
