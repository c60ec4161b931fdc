"""Explain by an ONNX file in ONNX Runtime or OpenVINO: NumPy in, NumPy out, no torch."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_reciprocam.core.batch import Batch
from vit_reciprocam.core.masks import Masking, describe_maskings, read_maskings
from vit_reciprocam.core.targets import resolve_targets
from vit_reciprocam.errors import InputError, ModelError, check_choice
from vit_reciprocam.methods import PRESETS
from vit_reciprocam.methods.null import NULLS, check_keywords, null_maps
from vit_reciprocam.onnx.contract import Metadata, check_classes, check_file_targets
from vit_reciprocam.onnx.run.protobuf import digest, read_header
from vit_reciprocam.onnx.run.sessions import open_session
from vit_reciprocam.pictures.preprocess import Preprocess
from vit_reciprocam.results.explanation import Explanation, softmax

__all__ = ["OnnxExplainer"]


class OnnxExplainer:
    """An explainer that runs a file written by `export` or `insert`; its graph fixes the settings.

    Attributes:
        path: Path of the file.
        metadata: Metadata of the file, which describe what its graph computes.
        session: Session of the file in its runtime.
        preprocess: Preprocessing of pictures for the model; None if not known.
        class_names: Names of the classes; None if not known.
        num_classes: Number C of classes.
        size: Height and width of the images that the graph takes; None if it takes any.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        backend: str = "onnxruntime",
        device: str = "cpu",
        threads: int | None = None,
        streams: int | None = None,
        preprocess: Preprocess | str | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        """Open a file, and check that its graph is what its metadata says.

        Preprocessing and class names take the place of the file's own; `Preprocess.parse` reads the
        former if it is text. The other options are those of `open_session`.
        """
        self.path = Path(path)
        self.metadata = Metadata.from_properties(read_header(path).properties, file=str(path))
        self.threads = threads
        self._options: dict[str, Any] = {"backend": backend, "device": device, "streams": streams}
        self.session = open_session(path, threads=threads, **self._options)
        self._top = check_file_targets(self.metadata.targets)
        self.size = self._check_graph()
        self.num_classes = self._count_classes()
        check_classes(self.num_classes, class_names)
        own = self.metadata.class_names
        if class_names is None and own is not None and len(own) != self.num_classes:
            raise self._contradiction(f"{len(own)} class names", f"{self.num_classes} classes")
        self.class_names = own if class_names is None else tuple(class_names)
        self.preprocess = self._check_preprocess(preprocess)

    def options(self) -> dict[str, Any]:
        """Return the arguments that open the same file again, as plain JSON values."""
        return {"path": str(self.path), "threads": self.threads, **self._options}

    @property
    def device(self) -> str:
        """Runtime and device that compute, such as "openvino CPU"."""
        return f"{self.session.backend} {self.session.device}"

    def digest(self) -> str:
        """Return the SHA-256 of the file and of the files that hold its weights."""
        return digest(self.path)

    def make_explainer(
        self, *, method: str = "reciprocam", check: bool = True, **settings: Any
    ) -> Callable[..., Explanation]:
        """Return an explainer for the ReciproCAM in the graph, or for a null baseline in `NULLS`.

        The settings are those that the graph was written with, or those of the null baseline.
        `check` has no effect, since a file is checked when it is opened.
        """
        check_choice("method of an ONNX file", method, ("reciprocam", *PRESETS, *NULLS))
        if method == "reciprocam" or method in PRESETS:
            self._check_reciprocam(**{**PRESETS.get(method, {}), **settings})
            return self
        check_keywords(method, NULLS[method].draw, settings)
        return functools.partial(self._explain_by_null, method, settings)

    def _check_reciprocam(
        self,
        *,
        score: str = "probability",
        path: str = "auto",
        normalize: str | None = None,
        fuse: Sequence[Mapping[str, Any]] = (),
        **masking: Any,
    ) -> None:
        """Refuse settings of `ReciproCAM` other than those in the graph."""
        allowed = ("kernel", "class_token", "layer", "depth", "score", "normalize", "fuse", "path")
        for name in masking:
            check_choice("a setting", name, allowed)
        check_choice("path", path, ("auto", self.metadata.path))
        have = self.metadata
        wanted = have.maskings
        if masking or fuse:
            wanted = read_maskings(Masking(**masking), "evidence", fuse)
        if (
            wanted != have.maskings
            or score != "probability"
            or normalize
            not in (
                None,
                have.normalize,
            )
        ):
            settings = describe_maskings(have.maskings) | {"normalize": have.normalize}
            fixed = ", ".join(f"{name}={value!r}" for name, value in settings.items())
            raise InputError(
                f"the maps of model {have.name!r} were fixed when its file was written: {fixed}, "
                "score='probability'. Write the file anew with other settings, or explain the "
                "PyTorch model, for example --model timm:NAME"
            )

    @property
    def model(self) -> OnnxExplainer:
        """This object: an explained file is a model that explains itself."""
        return self

    def batch(self, images: np.ndarray | Batch) -> Batch:
        """Return preprocessed images (B, 3, H, W) as a `Batch`, which several explainers share."""
        return images if isinstance(images, Batch) else Batch(self._check_images(images))

    def predict(self, images: np.ndarray | Batch) -> np.ndarray:
        """Return the logits (B, C) float32 of preprocessed images."""
        batch = self.batch(images)
        if batch.logits is None:
            feeds = {self.metadata.images: batch.images}
            if self.metadata.targets == "input":
                feeds["targets"] = np.zeros((len(batch), 1), np.int64)
            (logits,) = self.session.run([self.metadata.logits], feeds)
            batch.logits = self._as_logits(logits)
        return batch.logits

    def __call__(self, images: np.ndarray | Batch, targets: Any = None) -> Explanation:
        """Explain preprocessed images (B, 3, H, W) float32, or a `Batch` of them.

        The targets are as in `ReciproCAM`; if the file explains the most probable classes only,
        they must be among these. If a batch has logits already, a file with an input for targets
        needs no extra run to find each image's top classes.
        """
        batch = self.batch(images)
        run = self._run_for if self.metadata.targets == "input" else self._run_and_pick
        logits, scores, chosen = run(batch, targets)
        settings = describe_maskings(self.metadata.maskings)
        settings |= {"score": "probability", "normalize": self.metadata.normalize}
        scores = scores.astype(np.float32, copy=False)
        return self._explanation("reciprocam", settings, scores, logits, chosen)

    def _explain_by_null(
        self,
        method: str,
        settings: dict[str, Any],
        images: np.ndarray | Batch,
        targets: Any = None,
    ) -> Explanation:
        """Explain by a null baseline's maps, which are the same for every target."""
        batch = self.batch(images)
        logits = self.predict(batch)
        chosen = resolve_targets(targets, logits)
        rows, columns = self.session.outputs["scores"].shape[2:]
        if rows is None or columns is None:  # the graph leaves the grid open
            rows, columns = self(batch.images[:1]).scores.shape[2:]
        maps = null_maps(method, batch.images, (rows, columns), **settings)
        scores = np.repeat(maps[:, None], chosen.shape[1], axis=1)
        return self._explanation(method, settings, scores, logits, chosen)

    def _explanation(
        self,
        method: str,
        settings: dict[str, Any],
        scores: np.ndarray,
        logits: np.ndarray,
        targets: np.ndarray,
    ) -> Explanation:
        about = {"method": method, "model": self.metadata.name}
        return Explanation(
            scores=scores,
            scores_are_maps=method != "reciprocam",
            evidence=scores
            if method == "reciprocam" and self.metadata.normalize == "evidence"
            else None,
            logits=logits,
            probs=softmax(logits),
            targets=targets,
            path=self.metadata.path if method == "reciprocam" else "",
            settings=about | settings | {"backend": self.session.backend},
        )

    def _run_for(self, batch: Batch, targets: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return logits, scores and targets of a file with an input for targets."""
        if targets is None or callable(targets):
            known = self.predict(batch)
        else:  # only the shape of the logits matters
            known = np.empty((len(batch), self.num_classes))
        chosen = resolve_targets(targets, known)
        feeds = {self.metadata.images: batch.images, "targets": chosen}
        logits, scores = self.session.run([self.metadata.logits, "scores"], feeds)
        return self._as_logits(logits), scores, chosen

    def _run_and_pick(
        self, batch: Batch, targets: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return logits, scores and targets of a file whose graph chooses the classes."""
        names = [self.metadata.logits, "scores"] + ["classes"] * (self._top is not None)
        logits, scores, *classes = self.session.run(names, {self.metadata.images: batch.images})
        logits = self._as_logits(logits)
        chosen = resolve_targets(targets, logits)
        if not classes and isinstance(targets, str):  # "all" wants every class, in order
            return logits, scores, chosen
        places = chosen
        if classes:
            found = chosen[:, :, None] == classes[0][:, None, :]
            missing = np.argwhere(~found.any(axis=2))
            if len(missing):
                image, column = missing[0]
                raise InputError(
                    f"class {chosen[image, column]} is not among the {self._top} most probable of "
                    f"image {image}, {classes[0][image].tolist()}, and {self.path} explains no "
                    "others: ask for these (top=, on the command line --target top"
                    f"{self._top}), or write the file anew for all classes or with them as an "
                    "input"
                )
            places = found.argmax(axis=2)
        return logits, np.take_along_axis(scores, places[:, :, None, None], axis=1), chosen

    def _as_logits(self, prediction: np.ndarray) -> np.ndarray:
        """Return the prediction as float32 logits; probabilities become their logarithms."""
        values = prediction.astype(np.float32, copy=False)
        if not self.metadata.probabilities:
            return values
        return np.log(np.maximum(values, np.finfo(np.float32).tiny))

    def _check_images(self, images: np.ndarray) -> np.ndarray:
        """Return images in the dtype of the graph, if they fit it."""
        height, width = self.size or (None, None)
        fits = images.ndim == 4 and len(images) and images.shape[1] == 3
        if not fits or (self.size and images.shape[2:] != self.size):
            want = f"(B, 3, {height or 'H'}, {width or 'W'})"
            raise InputError(f"images must be {want}, got {images.shape}")
        if not np.isfinite(images).all():
            raise InputError("images hold NaN or infinity")
        return images.astype(self.session.inputs[self.metadata.images].dtype, copy=False)

    def _check_preprocess(self, given: Preprocess | str | None) -> Preprocess | None:
        """Return the preprocessing, given or the file's own, if it fits the graph."""
        if isinstance(given, str):
            given = Preprocess.parse(given, size=self.size)
        own = self.metadata.preprocess
        if own is not None and self.size and own.size != self.size:
            raise self._contradiction(f"pictures of {own.size}", f"{self.size}")
        if given is not None and self.size and given.size != self.size:
            raise InputError(
                f"{self.path} takes pictures of {self.size[0]}x{self.size[1]} pixels and no "
                f"others; preprocess gives {given.size[0]}x{given.size[1]}"
            )
        return own if given is None else given

    def _check_graph(self) -> tuple[int, int] | None:
        """Return the size of images that the graph takes; None if it takes any."""
        about, inputs, outputs = self.metadata, self.session.inputs, self.session.outputs
        wanted, needed = {about.images}, {about.logits, "scores"}
        if about.targets == "input":
            wanted.add("targets")
        if self._top is not None:
            needed.add("classes")
        if set(inputs) != wanted:
            raise self._contradiction(f"inputs {sorted(wanted)}", f"{sorted(inputs)}")
        if not needed <= set(outputs):
            raise self._contradiction(f"outputs {sorted(needed)}", f"{sorted(outputs)}")
        images, scores = inputs[about.images], outputs["scores"]
        if len(images.shape) != 4 or images.shape[1] not in (3, None) or images.dtype.kind != "f":
            raise self._contradiction(
                f"pictures (B, 3, H, W) as floats in {about.images!r}",
                f"{images.dtype} of {images.shape}",
            )
        classes = outputs[about.logits].shape[-1]
        kept = {"all": classes, "input": None}.get(about.targets, self._top)
        if len(scores.shape) != 4 or (
            kept is not None and scores.shape[1] is not None and scores.shape[1] != kept
        ):
            raise self._contradiction(f"scores of {kept} classes", f"scores of {scores.shape}")
        height, width = images.shape[2:]
        return None if height is None or width is None else (height, width)

    def _count_classes(self) -> int:
        """Return the number of classes; if the file does not tell it, run an image of zeros."""
        shape = self.session.outputs[self.metadata.logits].shape
        if len(shape) == 2 and shape[1] is not None:
            return shape[1]
        if self.metadata.class_names is not None:
            return len(self.metadata.class_names)
        own = self.metadata.preprocess
        size = self.size or (None if own is None else own.size)
        if size is None:
            raise ModelError(
                f"{self.path} says neither how many classes nor what size of picture it takes"
            )
        return int(self.predict(np.zeros((1, 3, size[0], size[1]), np.float32)).shape[1])

    def _contradiction(self, said: str, found: str) -> ModelError:
        """Return the error for a graph that is not what its metadata says."""
        return ModelError(
            f"{self.path}: metadata and graph contradict each other: {said} by the metadata, "
            f"{found} in the graph. Write the file anew"
        )
