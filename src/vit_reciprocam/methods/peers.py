"""Other published methods, run by public libraries, with the signature of `METHODS`.

Grad-CAM, LayerCAM, EigenCAM and Score-CAM come from pytorch-grad-cam, Integrated Gradients and
Occlusion from captum. Layer and token grid are found, and the model is left as it was.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import captum.attr
import numpy as np
import pytorch_grad_cam
import torch
from jaxtyping import Float
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from vit_reciprocam.core.split import logits_of
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.libraries.dispatch import split_model
from vit_reciprocam.methods.baselines import grid_and_targets, split_and_check

__all__ = [
    "eigen_cam",
    "grad_cam",
    "integrated_gradients",
    "layer_cam",
    "occlusion",
    "score_cam",
]

Images = Float[Tensor, "B ch H W"]
Maps = Float[Tensor, "B K h w"]


class _Logits(nn.Module):
    """A model that returns its logits as a tensor, even if they come inside an object."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.model(images))


def grad_cam(model: nn.Module, images: Images, targets: Any = None) -> Maps:
    """Grad-CAM (Selvaraju et al. 2017) at the last block's first LayerNorm.

    The map is the positive part of a weighted sum of the layer's activations. A channel's weight is
    the mean gradient of the target's logit over the patches. The library scales maps to [0, 1].

    Raises:
        InputError: If the images or targets do not fit.
        ModelError: If the model is not supported, or if no single layer gives its tokens.
    """
    return _cam(pytorch_grad_cam.GradCAM, model, images, targets)


def layer_cam(model: nn.Module, images: Images, targets: Any = None) -> Maps:
    """LayerCAM (Jiang et al. 2021): each activation weighted by its own positive gradient.

    Layer, scale and errors are those of `grad_cam`.
    """
    return _cam(pytorch_grad_cam.LayerCAM, model, images, targets)


def eigen_cam(model: nn.Module, images: Images, targets: Any = None) -> Maps:
    """EigenCAM (Muhammad & Yeasin 2020): the activations' first principal component.

    The map is the same for every target. Layer, scale and errors are those of `grad_cam`.
    """
    return _cam(pytorch_grad_cam.EigenCAM, model, images, targets)


def score_cam(
    model: nn.Module, images: Images, targets: Any = None, *, batch_size: int = 32
) -> Maps:
    """Score-CAM (Wang et al. 2020): a forward pass for each of the layer's D channels.

    Layer, scale and errors are those of `grad_cam`.

    Args:
        model: Supported classifier.
        images: Preprocessed images.
        targets: Classes, as in `ReciproCAM`.
        batch_size: Number of channels per forward pass.
    """
    return _cam(pytorch_grad_cam.ScoreCAM, model, images, targets, batch_size)


def integrated_gradients(
    model: nn.Module, images: Images, targets: Any = None, *, steps: int = 50, batch_size: int = 32
) -> Maps:
    """Integrated Gradients (Sundararajan et al. 2017) of the target's logit.

    The integral runs from the mean colour (zeros after normalisation) to the picture. Its absolute
    value, summed over channels and averaged over each patch, is the map.

    Args:
        model: Supported classifier.
        images: Preprocessed images.
        targets: Classes, as in `ReciproCAM`.
        steps: Number of steps of the integral.
        batch_size: Number of pictures per forward pass, each a step of the integral.

    Raises:
        InputError: If the images or targets do not fit.
        ModelError: If the model is not supported.
    """
    if steps < 1 or batch_size < 1:
        raise InputError(f"steps and batch_size must be 1 or more; got {steps} and {batch_size}")
    maps = []
    with _prepare(model, images, targets) as (logits, images, chosen, grid):
        method = captum.attr.IntegratedGradients(logits)
        at_once = max(batch_size, len(images))
        for one in chosen.T:
            values: Tensor = method.attribute(
                images, target=one, n_steps=steps, internal_batch_size=at_once
            )
            maps.append(adaptive_avg_pool2d(values.detach().abs().sum(dim=1), grid))
    return torch.stack(maps, dim=1)


