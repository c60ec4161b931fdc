"""All vendor knowledge: from a model to its `Split`."""

from __future__ import annotations

import importlib

import torch
from torch import nn

from vit_reciprocam.core.split import Split
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.libraries.common.running import refuse_bypassed
from vit_reciprocam.libraries.common.zero_shot import ZeroShot, with_scores
from vit_reciprocam.libraries.validation import refuse_quantised

__all__ = ["split_model"]

_LIBRARIES = ("timm", "transformers", "torchvision", "open_clip")


def split_model(model: nn.Module, *, block: int = -1, pool: bool = False) -> Split:
    """Cut a supported classifier.

    Args:
        model: The classifier.
        block: At which encoder block, counted from the end.
        pool: Cut before the head pools all tokens instead.

    Raises:
        ModelError: If the model is not supported, with the reason.
        InputError: If it cannot be cut there.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            "the model is scripted or traced, so its parts cannot be run: pass the original"
        )
    if hasattr(model, "_orig_mod"):
        raise ModelError(
            "the model is compiled, so its parts cannot be run: pass the original, which shares "
            "its weights, model._orig_mod"
        )
    if pool and block != -1:
        raise InputError("layer='pool' cuts after the last block: leave out block")
    refuse_quantised(model)
    for library in _LIBRARIES:
        if library in _libraries(model):
            adapter = importlib.import_module(f"vit_reciprocam.libraries.{library}.split")
            split: Split = adapter.split(model, block=block, pool=pool)
            return split
    if isinstance(model, ZeroShot):
        refuse_bypassed(model, model.tower, "vit_reciprocam")
        tower = _split_tower(model.tower, block=block, pool=pool)
        return with_scores(tower, model.scores)
    raise _unsupported(model)


def _unsupported(model: nn.Module) -> ModelError:
    name = f"{type(model).__module__}.{type(model).__qualname__} is not a supported model"
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return ModelError(f"{name}, but wraps one: pass model.module")
    target = "ReciproCAM(model, target=module, grid=(h, w), prefix_tokens=1)"
    held = _held(model)
    if not held:
        return ModelError(
            f"{name}. Supported are Vision Transformers of timm, transformers, torchvision and "
            "open_clip (docs/models.md). If this wraps one, pass the wrapped model; for a module "
            f"of your own name where to cut it: {target}"
        )
    what = ", and ".join(f"{kind} at {' and '.join(paths)}" for kind, paths in held.items())
    every = [path for paths in held.values() for path in paths]
    choice = f"model{every[0]}" if len(every) == 1 else "one of them"
    return ModelError(
        f"{name}. It holds {what}: pass {choice}, or to explain the whole name where to cut it: "
        f"{target}"
    )


def _held(model: nn.Module) -> dict[str, list[str]]:
    """What supported models are inside a module: of each kind, where."""
    held: dict[str, list[str]] = {}
    found = ""
    for path, module in model.named_modules():
        library = next((one for one in _LIBRARIES if one in _libraries(module)), "")
        if not path or not library or (found and path.startswith(found)):
            continue
        try:
            split_model(module)
        except (InputError, ModelError):
            continue
        found = f"{path}."
        held.setdefault(f"{library}'s {type(module).__name__}", []).append(f".{path}")
    return held


def _libraries(model: nn.Module) -> set[str]:
    return {cls.__module__.partition(".")[0] for cls in type(model).__mro__}


def _split_tower(tower: nn.Module, *, block: int, pool: bool) -> Split:
    """Cut an image tower, which gives features and no class scores."""
    for library in ("open_clip", "transformers"):
        if any(library in _libraries(module) for module in tower.modules()):
            adapter = importlib.import_module(f"vit_reciprocam.libraries.{library}.split")
            split: Split = adapter.split_tower(tower, block=block, pool=pool)
            return split
    raise ModelError(f"{type(tower).__qualname__} is not a supported image tower")
