"""Every architecture against the definition: what `vit-reciprocam models --check` runs."""

from __future__ import annotations

import fnmatch
import functools
import importlib.util
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vit_reciprocam.adapters import split_model
from vit_reciprocam.adapters.by_target import logits_of
from vit_reciprocam.adapters.zero_shot import ZeroShot
from vit_reciprocam.closed_form import closed_form_rows
from vit_reciprocam.errors import ReciproCAMError
from vit_reciprocam.masks import Masking, mask_matrix
from vit_reciprocam.reciprocam import ReciproCAM, direct_rows

__all__ = ["HEAD", "Architecture", "Check", "architectures", "check", "report"]

_TIMM_MODULES = (
    "vision_transformer",
    "deit",
    "beit",
    "eva",
    "vision_transformer_relpos",
    "vision_transformer_hybrid",
    "naflexvit",
    "cait",
)
HEAD = """# Supported models

Written by `vit-reciprocam models --check --out docs/models.md`. Each architecture was built with
random weights, cut to its last blocks where its builder allows, and its scores compared with the
naive loop: one whole forward pass for each mask, with a hook on the user's own module. The error is
the largest difference of logits ÷ the largest logit, in float32; up to 1e-4 is "equal". The cost
counts multiplications of the whole architecture: prediction and all maps ÷ prediction alone. Names
without a head are checked with one put on.

Beside these: open_clip's timm towers run as timm's models do; transformers' ViT, ViT-MSN, DeiT
(both heads), PVT, and BEiT and Data2Vec without mean pooling take the closed form, as do CLIP's and
MetaCLIP 2's image towers with prompts; DINOv2, BEiT, Data2Vec, CLIP, SigLIP, I-JEPA, Swin, Swin V2
and PVT v2 classifiers the direct path. timm's hierarchical transformers (Swin, PVT v2, Twins, MViT
v2, Hiera, GC ViT, DaViT, PiT, XCiT, VOLO, TNT, MaxViT, CoAtNet, LeViT, EfficientFormer, FastViT and
others) take the direct path too. `tests/test_transformers.py` and `tests/test_timm_stages.py`
compare these with naive loops, small and in float64, all but EfficientViT-L.
`vit-reciprocam models 'PATTERN'` says of any timm name by which path, or why not.

"""
_CLASSES = 8
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Architecture:
    """A model that can be built with random weights.

    Attributes:
        spec: As `load` takes it.
        whole: The model without memory, on the meta device, and an image batch of its size.
        small: A cut of it that runs fast: its last blocks, on a few patches.
    """

    spec: str
    whole: Callable[[], tuple[nn.Module, Tensor]]
    small: Callable[[], tuple[nn.Module, Tensor]]


@dataclass(frozen=True)
class Check:
    """What came of one architecture.

    Attributes:
        spec: As `load` takes it.
        kind: The class of the model and of its last block.
        path: "closed-form", "direct" or "-" if refused.
        reason: Why not the closed form, or why refused.
        cost: Multiplications of all maps and the prediction ÷ those of the prediction alone.
        error: The largest difference from the naive loop's logits ÷ the largest of these.
        status: "equal", "refused", "DIFFERENT", or "failed" where it could not be built.
    """

    spec: str
    kind: str
    path: str
    reason: str = ""
    cost: float | None = None
    error: float | None = None
    status: str = "refused"


def check(architecture: Architecture) -> Check:
    """Build an architecture and compare its chosen path with one whole forward pass a mask."""
    try:
        return _checked(architecture)
    except Exception as error:  # one that cannot be built must not end the others' check
        return Check(
            architecture.spec, "", "-", f"{type(error).__name__}: {error}", status="failed"
        )


def _checked(architecture: Architecture) -> Check:
    whole, images = architecture.whole()
    kind = type(whole).__name__
    try:
        split = split_model(whole)
    except ReciproCAMError as refused:
        return Check(architecture.spec, kind, "-", str(refused))
    kind = f"{kind}, {type(split.block).__name__}"
    path = "direct" if split.direct_because else "closed-form"
    cost = _cost(whole, images)
    model, images = architecture.small()
    error = _error(_shaken(model), images)
    return Check(
        spec=architecture.spec,
        kind=kind,
        path=path,
        reason=split.direct_because,
        cost=cost,
        error=error,
        status="equal" if error <= _TOLERANCE else "DIFFERENT",
    )


