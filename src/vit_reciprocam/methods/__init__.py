"""METHODS: every saliency method by its name, with one signature.

    METHODS[name](model, images, targets=None, **settings) -> maps (B, K, h, w)

Maps are floats in [0, 1], each scaled on its own, on the model's device and patch grid, not
upsampled. The values before scaling come from `ReciproCAM.scores`, `methods.baselines` and
`methods.peers`. Nothing heavy is imported before a method is called. The methods take a PyTorch
model; for ONNX files, null baselines run without one, see `methods.null`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from vit_reciprocam.core.maps import FLAT
from vit_reciprocam.core.settings import parse_settings, read_value, write_value
from vit_reciprocam.errors import MissingDependencyError, check_choice
from vit_reciprocam.methods.null import NULLS, check_keywords

__all__ = ["METHODS", "PRESETS", "SIGNED", "MethodSpec", "check_settings"]

PRESETS: dict[str, dict[str, Any]] = {
    "deep": {
        "normalize": "evidence",
        "fuse": (
            {"kernel": "dirac", "depth": 2},
            {"kernel": "gaussian", "depth": 2},
            {"kernel": "box", "depth": 4},
        ),
    },
    "deep:fast": {"normalize": "evidence", "kernel": "gaussian", "depth": 2},
}
"""Name of a method -> the settings of `ReciproCAM` that it stands for."""

SIGNED = frozenset({*PRESETS, "trace", "traced"})
"""Methods whose values have a natural zero; their maps are the positive part."""

_MODULES = {
    "reciprocam": "reciprocam",
    **dict.fromkeys(PRESETS, "reciprocam"),
    "rollout": "methods.baselines",
    "relevance": "methods.baselines",
    "trace": "methods.baselines",
    "traced": "methods.baselines",
    "raw_attention": "methods.baselines",
    **dict.fromkeys(NULLS, "methods.null"),
    "grad_cam": "methods.peers",
    "layer_cam": "methods.peers",
    "eigen_cam": "methods.peers",
    "score_cam": "methods.peers",
    "integrated_gradients": "methods.peers",
    "occlusion": "methods.peers",
}
_EXTRAS = {"reciprocam": "torch", "methods.baselines": "torch", "methods.peers": "compare"}

Method = Callable[..., Any]


def _make_method(name: str) -> Method:
    """Return the method of that name, with the signature and the scale of `METHODS`."""

    def method(model: Any, images: Any, targets: Any = None, **settings: Any) -> Any:
        check_settings(name, settings)
        if name in NULLS:
            null_baseline = _import("null_baseline", "methods.baselines")
            values = null_baseline(name, model, images, targets, **settings)
        else:
            function = "reciprocam" if name in PRESETS else name
            values = _import(function, _MODULES[name])(
                model, images, targets, **{**PRESETS.get(name, {}), **settings}
            )
        if name in SIGNED or settings.get("normalize") == "evidence":
            return _import("scale_evidence", "core.scores")(values.detach().float())
        return values.float() if name == "uniform" else _min_max(values)  # uniform stays at 1

    method.__name__ = method.__qualname__ = name
    method.__doc__ = f"Return the maps of `vit_reciprocam.{_MODULES[name]}.{name}`, in [0, 1]."
    return method


METHODS: Mapping[str, Method] = MappingProxyType({name: _make_method(name) for name in _MODULES})


def check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Refuse a method, setting or library that is not there, before anything is computed."""
    check_choice("method", name, METHODS)
    if name in NULLS:
        _import("null_baseline", "methods.baselines")  # torch must be there
        check_keywords(name, NULLS[name].draw, settings)
        return
    wanted = "ReciproCAM" if name == "reciprocam" or name in PRESETS else name
    check_keywords(name, _import(wanted, _MODULES[name]), settings)


@dataclass(frozen=True)
class MethodSpec:
    """A method of `METHODS` with its settings, as written on the command line."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> MethodSpec:
        """Return the method that "NAME" or "NAME:KEY=VALUE,KEY=VALUE" names."""
        if text in METHODS:  # a name may hold a colon, such as "deep:fast"
            return cls(text)
        name, settings = parse_settings(
            "method",
            text,
            names=METHODS,
            expected="NAME:KEY=VALUE,KEY=VALUE, such as reciprocam:kernel=dirac,class_token=false",
        )
        return cls(name, {key: read_value(value) for key, value in settings.items()})

    def __str__(self) -> str:
        """Return the text that `parse` reads, with settings in alphabetical order."""
        pairs = [f"{key}={write_value(value)}" for key, value in sorted(self.settings.items())]
        return f"{self.name}:{','.join(pairs)}" if pairs else self.name


def _import(name: str, module: str) -> Callable[..., Any]:
    """Return a function of a module, which is imported only now and may lack its libraries."""
    try:
        function: Callable[..., Any] = getattr(
            importlib.import_module(f"vit_reciprocam.{module}"), name
        )
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("vit_reciprocam"):
            raise
        raise MissingDependencyError(f"method {name}", _EXTRAS[module]) from error
    return function


def _min_max(values: Any) -> Any:
    """Scale each map of a tensor (..., h, w) to [0, 1], as `core.maps.min_max` does."""
    maps = values.detach().float()
    low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    flat = high - low <= FLAT * low.abs().maximum(high.abs())
    return (maps - low) / (high - low).masked_fill(flat, float("inf"))  # zeros if constant
