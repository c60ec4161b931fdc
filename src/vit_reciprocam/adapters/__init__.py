"""All vendor knowledge: from a model to its `Split`."""

from __future__ import annotations

import importlib

import torch
from torch import nn

from vit_reciprocam.adapters.zero_shot import ZeroShot, with_scores
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.split import Split

__all__ = ["check_mode", "split_model"]


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
        raise ModelError("the model is scripted, so its parts cannot be run: pass the original")
    if hasattr(model, "_orig_mod"):
        raise ModelError(
            "the model is compiled, so its parts cannot be run: pass the original, which shares "
            "its weights, model._orig_mod"
        )
    if "timm" in _libraries(model):
        from vit_reciprocam.adapters import timm

        return timm.split(model, block=block, pool=pool)
    if block != -1 or pool:
        raise InputError("block and layer='pool' are for timm's models")
    for library in ("transformers", "torchvision", "open_clip"):
        if library in _libraries(model):
            adapter = importlib.import_module(f"vit_reciprocam.adapters.{library}")
            split: Split = adapter.split(model)
            return split
    if isinstance(model, ZeroShot):
        return with_scores(_split_tower(model.tower), model.scores)
    raise ModelError(
        f"{type(model).__module__}.{type(model).__qualname__} is not a supported model. Supported "
        "are Vision Transformers of timm, transformers, torchvision and open_clip "
        "(docs/models.md). If this wraps one, pass the wrapped model; for a module of your own "
        "name where to cut it: "
        "ReciproCAM(model, target=module, grid=(h, w), prefix_tokens=1)"
    )


def _libraries(model: nn.Module) -> set[str]:
    return {cls.__module__.partition(".")[0] for cls in type(model).__mro__}


def _split_tower(tower: nn.Module) -> Split:
    """Cut an image tower, which gives features and no class scores."""
    for library in ("open_clip", "transformers"):
        if any(library in _libraries(module) for module in tower.modules()):
            adapter = importlib.import_module(f"vit_reciprocam.adapters.{library}")
            split: Split = adapter.split_tower(tower)
            return split
    raise ModelError(f"{type(tower).__qualname__} is not a supported image tower")


def check_mode(model: nn.Module) -> None:
    """Refuse a model in training mode if that changes its output.

    Raises:
        ModelError: If a module in training mode drops or normalises at random; names it.
    """
    for name, module in model.named_modules():
        if not module.training:
            continue
        kind = type(module).__name__.lower()
        if "drop" in kind or "stochastic" in kind:
            names = ("p", "drop_prob", "prob")
        else:  # attentions that drop on their own
            names = ("dropout", "dropout_prob", "attention_dropout")
        rates = [getattr(module, name, None) for name in names]
        random = any(isinstance(rate, float) and rate > 0 for rate in rates)
        if random or isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ModelError(
                f"the model is in training mode and its {name} ({type(module).__name__}) acts "
                "differently then: call model.eval() first"
            )
