"""Load a classifier by name: its model, preprocessing and class names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vit_reciprocam.classifier.classifier import Classifier
from vit_reciprocam.errors import InputError, MissingDependencyError, ModelError
from vit_reciprocam.libraries import LIBRARIES
from vit_reciprocam.onnx.contract import check_classes
from vit_reciprocam.pictures.preprocess import Preprocess

__all__ = ["ASSETS", "is_onnx", "load", "specs"]

ASSETS = Path(__file__).parents[1] / "assets"


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
            time and memory; then only the configuration of a hub model is fetched.
        class_names: Names of the classes, one per class; by default those of the ImageNet variant
            that the model was trained on.
        prompts: Texts as classes, such as ["a photo of a dog", "a photo of a cat"], for models that
            compare pictures with texts: open_clip's, and CLIP or SigLIP of the hub.
        templates: Sentences such as "a photo of a {}" that each prompt is put into; the class is
            then the mean of their embeddings.
        device: Device for a PyTorch model; for an ONNX file a device by the runtime's own name,
            such as "CUDAExecutionProvider" or "cuda" in ONNX Runtime and "GPU" in OpenVINO.
        backend: The runtime of an ONNX file: "onnxruntime", the default, or "openvino".
        threads: Number of CPU threads for an ONNX file; by default the runtime's choice.
        streams: Number of parts of a batch that OpenVINO computes at the same time, for an ONNX
            file.
        preprocess: A `Preprocess` for an ONNX file in place of its own, or text such as "imagenet".
        options: Arguments of the library's own builder: `timm.create_model`, `from_pretrained`,
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
    onnx_options = {name: value for name, value in given.items() if value is not None}
    if is_onnx(spec):
        if weights is not None or prompts is not None or options:
            raise InputError(
                f"{spec} has its own weights and classes: drop --weights and --prompt, in Python "
                "all options but backend, device, threads, streams, preprocess and class_names"
            )
        return _onnx_classifier(spec, device=device, class_names=class_names, **onnx_options)
    if onnx_options:
        raise InputError(f"{', '.join(onnx_options)}: for ONNX files only, not for {spec!r}")
    kind, _, name = spec.partition(":")
    library = LIBRARIES.get(kind)
    if library is None or not name:
        raise ModelError(f"model must be one of {', '.join(map(repr, specs()))}; got {spec!r}")
    if prompts is not None and not library.takes_prompts:
        takers = (f"{one.prefix}:" for one in LIBRARIES.values() if one.takes_prompts)
        raise InputError(f"{spec!r} has classes of its own: prompts are for {' and '.join(takers)}")
    texts = {} if prompts is None else {"prompts": prompts, "templates": templates}
    try:
        model, prepared, names = library.load(name, weights=weights, options=options, **texts)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"model {spec!r}", library.extra) from error
    if class_names is not None:
        names = tuple(class_names)
    from vit_reciprocam.classifier.torch_backend import TorchBackend

    torch_backend = TorchBackend(spec, model, device=device, size=prepared.size)
    classifier = Classifier(spec, torch_backend, prepared, names)
    check_classes(classifier.num_classes, names)
    return classifier


def specs() -> tuple[str, ...]:
    """Return the forms of a model's spec that `load` takes."""
    return ("demo", *(library.spec for library in LIBRARIES.values()), "FILE.onnx")


def is_onnx(spec: str) -> bool:
    """Return whether a spec of `load` means an ONNX file; the demo model is one."""
    return spec == "demo" or spec.lower().endswith(".onnx")


def _onnx_classifier(name: str, **options: Any) -> Classifier:
    from vit_reciprocam.onnx.run.explainer import OnnxExplainer

    model = OnnxExplainer(ASSETS / "demo.onnx" if name == "demo" else name, **options)
    if model.preprocess is None:
        raise InputError(
            f"{name} does not say how pictures are prepared for it: pass preprocess="
            "Preprocess((224, 224), mean=…, std=…) or the name of one, such as 'imagenet', on the "
            "command line --preprocess imagenet. Its training says which"
        )
    return Classifier(name, model, model.preprocess, model.class_names)
