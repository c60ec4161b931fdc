"""From a name to a model with all that it needs, and from a picture to its explanation."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vit_reciprocam.core.targets import find_class, top_classes
from vit_reciprocam.errors import InputError, MissingDependencyError, ModelError
from vit_reciprocam.pictures.preprocess import ImageSource, Preprocess, read_image
from vit_reciprocam.results.explanation import Explanation

__all__ = [
    "ASSETS",
    "SPECS",
    "Classifier",
    "Explainer",
    "describe_timm",
    "explain",
    "is_onnx",
    "load",
    "parse_targets",
    "timm_names",
]

ASSETS = Path(__file__).parents[1] / "assets"
SPECS = (
    "demo",
    "timm:NAME",
    "hf:ID",
    "torchvision:NAME",
    "open_clip:NAME/TAG",
    "FILE.onnx",
)

_TOP = re.compile(r"\s*top\s*(\d+)\s*", re.IGNORECASE)

Explainer = Callable[..., Explanation]
"""Explains a preprocessed batch, float32 (B, 3, H, W), for targets as `ReciproCAM` takes them.

A third argument, `known`, is a dict that explainers of one model share for one batch: what one has
computed, the others need not. Those that call `predict` keep its "logits", (B, C), there.
"""


@dataclass(frozen=True)
class Classifier:
    """A model with what stands around it.

    Attributes:
        name: The spec that it was loaded by.
        model: The PyTorch module, or of an ONNX file its `OnnxExplainer`.
        preprocess: From a picture to the model's input.
        num_classes: C.
        class_names: One a class, or None where not known.
        make_explainer: `method`, a name of `METHODS`, and its settings -> a function that explains
            a preprocessed batch.
        predict: Logits (B, C) of a preprocessed batch.
        digest: SHA-256 of the weights, once called.
        device: Where it computes.
    """

    name: str
    model: Any = dataclasses.field(repr=False)
    preprocess: Preprocess
    num_classes: int
    class_names: tuple[str, ...] | None = dataclasses.field(repr=False)
    make_explainer: Callable[..., Explainer] = dataclasses.field(repr=False)
    predict: Callable[[np.ndarray], np.ndarray] = dataclasses.field(repr=False)
    digest: Callable[[], str] = dataclasses.field(repr=False)
    device: str = dataclasses.field(default="cpu", repr=False)


def load(
    spec: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    class_names: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    templates: Sequence[str] = ("{}",),
    device: str = "cpu",
    backend: str | None = None,
    threads: int | None = None,
    streams: int | None = None,
    preprocess: Preprocess | str | None = None,
    **options: Any,
) -> Classifier:
    """Load a classifier with its preprocessing and class names.

    Args:
        spec: "demo", the bundled model, which knows 12 drawn classes and needs no torch;
            "timm:NAME"; "hf:ID" of the Hugging Face hub, or "hf:FOLDER"; "torchvision:NAME";
            "open_clip:NAME/TAG"; or an ONNX file with an explanation, which needs no torch either.
        weights: A local `.safetensors` or `.pth` file (read with `weights_only=True`); by default
            the model's published weights from the hub. "random" leaves them untrained, to measure
            time and memory: nothing is fetched but the configuration of a model of the hub.
        class_names: One a class; by default those of the ImageNet variant the model was trained on.
        prompts: Texts as classes, such as ["a photo of a dog", "a photo of a cat"], for models that
            compare pictures with texts: open_clip's, and CLIP or SigLIP of the hub.
        templates: With prompts: sentences such as "a photo of a {}", averaged for each prompt.
        device: Where a PyTorch model goes; of an ONNX file the runtime's name of a device, such as
            "CUDAExecutionProvider" or "cuda" of ONNX Runtime and "GPU" of OpenVINO.
        backend: Of an ONNX file "onnxruntime", the default, or "openvino".
        threads: Of an ONNX file, on the CPU; by default the runtime's choice.
        streams: Of an ONNX file in OpenVINO: parts of a batch that it computes at the same time.
        preprocess: Of an ONNX file, instead of its own: a `Preprocess`, or text such as "imagenet".
        options: For the library's own builder: `timm.create_model`, `from_pretrained`,
            `torchvision.models.get_model` or `open_clip.create_model`. With timm's
            `img_size=(384, 512)` the position embedding is resampled.

    Raises:
        ModelError: If there is no such model, or it is not supported, with the reason.
        WeightsError: If the weights do not fit the model; the message names keys.
        DownloadError: If the published weights cannot be fetched.
        MissingDependencyError: If the model's library is not installed.
    """
    spec = os.fspath(spec)
    given = {"backend": backend, "threads": threads, "streams": streams, "preprocess": preprocess}
    own = {name: value for name, value in given.items() if value is not None}
    if is_onnx(spec):
        if weights is not None or prompts is not None or options:
            raise InputError(
                f"{spec} has its own weights and classes: drop --weights and --prompt, in Python "
                "all options but backend, device, threads, streams, preprocess and class_names"
            )
        return _onnx_classifier(spec, device=device, class_names=class_names, **own)
    if own:
        raise InputError(f"{', '.join(own)}: for ONNX files only, not for {spec!r}")
    kind, _, name = spec.partition(":")
    if kind not in _EXTRAS or not name:
        raise ModelError(f"model must be one of {', '.join(map(repr, SPECS))}; got {spec!r}")
    if prompts is not None and kind not in ("hf", "open_clip"):
        raise InputError(f"{spec!r} has classes of its own: prompts are for open_clip: and hf:")
    texts = {} if prompts is None else {"prompts": prompts, "templates": templates}
    try:
        model, prepared, names = _load_from(kind, name, weights, texts, options)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"model {spec!r}", _EXTRAS[kind]) from error
    if class_names is not None:
        names = tuple(class_names)
    from vit_reciprocam.classifier.torch_backend import TorchModel

    classifier = _classifier(spec, TorchModel(spec, model, device=device), prepared, names)
    if names is not None and len(names) != classifier.num_classes:
        raise InputError(
            f"{len(names)} class names given for a model of {classifier.num_classes} classes"
        )
    return classifier


def is_onnx(spec: str) -> bool:
    """Whether `load` takes it for an ONNX file; the demo model is one."""
    return spec == "demo" or spec.lower().endswith(".onnx")


_EXTRAS = {
    "timm": "torch",
    "torchvision": "torch",
    "hf": "transformers",
    "open_clip": "open-clip",
}


def _load_from(kind: str, name: str, weights: Any, texts: Any, options: Any) -> Any:
    """Model, preprocessing and class names from the library of that kind."""
    if kind == "timm":
        from vit_reciprocam.libraries.timm.load import load_timm

        return load_timm(name, weights=weights, options=options)
    if kind == "torchvision":
        from vit_reciprocam.libraries.torchvision.load import load_torchvision

        return load_torchvision(name, weights=weights, options=options)
    if kind == "hf":
        from vit_reciprocam.libraries.transformers.load import load_transformers

        if weights not in (None, "random"):
            raise InputError("for local weights of a hub model give their folder: hf:FOLDER")
        return load_transformers(name, **texts, random=weights is not None, options=options)
    from vit_reciprocam.libraries.open_clip.load import load_open_clip

    if not texts:
        raise InputError(
            f"open_clip:{name} compares pictures with texts: give its classes with prompts=["
            "'a photo of a dog', …], on the command line --prompt, once a class"
        )
    architecture, _, tag = (name, "", "") if ":" in name else name.partition("/")
    return load_open_clip(architecture, tag or None, **texts, weights=weights, options=options)


def explain(
    images: ImageSource | Sequence[ImageSource],
    classifier: Classifier,
    *,
    top: int | None = None,
    targets: str | int | Sequence[str | int] | None = None,
    **settings: Any,
) -> Explanation:
    """Explain pictures: read, prepare, compute; the result keeps the pictures to draw on.

    The model sees, and the result shows, what its preprocessing leaves of a picture: mostly the
    centre crop.

    Args:
        images: Files, PIL images or uint8 arrays (H, W, 3); one or several, in one batch.
        classifier: From `load`.
        top: Explain each picture's `top` most probable classes; by default 1.
        targets: Instead of `top`: a class by name or index, "top3" for the three most probable,
            several, or "all". Beside named classes, which come first, "top3" is of the others.
        settings: method="reciprocam" or another name of `METHODS`, and its settings.

    Raises:
        ImageError: If a picture cannot be read.
        UnknownClassError: If there is no such class; the message offers the closest.
        InputError: If a setting does not fit.
    """
    if isinstance(settings.get("target"), (str, int)):
        raise InputError(f"classes are named by targets=: pass targets={settings['target']!r}")
    if not isinstance(classifier, Classifier):
        raise InputError(
            f"classifier must be what vit_reciprocam.load returns, such as load('demo'), got "
            f"{type(classifier).__name__}. A PyTorch model of your own goes to ReciproCAM(model)"
        )
    several = isinstance(images, (list, tuple))
    sources: Sequence[ImageSource] = images if several else [images]  # type: ignore[assignment, list-item]
    if not sources:
        raise InputError("images is empty: pass at least one picture")
    pictures = [read_image(source) for source in sources]
    batch = np.stack([classifier.preprocess(picture) for picture in pictures])
    explainer = classifier.make_explainer(**settings)
    result = explainer(batch, parse_targets(classifier, top=top, targets=targets))
    return dataclasses.replace(
        result,
        settings={**result.settings, "model": classifier.name},
        class_names=classifier.class_names,
        pictures=tuple(classifier.preprocess.region(picture) for picture in pictures),
        sources=tuple(_source_name(source, number) for number, source in enumerate(sources)),
        preprocess=classifier.preprocess,
    )


def parse_targets(classifier: Classifier, *, top: int | None = None, targets: Any = None) -> Any:
    """What an explainer takes as targets, of what a user of `explain` writes.

    Raises:
        UnknownClassError: If there is no such class.
        InputError: If `top` is out of range or stands beside `targets`.
    """
    if targets is None:
        return _named_and_top(classifier, [], 1 if top is None else top)
    if top is not None:
        raise InputError("pass top or targets, not both")
    if hasattr(targets, "tolist"):  # NumPy and torch
        targets = targets.tolist()
    wanted = list(targets) if isinstance(targets, (list, tuple)) else [targets]
    if not wanted:
        raise InputError("targets is empty: pass a class, several, or 'all'")
    if wanted == ["all"]:
        return "all"
    if "all" in wanted:
        raise InputError("target 'all' stands alone: it has every other class already")
    tops = [_TOP.fullmatch(target) if isinstance(target, str) else None for target in wanted]
    names = classifier.class_names or classifier.num_classes
    pairs = zip(wanted, tops, strict=True)
    found = (find_class(target, names) for target, is_top in pairs if not is_top)
    named = list(dict.fromkeys(found))
    counts = [int(is_top[1]) for is_top in tops if is_top]
    return _named_and_top(classifier, named, max(counts)) if counts else [named]


def _named_and_top(classifier: Classifier, named: list[int], top: int) -> Any:
    """A function of the logits: the named classes, and the `top` most probable of the others."""
    if not 1 <= top <= classifier.num_classes:
        raise InputError(
            f"top must be between 1 and the number of classes, {classifier.num_classes}; got {top}"
        )

    def choose(logits: np.ndarray) -> np.ndarray:
        ranked = top_classes(logits, classifier.num_classes)
        return np.array([named + [c for c in row if c not in named][:top] for row in ranked])

    return choose


def _source_name(source: ImageSource, number: int) -> str:
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "") or f"image-{number}")
    return f"image-{number}" if isinstance(source, np.ndarray) else str(source)


def _onnx_classifier(name: str, **options: Any) -> Classifier:
    from vit_reciprocam.onnx.run.explainer import OnnxExplainer

    model = OnnxExplainer(ASSETS / "demo.onnx" if name == "demo" else name, **options)
    if model.preprocess is None:
        raise InputError(
            f"{name} does not say how pictures are prepared for it: pass preprocess="
            "Preprocess((224, 224), mean=…, std=…) or the name of one, such as 'imagenet', on the "
            "command line --preprocess imagenet. Its training says which"
        )
    return _classifier(name, model, model.preprocess, model.class_names)


def _classifier(
    spec: str, model: Any, preprocess: Preprocess, class_names: tuple[str, ...] | None
) -> Classifier:
    """Of a `TorchModel` or an `OnnxExplainer`."""
    return Classifier(
        name=spec,
        model=model.model if hasattr(model, "model") else model,
        preprocess=preprocess,
        num_classes=model.num_classes,
        class_names=class_names,
        make_explainer=model.make_explainer,
        predict=model.predict,
        digest=model.digest,
        device=model.device,
    )


def timm_names(pattern: str) -> list[str]:
    """Names of timm models that fit a pattern; for "*" those of its transformers.

    Raises:
        MissingDependencyError: If timm is not installed.
    """
    names: list[str] = _timm("listing timm's models").names(pattern)
    return names


def describe_timm(name: str) -> tuple[str, str]:
    """By which path a timm model is explained, "-" if by none, and why not by the closed form."""
    path, why = _timm(name).describe(name)
    return path, why


def _timm(what: str) -> Any:
    try:
        from vit_reciprocam.libraries.timm import listing as timm
    except ModuleNotFoundError as error:
        raise MissingDependencyError(what, "torch") from error
    return timm
