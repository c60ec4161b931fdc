"""ViT-ReciproCAM: gradient-free, attention-free saliency maps (Byun & Lee 2023).

Cut the network at the first LayerNorm of its last encoder block: X = G(images), F = norm(X),
logits = H(F, X). For each patch n keep only a small window of tokens around it, M[n], and read each
class's probability (equations 2 to 4):

    S[b, c, n] = softmax(H(F[b] * M[n], X[b]))[c]

The skip path X stays as it is. Two paths lead to the same S: `core.direct` runs H once per mask,
for any H; `core.closed_form` rewrites H exactly for heads that read prefix tokens only, at about
the price of one H.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vit_reciprocam.core.batch import Batch
from vit_reciprocam.core.masks import SCORES, Masking, describe_maskings, read_maskings
from vit_reciprocam.core.precision import in_float32, widen_cut
from vit_reciprocam.core.scores import Scores, compute_scores, to_numpy
from vit_reciprocam.core.split import Cut, Split, Splitter
from vit_reciprocam.errors import ClosedFormError, InputError, ModelError, check_choice
from vit_reciprocam.libraries.cut_at import cut_at, cut_at_block, refuse_training
from vit_reciprocam.libraries.validation import check_images, check_mode
from vit_reciprocam.results.explanation import Explanation, softmax

__all__ = ["ReciproCAM", "reciprocam"]


class ReciproCAM:
    """Explains the predictions of a Vision Transformer; the model is left as it is.

    The model runs part by part, and hooks on the modules inside it run as usual. If the last block
    has hooks, the direct path runs, since the closed form would bypass them. A model with hooks on
    its outermost module is refused.

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
        depth: int = 1,
        score: str = "probability",
        normalize: str = "minmax",
        fuse: Sequence[Mapping[str, Any]] = (),
        path: str = "auto",
        block: int = -1,
        target: nn.Module | None = None,
        grid: tuple[int, int] | None = None,
        prefix_tokens: int = 0,
        split: Splitter | None = None,
        memory_limit: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        check: bool = True,
    ) -> None:
        """Prepare to explain a supported model.

        Args:
            model: A supported classifier in evaluation mode, on any device; with `target` or
                `split`, any module.
            kernel: Window kept around each patch: "gaussian", 3x3 (the paper's default), "dirac",
                the patch alone, "box", 3x3 patches in full, or "box5", 5x5.
            class_token: False also masks the prefix tokens (the paper's ablation, Table 3).
            layer: Place where tokens are masked: "norm1" (the paper's default) or "block" (its
                Table 4); for heads that pool all tokens also "pool", just before the pooling. That
                is not the paper's method, since only the pooling is left between mask and head,
                but it has a closed form.
            depth: Number of blocks, counted from the last, in which the readout tokens see masked
                patches; 1 is the paper's method. More needs a head that reads prefix tokens only.
                The patches themselves are computed from the unmasked image, whatever the depth.
            score: "probability", the paper's, "log-probability", or "logit", without the softmax.
            normalize: "minmax", the paper's, scales each map from its smallest to its largest score
                (equation 3). "evidence" has a natural zero instead, the all-null mask, which keeps
                no patch: the evidence of a mask is the logarithm of its probability over that of
                the all-null mask, in nats, and the map is its positive part over its maximum.
            fuse: Settings whose evidence is summed, each divided by its own maximum, such as
                `[{"kernel": "dirac", "depth": 2}, {"kernel": "box", "depth": 4}]`. They replace
                `kernel`, `class_token` and `depth`, and go with `normalize="evidence"`. One plain
                pass serves them all.
            path: "auto" takes the closed form if it holds, and the result's `path` says which ran;
                "closed-form" raises if it does not hold; "direct" always runs H once per mask.
            block: Encoder block, counted from the end; in a hierarchical model a block of its last
                stage. Blocks other than the last take the direct path.
            target: Module whose output is masked, for a model that is not supported; short for
                `split=cut_at(target, grid=grid, prefix_tokens=prefix_tokens)`, see
                `libraries.cut_at.cut_at`.
            grid: (h, w) of the patches, with `target`.
            prefix_tokens: Number of tokens before the patches, with `target`.
            split: Function that cuts a model that is not supported, model -> `Split`
                (docs/adapters.md). It is called anew for each batch.
            memory_limit: Bytes that a chunk of masks may take, roughly, beside the model and the
                result; a chunk is never less than one mask for all images. On the CPU the default
                is 32 MiB for the closed form and 128 MiB for the direct path, since larger chunks
                fall out of its caches and are slower; elsewhere it is a quarter of the free memory
                if that is known, else 1 GiB.
            progress: Function of the number of masks that are done and of all masks, called after
                each chunk.
            check: False leaves it to the first call to refuse a model that cannot be explained.

        Raises:
            InputError: If a setting is not one of its choices.
            ModelError: If the model is not supported, with the reason.
            ClosedFormError: If `path` is "closed-form" and it does not hold, with the reason.
        """
        check_choice("score", score, SCORES)
        check_choice("path", path, ("auto", "closed-form", "direct"))
        if memory_limit is not None and memory_limit <= 0:
            raise InputError(f"memory_limit must be a positive number of bytes; got {memory_limit}")
        self.model = model
        masking = Masking(kernel=kernel, class_token=class_token, layer=layer, depth=depth)
        self.maskings = read_maskings(masking, normalize, fuse)
        if normalize == "evidence" and score == "logit":
            raise InputError("evidence compares probabilities: leave out score='logit'")
        depth = max(one.depth for one in self.maskings)
        if depth > 1 and (target is not None or block != -1 or path == "direct"):
            raise InputError(
                f"depth={depth} masks what the readout tokens read in the last blocks, in closed "
                "form: leave out target, block and path='direct', or use depth=1"
            )
        self.score = score
        self.normalize = normalize
        self.path = path
        self.block = block
        self.memory_limit = memory_limit
        self.progress = progress
        self._is_known = split is None and target is None
        self._depth = depth
        self.split = _choose_splitter(layer, block, depth, split, target, grid, prefix_tokens)
        if check:
            self._split_and_check()

    def __call__(
        self, images: Float[Tensor, "B ch H W"] | Batch, targets: Any = None
    ) -> Explanation:
        """Explain a batch of images.

        Args:
            images: Preprocessed images, on the model's device and of its dtype, or a `Batch` of
                them, which explainers of one model share. G, most of the cost, then runs once for
                all that cut the model at the same place, such as explainers of several kernels.
            targets: None for each image's top-1 class, an int for all images, "all", (B,) with one
                class per image, (B, K), (1, K) for all images, or a function of the unmasked
                logits, a NumPy array (B, C), that returns one of these.

        Returns:
            Maps, scores and the unmasked prediction, as NumPy arrays.

        Raises:
            InputError: If the images or targets do not fit the model.
            ModelError: If the model is in training mode with random layers, or gives NaN.
        """
        result, path = self._run(images, targets)
        return Explanation(
            scores=to_numpy(result.scores),
            evidence=None if result.evidence is None else to_numpy(result.evidence),
            logits=result.logits,
            probs=softmax(result.logits),
            targets=result.targets,
            path=path,
            settings={
                "method": "reciprocam",
                "model": type(self.model).__name__,
                **describe_maskings(self.maskings),
                **({} if self.block == -1 else {"block": self.block}),
                "score": self.score,
                "normalize": self.normalize,
            },
        )

    def scores(
        self, images: Float[Tensor, "B ch H W"] | Batch, targets: Any = None
    ) -> Float[Tensor, "B K h w"]:
        """Return what maps are scaled from: scores, or evidence with `normalize="evidence"`.

        It is a tensor on the model's device, in float32, or in float64 for a float64 model.
        Arguments and errors are those of `__call__`.
        """
        result, _ = self._run(images, targets)
        return result.scores if result.evidence is None else result.evidence

    @torch.no_grad()
    def _run(self, images: Tensor | Batch, targets: Any) -> tuple[Scores, str]:
        """Return the scores and the path that ran."""
        split, path = self._split_and_check()
        cut = self._cut(split, images if isinstance(images, Batch) else Batch(images))
        if path == "closed-form" and cut.readout is None:
            raise ModelError("the split has no readout: say so in its direct_because")
        with in_float32(cut.x):
            scores = compute_scores(
                widen_cut(cut),
                split.prefix_tokens,
                self.maskings,
                targets,
                score=self.score,
                with_evidence=self.normalize == "evidence",
                path=path,
                memory_limit=self.memory_limit,
                progress=self.progress,
            )
        return scores, path

    def _split_and_check(self) -> tuple[Split, str]:
        """Split the model, and return with it the path to take; refuse what cannot be explained."""
        split: Any = self.split(self.model)
        if not isinstance(split, Split):
            raise InputError(
                "split must be a function that gives a vit_reciprocam.core.split.Split, but gave "
                f"{type(split).__name__}"
            )
        if split.direct_because and (self.path == "closed-form" or self._depth > 1):
            instead = "path='auto' or path='direct'" if self._depth == 1 else "depth=1"
            raise ClosedFormError(
                f"the closed form does not hold for this model: {split.direct_because}. "
                f"Use {instead}"
            )
        if self._is_known:  # with random layers, maps would not explain the prediction
            check_mode(self.model)
        else:
            refuse_training(self.model)
        return split, "direct" if self.path == "direct" or split.direct_because else "closed-form"

    def _cut(self, split: Split, batch: Batch) -> Cut:
        """Return the cut of a batch, from the batch itself if another explainer has cut there."""
        place = self.model, self.split
        if place not in batch.cuts:
            check_images(self.model, batch.images)
            batch.cuts[place] = split.cut(batch.images)
        cut: Cut = batch.cuts[place]
        return cut


