"""The `Split` of a model, made by the code of the library that the model comes from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vit_reciprocam.core.split import Split
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.libraries import LIBRARIES, library_of
from vit_reciprocam.libraries.common.changes import refuse_bypassed
from vit_reciprocam.libraries.common.zero_shot import ZeroShot, add_scores
from vit_reciprocam.libraries.validation import refuse_quantised

__all__ = ["split_model"]


def split_model(model: nn.Module, *, block: int = -1, pool: bool = False, depth: int = 1) -> Split:
    """Cut a supported classifier at an encoder block, or just before the pooling of its head.

    Blocks are counted from the end: -1 is the last. The cut's readout holds the last `depth`
    blocks, for which the closed form must hold. A model that is not supported raises `ModelError`
    with the reason, and so does one with code or hooks of a user that running it by its parts would
    bypass. A block, depth or pooling that it does not have raises `InputError`.
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
    if depth > 1 and (pool or block != -1):
        raise InputError("depth counts from the last block: leave out block and layer='pool'")
    refuse_quantised(model)
    where = {"block": block, "pool": pool, "depth": depth}
    if library := library_of(model):
        split: Split = library.split(model, **where)
        return split
    if isinstance(model, ZeroShot):
        refuse_bypassed(model, model.tower, "vit_reciprocam")
        return add_scores(_split_tower(model.tower, **where), model.scores)
    raise _unsupported(model)


def _split_tower(tower: nn.Module, **where: Any) -> Split:
    """Cut an image tower; features take the place of logits."""
    for module in tower.modules():  # from the outside in: an open_clip tower may hold a timm model
        library = library_of(module)
        if library and library.split_tower:
            split: Split = library.split_tower(tower, **where)
            return split
    raise ModelError(f"{type(tower).__qualname__} is not a supported image tower")


def _unsupported(model: nn.Module) -> ModelError:
    """Return the error that says what was passed, and what to pass instead."""
    name = f"{type(model).__module__}.{type(model).__qualname__} is not a supported model"
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return ModelError(f"{name}, but wraps one: pass model.module")
    target = "name where to cut it: ReciproCAM(model, target=module, grid=(h, w), prefix_tokens=1)"
    supported = _find_supported(model)
    if not supported:
        *others, last = (library.module for library in LIBRARIES.values())
        return ModelError(
            f"{name}. Supported are Vision Transformers of {', '.join(others)} and {last} "
            "(docs/models.md). If this wraps one, pass the wrapped model; for a module of your own "
            f"{target}"
        )
    what = ", and ".join(f"{kind} at {' and '.join(paths)}" for kind, paths in supported.items())
    every_path = [path for paths in supported.values() for path in paths]
    choice = f"model{every_path[0]}" if len(every_path) == 1 else "one of them"
    return ModelError(f"{name}. It holds {what}: pass {choice}, or to explain the whole {target}")


def _find_supported(model: nn.Module) -> dict[str, list[str]]:
    """Return the kinds of supported models inside a module, each with the paths to them."""
    found: dict[str, list[str]] = {}
    outer = ""  # the path of the last one found, whose own parts are not listed
    for path, module in model.named_modules():
        library = library_of(module) if path else None
        if library is None or (outer and path.startswith(outer)):
            continue
        try:
            split_model(module)
        except (InputError, ModelError):
            continue
        outer = f"{path}."
        found.setdefault(f"{library.module}'s {type(module).__name__}", []).append(f".{path}")
    return found
