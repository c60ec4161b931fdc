"""The contract of an explained ONNX file: its inputs, its outputs and its metadata.

Such a file takes preprocessed images (B, 3, H, W) and gives the model's own outputs. For h by w
patches and K of the model's C classes it also has

    saliency  (B, K, h, w)  output: maps in [0, 1]; absent if only raw scores were asked for
    scores    (B, K, h, w)  output: probability of each class with only that window kept, or the
                            signed evidence in nats if `Metadata.normalize` is "evidence"
    classes   (B, K) int64  output: which classes these are, if they are the top classes
    targets   (B, K) int64  input: which classes to explain, if `Metadata.targets` is "input"

One of its ONNX metadata properties, METADATA_KEY, holds `Metadata` as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vit_reciprocam.core.masks import NORMALIZATIONS, Masking
from vit_reciprocam.errors import InputError, ModelError, check_choice
from vit_reciprocam.pictures.preprocess import Preprocess

__all__ = ["METADATA_KEY", "Metadata", "check_classes", "check_file_targets"]

METADATA_KEY = "vit_reciprocam"
# Version of the JSON's layout; files with another one are refused. If you raise it, raise it in
# examples/browser/page/model.js too.
_SCHEMA = 4
_READ_TOO = (3,)  # without evidence, depth and fused settings
_TOP = re.compile(r"top([1-9]\d*)")


@dataclass(frozen=True)
class Metadata:
    """What an explained file says about its model and maps.

    The names of the attributes are the keys of the JSON.

    Attributes:
        name: Name of the model.
        masking: What the masks keep, and where the model is cut.
        path: How the maps are computed: "closed-form" or "direct".
        normalize: How maps follow from scores, "minmax" or "evidence", as in `ReciproCAM`.
        fuse: Maskings whose evidence is fused, in place of `masking`; empty if there is one only.
        targets: Which classes are explained: "all", "top3" and the like, or "input".
        images: Name of the input for preprocessed images.
        logits: Name of the output that holds the prediction.
        probabilities: Whether the prediction consists of probabilities instead of logits.
        class_names: One name per class; None if not known.
        preprocess: Preprocessing of pictures for the model; None if not known.
        versions: Library -> its version, for the libraries that wrote the file.
    """

    name: str
    masking: Masking
    path: str
    normalize: str = "minmax"
    fuse: tuple[Masking, ...] = ()
    targets: str = "all"
    images: str = "images"
    logits: str = "logits"
    probabilities: bool = False
    class_names: tuple[str, ...] | None = field(default=None, repr=False)
    preprocess: Preprocess | None = None
    versions: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def maskings(self) -> tuple[Masking, ...]:
        """The maskings of the file: one, or several that are fused."""
        return self.fuse or (self.masking,)

    def to_properties(self) -> dict[str, str]:
        """Return the metadata as ONNX metadata properties."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        values |= {
            "schema": _SCHEMA,
            "masking": dataclasses.asdict(self.masking),
            "fuse": [dataclasses.asdict(masking) for masking in self.fuse],
            "preprocess": self.preprocess and self.preprocess.to_dict(),
            "versions": dict(self.versions),
        }
        return {METADATA_KEY: json.dumps(values)}

    @classmethod
    def from_properties(cls, properties: Mapping[str, str], *, file: str) -> Metadata:
        """Read the metadata from the properties of a file, whose name appears in messages."""
        if METADATA_KEY not in properties:
            raise ModelError(
                f"{file} holds no explanation. `vit-reciprocam insert {file} explained.onnx` adds "
                "one to a Vision Transformer's file"
            )
        try:
            values = json.loads(properties[METADATA_KEY])
            if values["schema"] in _READ_TOO:
                values |= {"normalize": "minmax", "fuse": []}
            elif values["schema"] != _SCHEMA:
                writer = values.get("versions", {}).get("vit-reciprocam", "of another version")
                raise ModelError(
                    f"{file} was written by vit-reciprocam {writer}, in a layout that this version "
                    "does not read: write it anew, or install that version"
                )
            check_choice("path", values["path"], ("closed-form", "direct"))
            check_choice("normalize", values["normalize"], NORMALIZATIONS)
            check_file_targets(values["targets"])
            if not isinstance(values["probabilities"], bool):
                raise TypeError("probabilities has to be true or false")
            names, preprocess = values["class_names"], values["preprocess"]
            texts = [values["name"], values["images"], values["logits"]]
            if names is not None:
                texts += names if isinstance(names, list) else [None]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("name, images, logits and class_names have to be text")
            fields = {each.name: values[each.name] for each in dataclasses.fields(cls)}
            fields |= {
                "masking": Masking(**values["masking"]),
                "fuse": tuple(Masking(**one) for one in values["fuse"]),
                "class_names": None if names is None else tuple(names),
                "preprocess": None if preprocess is None else Preprocess.from_dict(preprocess),
            }
            return cls(**fields)
        except ModelError:
            raise
        except (LookupError, TypeError, ValueError) as error:
            raise ModelError(
                f"{file}: its metadata cannot be read ({error!r}); write it anew"
            ) from error


def check_file_targets(targets: str) -> int | None:
    """Return the number in "top1", "top2" …, or None for "all" and "input"; refuse the rest."""
    top = _TOP.fullmatch(targets)
    if targets in ("all", "input"):
        return None
    if not top:
        raise InputError(
            f"targets of a file must be 'all', 'top1', 'top2' … or 'input', which adds an input "
            f"that names the classes; got {targets!r}"
        )
    return int(top[1])


def check_classes(classes: int, class_names: Sequence[str] | None, top: int | None = None) -> None:
    """Refuse class names or a number of top classes that do not fit the model's classes."""
    if class_names is not None and len(class_names) != classes:
        raise InputError(f"{len(class_names)} class names given for a model of {classes} classes")
    if top is not None and top > classes:
        raise InputError(
            f"targets is 'top{top}', but the model has {classes} classes: ask for fewer"
        )
