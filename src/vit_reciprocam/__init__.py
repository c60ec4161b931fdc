"""See what a Vision Transformer looks at, for the price of one forward pass.

`ReciproCAM` explains a PyTorch model; `load` and `explain` go from a file to a saliency map.
Importing this package loads neither torch nor ONNX Runtime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vit_reciprocam import errors

if TYPE_CHECKING:
    from vit_reciprocam.classifier.classifier import Classifier
    from vit_reciprocam.classifier.explain import explain
    from vit_reciprocam.classifier.load import load
    from vit_reciprocam.methods import METHODS
    from vit_reciprocam.onnx.export.export import export
    from vit_reciprocam.onnx.insert.insert import insert
    from vit_reciprocam.pictures.preprocess import Preprocess
    from vit_reciprocam.reciprocam import ReciproCAM
    from vit_reciprocam.results.explanation import Explanation

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Classifier",
    "Explanation",
    "Preprocess",
    "ReciproCAM",
    "__version__",
    "errors",
    "explain",
    "export",
    "insert",
    "load",
]

_HOMES = {
    "METHODS": "methods",
    "Classifier": "classifier.classifier",
    "Explanation": "results.explanation",
    "Preprocess": "pictures.preprocess",
    "ReciproCAM": "reciprocam",
    "explain": "classifier.explain",
    "export": "onnx.export.export",
    "insert": "onnx.insert.insert",
    "load": "classifier.load",
}

_EXTRAS = {"export": "torch,onnx", "insert": "onnx"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(__name__):
            raise
        extra = _EXTRAS.get(name, "torch")
        raise errors.MissingDependencyError(f"vit_reciprocam.{name}", extra) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