def occlusion(
    model: nn.Module, images: Images, targets: Any = None, *, batch_size: int = 32
) -> Maps:
    """Occlusion (Zeiler & Fergus 2014): the fall in the target's probability without each patch.

    One patch of the grid at a time becomes the mean colour (zeros after normalisation).

    Args:
        model: Supported classifier.
        images: Preprocessed images.
        targets: Classes, as in `ReciproCAM`.
        batch_size: Number of occluded pictures per forward pass.

    Raises:
        InputError: If the images or targets do not fit.
        ModelError: If the model is not supported.
    """
    maps = []
    with _prepare(model, images, targets) as (logits, images, chosen, grid), torch.no_grad():
        channels, height, width = images.shape[1:]
        window = (channels, height // grid[0], width // grid[1])
        method = captum.attr.Occlusion(lambda x: logits(x).softmax(dim=1))
        for one in chosen.T:
            values: Tensor = method.attribute(
                images,
                target=one,
                sliding_window_shapes=window,
                strides=window,
                perturbations_per_eval=max(1, batch_size // len(images)),
            )
            maps.append(adaptive_avg_pool2d(values[:, 0], grid))
    return torch.stack(maps, dim=1)


def _cam(
    method: Callable[..., Any], model: nn.Module, images: Tensor, targets: Any, batch_size: int = 32
) -> Tensor:
    """Run a method of pytorch-grad-cam at the last block's first LayerNorm, on the patch grid."""
    split = split_model(model)
    if split.tap.side != "output" or len(split.tap.modules) > 1:
        raise ModelError(
            f"no single layer of this {type(model).__name__} gives the tokens of its last block, "
            "which pytorch-grad-cam needs: take occlusion or reciprocam"
        )

    def as_channels(tokens: Tensor) -> Tensor:
        tokens = tokens.float()  # NumPy, which the library goes through, has no bfloat16
        if tokens.ndim == 4:
            return tokens if channels_first else tokens.permute(0, 3, 1, 2)
        patches: Tensor = tokens[:, split.prefix_tokens :].unflatten(1, grid)
        return patches.permute(0, 3, 1, 2)

    maps: list[np.ndarray] = []
    with _prepare(model, images, targets) as (logits, images, chosen, grid):
        with torch.no_grad():
            channels_first = split.cut(images[:1]).channels_first
        for column in chosen.T.tolist():
            with method(logits, [split.tap.modules[0]], as_channels) as cam:
                cam.batch_size = batch_size  # read by Score-CAM alone
                cam.get_target_width_height = lambda _images: (grid[1], grid[0])  # not upsampled
                with contextlib.redirect_stderr(io.StringIO()):  # Score-CAM's progress bars
                    maps.append(cam(images, list(map(ClassifierOutputTarget, column))))
    return torch.from_numpy(np.stack(maps, axis=1)).to(images.device)


@contextlib.contextmanager
def _prepare(
    model: nn.Module, images: Tensor, targets: Any
) -> Iterator[tuple[nn.Module, Tensor, Tensor, tuple[int, int]]]:
    """Yield a module that gives logits, images with gradients, targets (B, K), and the grid."""
    split = split_and_check(model, images)
    if torch.is_inference_mode_enabled():
        raise InputError("these methods need gradients: leave torch.inference_mode first")
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        model.requires_grad_(False)  # gradients of activations are all that is needed
        with torch.enable_grad():
            images = images.detach().clone()
            grid, resolved, _ = grid_and_targets(split, images, targets)
            chosen = torch.from_numpy(resolved).to(images.device)
            yield _Logits(model), images.requires_grad_(), chosen, grid
    finally:  # the model is left as it was
        for module, training in modes:
            module.training = training
        for parameter, requires_grad, gradient in wanted:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
