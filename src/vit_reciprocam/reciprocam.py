"""ViT-ReciproCAM: gradient-free, attention-free saliency maps (Byun & Lee 2023).

Cut the network at the first LayerNorm of its last encoder block: X = G(images), F = norm(X),
logits = H(F, X). For each patch n keep only a small window of tokens around it, M[n], and read each
class's probability:

    S[b, c, n] = softmax(H(F[b] * M[n], X[b]))[c]                                  (equations 2 to
    4)

The skip path X stays as it is. There are two ways to the same S: the direct path runs H once a
mask, for any H; the closed form rewrites H exactly for heads that read prefix tokens only, at about
the price of one H.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vit_reciprocam.core.closed_form import closed_form_rows
from vit_reciprocam.core.direct import direct_rows
from vit_reciprocam.core.masks import Masking
from vit_reciprocam.core.split import Cut, MeanPool, Readout, Split
from vit_reciprocam.core.targets import resolve_targets
from vit_reciprocam.errors import ClosedFormError, InputError, ModelError, check_choice
from vit_reciprocam.libraries.common import by_target
from vit_reciprocam.libraries.dispatch import (
    check_images,
    check_mode,
    refuse_quantised,
    split_model,
)
from vit_reciprocam.results.explanation import Explanation, softmax

__all__ = ["ReciproCAM", "reciprocam"]

_NOT_FINITE = (
    "the model's {} hold NaN or infinity for finite images: look at its weights, or run it in "
    "float32 if it is in half precision"
)


class ReciproCAM:
    """Explains the predictions of a Vision Transformer; the model is left as it is.

    The model runs by its parts, and hooks on the modules inside run as ever. With hooks on the last
    block the direct path runs, since the closed form would bypass them; a model with hooks on the
    whole is refused.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("test_vit").eval()
        >>> explainer = ReciproCAM(model)
        >>> e = explainer(torch.zeros(2, 3, 160, 160), targets=[3, 7])
        >>> e.maps.shape, e.path
        ((2, 1, 10, 10), 'closed-form')
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        kernel: str = "gaussian",
        class_token: bool = True,
        layer: str = "norm1",
        score: str = "probability",
        path: str = "auto",
        block: int = -1,
        target: nn.Module | None = None,
        grid: tuple[int, int] | None = None,
        prefix_tokens: int = 0,
        split: Callable[[nn.Module], Split] | None = None,
        memory_limit: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Prepare to explain a supported model.

        Args:
            model: A classifier in evaluation mode, on any device; any module with `target` or
                `split`.
            kernel: The window kept around each patch: "gaussian", 3x3 (the paper's default), or
                "dirac".
            class_token: False also masks the prefix tokens (the paper's ablation).
            layer: Where tokens are masked: "norm1" (the paper's default) or "block"; for heads that
                pool all tokens also "pool", just before that. The last is not the paper's method:
                no block is left between mask and head, only the pool; but it is a closed form.
            score: "probability", the paper's, or "logit", without the softmax.
            path: "auto" takes the closed form where it holds, and the result's `path` says what
                ran; "closed-form" raises where it does not hold; "direct" always runs H once a
                mask.
            block: Which encoder block, counted from the end, of a hierarchical model within its
                last stage; others than the last take the direct path.
            target: For a model that is not supported: the module whose output (B, T, D),
                (B, h, w, D) or (B, D, h, w) is masked. It must run once in a forward pass. Each
                mask then costs a forward pass of the whole model.
            grid: With `target`, (h, w) of its patches.
            prefix_tokens: With `target`, how many tokens stand before the patches.
            split: For a model that is not supported, instead of `target`: a function that cuts it,
                model -> `Split` (docs/adapters.md). It is called anew for each batch.
            memory_limit: About how many bytes a chunk of masks may take, beside the model and the
                result; never less than one mask for all images. By default 32 MiB for
                the closed form and 128 MiB for the direct path on the CPU, where larger chunks fall
                out of its caches and are slower; elsewhere a quarter of the free memory where it is
                known, else 1 GiB.
            progress: Called with the number of masks done and of all masks, after each chunk.

        Raises:
            InputError: If a setting is not one of its choices.
            ModelError: If the model is not supported, with the reason.
            ClosedFormError: If `path` is "closed-form" where it does not hold, with the reason.
        """
        check_choice("score", score, ("probability", "logit"))
        check_choice("path", path, ("auto", "closed-form", "direct"))
        if memory_limit is not None and memory_limit <= 0:
            raise InputError(f"memory_limit must be a positive number of bytes; got {memory_limit}")
        self.model = model
        self.masking = Masking(kernel=kernel, class_token=class_token, layer=layer)
        self.score = score
        self.path = path
        self.block = block
        self.target = target
        self.grid = grid
        self.prefix_tokens = prefix_tokens
        self.split = split
        self.memory_limit = memory_limit
        self.progress = progress
        self._choose_path(self._split())
        self._modules = tuple(model.modules())
        self._check_mode()

    def __call__(
        self, images: Float[Tensor, "B ch H W"], targets: Any = None, *, cut: Cut | None = None
    ) -> Explanation:
        """Explain a batch of images.

        Args:
            images: Preprocessed, on the model's device and of its dtype.
            targets: None = each image's top-1 | int for all | "all" | (B,) one an image | (B, K);
                (1, K) broadcasts | a function of the unmasked logits, a NumPy array (B, C), that
                gives one of these.
            cut: From the method `cut`, of these images: G, most of the cost, is not run again.

        Returns:
            Maps, scores and the unmasked prediction, as NumPy arrays.

        Raises:
            InputError: If the images or targets do not fit the model.
            ModelError: If the model is in training mode with random layers, or gives NaN.
        """
        scores, logits, chosen, path = self._run(images, targets, cut)
        return Explanation(
            scores=_numpy(scores),
            logits=logits,
            probs=softmax(logits),
            targets=chosen,
            path=path,
            settings={
                "method": "reciprocam",
                "model": type(self.model).__name__,
                "kernel": self.masking.kernel,
                "class_token": self.masking.class_token,
                "layer": self.masking.layer,
                **({} if self.block == -1 else {"block": self.block}),
                "score": self.score,
            },
        )

    def scores(
        self, images: Float[Tensor, "B ch H W"], targets: Any = None
    ) -> Float[Tensor, "B K h w"]:
        """The scores alone, a tensor on the model's device; arguments and errors of `__call__`.

        Returns:
            float32, or float64 for a float64 model.
        """
        return self._run(images, targets, None)[0]

    @property
    def place(self) -> tuple[Any, ...]:
        """Where which model is cut."""
        grid = None if self.grid is None else tuple(self.grid)
        by_target = (self.target, grid, self.prefix_tokens, self.split)
        return (self.model, self.masking.layer == "pool", self.block, *by_target)

    @torch.no_grad()
    def cut(self, images: Float[Tensor, "B ch H W"]) -> Cut:
        """G alone: to explain the same images with other kernels and settings at a small cost.

        Another explainer of the same `place` may take it: of the same model, cut where this one
        cuts it.

        Raises:
            InputError: If the images do not fit the model.
            ModelError: As in `__call__`.
        """
        self._check_mode()
        check_images(self.model, images)
        return dataclasses.replace(self._split().cut(images), place=self.place)

    @torch.no_grad()
    def _run(
        self, images: Tensor, targets: Any, cut: Cut | None
    ) -> tuple[Tensor, np.ndarray, np.ndarray, str]:
        """Scores (B, K, h, w), logits (B, C), targets (B, K) and the path that ran."""
        split = self._split()
        path = self._choose_path(split)
        self._check_mode()
        check_images(self.model, images)
        if cut is None:
            cut = split.cut(images)
        elif cut.place != self.place or len(cut.x) != len(images):
            raise InputError(
                f"cut must be of these {len(images)} images, from the method `cut` of an explainer "
                f"of the same model with the same block, target, grid and split; it is of "
                f"{len(cut.x)}{'' if cut.place == self.place else ', cut elsewhere'}"
            )
        if path == "closed-form" and cut.readout is None:
            raise ModelError("the split has no readout: say so in its direct_because")
        prepare = closed_form_rows if path == "closed-form" else direct_rows
        rows = prepare(cut, split.prefix_tokens, self.masking)
        count = 1 + cut.grid[0] * cut.grid[1]
        chunks = math.ceil(count / self._rows_at_once(cut, path))
        bounds = [count * chunk // chunks for chunk in range(chunks + 1)]
        for start, stop in itertools.pairwise(bounds):
            values = rows(start, stop)  # (stop - start, B, C)
            if start == 0:
                logits = _numpy(values[0].clone())
                if not np.isfinite(logits).all():
                    raise ModelError(_NOT_FINITE.format("logits"))
                chosen = resolve_targets(targets, logits)
            values = _wide(values)
            if self.score == "probability":
                values = values.softmax(dim=-1)
            if not isinstance(targets, str):  # "all" wants every class, in order
                index = torch.from_numpy(chosen[None]).to(values.device)
                values = values.take_along_dim(index, dim=-1)
            if start == 0:
                scores = values if chunks == 1 else values.new_empty(count, *values.shape[1:])
            if chunks > 1:
                scores[start:stop] = values
            if self.progress is not None:
                self.progress(stop, count)
        if not scores.sum().isfinite():
            raise ModelError(_NOT_FINITE.format("scores under the masks"))
        return scores[1:].permute(1, 2, 0).unflatten(2, cut.grid), logits, chosen, path

    def _split(self) -> Split:
        if self.target is not None:
            if self.split is not None:
                raise InputError("target and split both say where the cut is: leave out one")
            if self.masking.layer != "norm1" or self.block != -1:
                raise InputError("target says where the cut is: leave out layer and block")
            refuse_quantised(self.model)
            return by_target.split(
                self.model, self.target, grid=self.grid, prefix_tokens=self.prefix_tokens
            )
        if self.grid is not None or self.prefix_tokens:
            raise InputError("grid and prefix_tokens go with target; else they are found")
        if self.split is not None:
            if self.masking.layer == "pool" or self.block != -1:
                raise InputError("split says where the cut is: leave out layer='pool' and block")
            if not callable(self.split):
                raise InputError(f"split must be a function, got {type(self.split).__name__}")
            made: Any = self.split(self.model)
            if not isinstance(made, Split):
                raise InputError(
                    "split must be a function that gives a vit_reciprocam.core.split.Split, but "
                    f"gave {type(made).__name__}"
                )
            return made
        return split_model(self.model, block=self.block, pool=self.masking.layer == "pool")

    def _choose_path(self, split: Split) -> str:
        if self.path == "closed-form" and split.direct_because:
            raise ClosedFormError(
                f"the closed form does not hold for this model: {split.direct_because}. "
                "Use path='auto' or path='direct'"
            )
        return "direct" if self.path == "direct" or split.direct_because else "closed-form"

    def _check_mode(self) -> None:
        """Refuse a model whose output is random: its maps would be other than its predictions'."""
        if self.target is not None or self.split is not None:
            by_target.refuse_training(self.model)
        elif any(module.training for module in self._modules):
            check_mode(self.model)

    def _rows_at_once(self, cut: Cut, path: str) -> int:
        """How many masks fit the limit, at about 20 widths for each token that H computes."""
        numbers = cut.x.numel()
        if path == "closed-form" and isinstance(cut.readout, MeanPool):
            numbers = numbers // cut.x.shape[1]
        elif path == "closed-form" and isinstance(cut.readout, Readout):
            numbers = numbers // cut.x.shape[1] * cut.readout.tokens
        limit = self.memory_limit or _default_limit(cut.x.device, path)
        return max(1, limit // (20 * numbers * cut.x.element_size()))


def reciprocam(
    model: nn.Module, images: Float[Tensor, "B ch H W"], targets: Any = None, **settings: Any
) -> Float[Tensor, "B K h w"]:
    """`ReciproCAM.scores` as a function, for `METHODS`; settings are those of `ReciproCAM`."""
    return ReciproCAM(model, **settings).scores(images, targets)


def _default_limit(device: torch.device, path: str) -> int:
    if device.type == "cpu":  # where the caches decide: measured on both paths
        return 2**25 if path == "closed-form" else 2**27
    return torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 2**30


def _wide(values: Tensor) -> Tensor:
    """At least float32, so that half precision costs no more than it must."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _numpy(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()