@torch.no_grad()
def _cost(model: nn.Module, images: Tensor) -> float:
    model.requires_grad_(False)  # the counter would ask for gradients
    split = split_model(model)
    with FlopCounterMode(display=False) as forward:
        model(images)
    with FlopCounterMode(display=False) as explanation:
        cut = split.cut(images)
        prepare = direct_rows if split.direct_because else closed_form_rows
        prepare(cut, split.prefix_tokens, Masking())(0, 1 + cut.grid[0] * cut.grid[1])
    return float(explanation.get_total_flops() / forward.get_total_flops())


@torch.no_grad()
def _shaken(model: nn.Module) -> nn.Module:
    """With weights that make masks matter."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        scale = 0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def _error(model: nn.Module, images: Tensor) -> float:
    """Against the definition: a whole forward pass for each mask."""
    split = split_model(model)
    scores = ReciproCAM(model, score="logit").scores(images, "all")
    grid = (scores.shape[2], scores.shape[3])
    masks = mask_matrix(grid, Masking(), prefix_tokens=split.prefix_tokens)
    channels_first = split.cut(images).channels_first
    naive = []
    for mask in torch.from_numpy(masks).to(images):

        def masked(tokens: Tensor, _number: int, mask: Tensor = mask) -> Tensor:
            if tokens.ndim == 3:
                return tokens * mask[:, None]
            laid = mask.view(grid)
            return tokens * (laid if channels_first else laid[..., None])

        with split.tap.changed(masked):
            naive.append(logits_of(model(images)))
    expected = torch.stack(naive, dim=-1).unflatten(-1, grid)
    return float((scores - expected).abs().max() / expected.abs().max())


def report(checks: Sequence[Check]) -> str:
    """Markdown: a row for each kind of model, then one for each name."""
    groups: dict[tuple[str, ...], list[Check]] = defaultdict(list)
    for one in checks:
        library = one.spec.partition(":")[0]
        groups[library, one.kind, one.path, one.reason, one.status].append(one)
    lines = [
        "| library | model, its last block | names | path | cost | largest error | status |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (library, kind, path, reason, status), members in groups.items():
        costs = [one.cost for one in members if one.cost is not None]
        errors = [one.error for one in members if one.error is not None]
        cost = f"{min(costs):.2f} to {max(costs):.2f}" if costs else ""
        error = f"{max(errors):.0e}" if errors else ""
        because = f"{path}: {reason}" if reason else path
        lines.append(
            f"| {library} | {kind} | {len(members)} | {because} | {cost} | {error} | {status} |"
        )
    lines += ["", "| name | path | cost | status |", "| --- | --- | --- | --- |"]
    for one in checks:
        cost = "" if one.cost is None else f"{one.cost:.2f}"
        lines.append(f"| `{one.spec}` | {one.path} | {cost} | {one.status} |")
    return "\n".join(lines) + "\n"


# --- what there is to check ------------------------------------------------------------------


def architectures(pattern: str = "*") -> Iterator[Architecture]:
    """Those of the installed libraries that fit a pattern, such as "deit*" or "torchvision:*"."""
    sources = (
        ("timm", _of_timm),
        ("torchvision", _of_torchvision),
        ("open_clip", _of_open_clip),
    )
    for library, source in sources:
        if importlib.util.find_spec(library) is not None:
            for one in source():
                name = one.spec.partition(":")[2]
                if fnmatch.fnmatch(one.spec, pattern) or fnmatch.fnmatch(name, pattern):
                    yield one


def _of_timm() -> Iterator[Architecture]:
    import timm

    def whole(name: str) -> tuple[nn.Module, Tensor]:
        model: Any = timm.create_model(name, num_classes=_CLASSES, device="meta").eval()
        return model, torch.empty(1, *model.pretrained_cfg["input_size"], device="meta")

    def small(name: str) -> tuple[nn.Module, Tensor]:
        outline: Any = timm.create_model(name, device="meta")
        channels, height, width = outline.pretrained_cfg["input_size"]
        embed: Any = getattr(outline, "patch_embed", None)
        step = getattr(outline, "embeds", embed).patch_size[0]
        if embed is not None and getattr(embed, "grid_size", None):
            step = height // embed.grid_size[0]
        size = (3 * step, 4 * step)
        shared = getattr(getattr(_last_block(outline), "attn", None), "num_kv_heads", None)
        grouped = {"depth": 2, "img_size": size, "num_kv_heads": (shared,) * 2}
        tries: Any = ({"depth": 2, "img_size": size}, grouped, {"depth": 2}, {"img_size": size}, {})
        for options in tries:
            try:
                model = timm.create_model(name, num_classes=_CLASSES, **options)
                break
            except (TypeError, AssertionError):  # not every builder takes these
                continue
        if "img_size" in options or embed is None:
            height, width = size
        return model.eval(), _images(channels, height, width)

    for module in _TIMM_MODULES:
        for name in timm.list_models(module=module):
            yield Architecture(
                f"timm:{name}", functools.partial(whole, name), functools.partial(small, name)
            )


def _last_block(model: Any) -> Any:
    return model.blocks[-1] if hasattr(model, "blocks") else None


def _of_torchvision() -> Iterator[Architecture]:
    from torchvision.models import get_model, get_model_builder, list_models

    def whole(name: str) -> tuple[nn.Module, Tensor]:
        with torch.device("meta"):
            model: Any = get_model(name, num_classes=_CLASSES).eval()
        size = getattr(model, "image_size", 224)
        return model, torch.empty(1, 3, size, size, device="meta")

    def small(name: str) -> tuple[nn.Module, Tensor]:
        if name.startswith("swin"):
            return get_model(name, num_classes=_CLASSES).eval(), _images(3, 224, 224)
        with torch.device("meta"):
            outline: Any = get_model(name)
            patch: int = outline.patch_size
            model: Any = get_model(name, num_classes=_CLASSES, image_size=4 * patch)
        model.encoder.layers = model.encoder.layers[-2:]
        model = model.to_empty(device="cpu")
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
        return model.eval(), _images(3, 4 * patch, 4 * patch)

    for name in list_models():
        if get_model_builder(name).__module__.endswith(("vision_transformer", "swin_transformer")):
            yield Architecture(
                f"torchvision:{name}",
                functools.partial(whole, name),
                functools.partial(small, name),
            )


def _of_open_clip() -> Iterator[Architecture]:
    import open_clip
    from open_clip.model import _build_vision_tower

    def build(name: str, **changes: Any) -> tuple[nn.Module, Tensor]:
        config: Any = open_clip.get_model_config(name)
        vision = {**config["vision_cfg"], "timm_model_pretrained": False, **changes}
        tower = _build_vision_tower(config["embed_dim"], vision).eval()
        if getattr(tower, "output_tokens", False):
            tower.output_tokens = False
        height, width = (
            tower.image_size if isinstance(tower.image_size, tuple) else (tower.image_size,) * 2
        )
        model = ZeroShot(tower, torch.randn(_CLASSES, config["embed_dim"]), scale=10.0)
        return model.eval(), torch.randn(1, 3, height, width)

    def whole(name: str) -> tuple[nn.Module, Tensor]:
        with torch.device("meta"):
            return build(name)

    def small(name: str) -> tuple[nn.Module, Tensor]:
        patch = open_clip.get_model_config(name)["vision_cfg"]["patch_size"]
        return build(name, layers=2, image_size=4 * patch)

    for name in open_clip.list_models():
        if "patch_size" in open_clip.get_model_config(name)["vision_cfg"]:  # else timm's, as there
            yield Architecture(
                f"open_clip:{name}", functools.partial(whole, name), functools.partial(small, name)
            )


def _images(channels: int, height: int, width: int) -> Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))