def reciprocam(
    model: nn.Module, images: Float[Tensor, "B ch H W"], targets: Any = None, **settings: Any
) -> Float[Tensor, "B K h w"]:
    """Return `ReciproCAM.scores`, as `METHODS` needs it; settings are those of `ReciproCAM`."""
    return ReciproCAM(model, check=False, **settings).scores(images, targets)


def _choose_splitter(
    layer: str,
    block: int,
    depth: int,
    split: Splitter | None,
    target: nn.Module | None,
    grid: tuple[int, int] | None,
    prefix_tokens: int,
) -> Splitter:
    """Return the function that cuts the model, and refuse options that contradict each other."""
    if target is not None:
        if split is not None:
            raise InputError("target and split both say where the cut is: leave out one")
        if layer != "norm1" or block != -1:
            raise InputError("target says where the cut is: leave out layer and block")
        return cut_at(target, grid=grid, prefix_tokens=prefix_tokens)
    if grid is not None or prefix_tokens:
        raise InputError("grid and prefix_tokens go with target; else they are found")
    if split is None:
        return cut_at_block(block, pool=layer == "pool", depth=depth)
    if layer == "pool" or block != -1:
        raise InputError("split says where the cut is: leave out layer='pool' and block")
    if not callable(split):
        raise InputError(f"split must be a function, got {type(split).__name__}")
    return split
