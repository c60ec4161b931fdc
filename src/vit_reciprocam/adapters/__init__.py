"""All vendor knowledge: from a model to its `Split`."""

from __future__ import annotations

from torch import nn

from vit_reciprocam.errors import ModelError
from vit_reciprocam.split import Split

__all__ = ["check_mode", "split_model"]


def split_model(model: nn.Module) -> Split:
    """Cut a supported classifier at its last encoder block.

    Raises:
        ModelError: If the model is not supported, with the reason.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    libraries = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    if "timm" in libraries:
        from vit_reciprocam.adapters.timm import split

        return split(model)
    raise ModelError(
        f"{type(model).__module__}.{type(model).__qualname__} is not a supported model. Supported "
        "are timm's Vision Transformers (`vit-reciprocam models` lists them). If this wraps one, "
        "pass the wrapped model"
    )


def check_mode(model: nn.Module) -> None:
    """Refuse a model in training mode if that changes its output.

    Raises:
        ModelError: If a module in training mode drops or normalises at random; names it.
    """
    for name, module in model.named_modules():
        if not module.training:
            continue
        rate = getattr(module, "p", getattr(module, "drop_prob", getattr(module, "prob", 0)))
        random = "drop" in type(module).__name__.lower() and rate
        if random or isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ModelError(
                f"the model is in training mode and its {name} ({type(module).__name__}) acts "
                "differently then: call model.eval() first"
            )
