"""All vendor knowledge: from a model to its `Split`."""

from __future__ import annotations

import importlib
import itertools
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vit_reciprocam.core.split import Split
from vit_reciprocam.core.targets import resolve_targets
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.libraries.common.running import refuse_bypassed
from vit_reciprocam.libraries.common.zero_shot import ZeroShot, with_scores

__all__ = ["check_images", "check_mode", "grid_and_targets", "refuse_quantised", "split_model"]

_LIBRARIES = ("timm", "transformers", "torchvision", "open_clip")
_QUANTISED = re.compile(r"torch\.(ao\.)?nn\.(intrinsic\.)?quantized\b")


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


def refuse_quantised(model: nn.Module) -> None:
    """Refuse a model of which a module rounds activations by the whole batch.

    Raises:
        ModelError: If there is one; names it.
    """
    every: list[Any] = [model]
    for module in every:  # grows; several times as fast as modules(), and every call runs it
        if module is not None and module._modules:
            every += module._modules.values()
    quantised = {cls for cls in set(map(type, every)) if _QUANTISED.match(cls.__module__)}
    for path, module in model.named_modules() if quantised else ():
        cls = type(module)
        if cls in quantised:
            raise ModelError(
                f"the model's {path} is quantised ({cls.__module__}.{cls.__qualname__}), which "
                "rounds an image by the others that it runs with, so its scores would depend on "
                "how many masks run at once: pass the float model"
            )


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


def grid_and_targets(
    split: Split, images: Tensor, targets: Any
) -> tuple[tuple[int, int], np.ndarray, Tensor]:
    """What methods that do not go through the cut need of it, for one image's forward pass.

    All images run where the targets follow from their logits.

    Returns:
        The patch grid, targets (B, K), and the logits of the images that ran: the first or all.
    """
    with torch.no_grad():
        cut = split.cut(images if targets is None or callable(targets) else images[:1])
        logits = cut.rest(cut.norm(cut.x), cut.x)
    scores = np.zeros((len(images), logits.shape[1]), dtype=np.float32)
    scores[: len(logits)] = logits.float().cpu().numpy()
    return cut.grid, resolve_targets(targets, scores), logits


def check_images(model: nn.Module, images: Tensor) -> None:
    """Refuse what is no batch of images for the model.

    Raises:
        InputError: If it is no tensor (B, channels, H, W) on the model's device and of its dtype,
            or holds NaN or infinity.
        ModelError: If the model is on the meta device.
    """
    if not isinstance(images, Tensor):
        raise InputError(
            "images must be a torch.Tensor of preprocessed images (B, 3, H, W), got "
            f"{type(images).__name__}. For files, PIL images and arrays use vit_reciprocam.explain"
        )
    if images.ndim != 4:
        hint = "; add the batch dimension with images[None]" if images.ndim == 3 else ""
        raise InputError(f"images must be (B, 3, H, W), got {tuple(images.shape)}{hint}")
    if not len(images):
        raise InputError("images is an empty batch")
    tensors = itertools.chain(model.parameters(), model.buffers())
    like = next((one for one in tensors if one.is_floating_point()), images)
    if like.is_meta and like is not images:
        raise ModelError(
            f"the {type(model).__name__} is on the meta device, which holds shapes and no numbers: "
            "load its weights onto a device"
        )
    if images.is_meta:
        raise InputError("images are on the meta device, which holds shapes and no numbers")
    if images.device != like.device:
        raise InputError(
            f"images are on {images.device} and the model on {like.device}: "
            "move them with images.to(device)"
        )
    if images.dtype != like.dtype and not torch.is_autocast_enabled(images.device.type):
        raise InputError(
            f"images are {images.dtype} and the model {like.dtype}: "
            "convert them with images.to(dtype)"
        )
    total = images.sum(dtype=torch.promote_types(images.dtype, torch.float32))
    if not total.isfinite():  # one pass over the pixels; which images, only then
        broken = (~images.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
        if broken:
            numbers = ", ".join(map(str, broken))
            raise InputError(f"images hold NaN or infinity: image(s) {numbers} of the batch")
