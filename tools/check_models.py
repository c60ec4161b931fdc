"""Compare every architecture with the definition: `python tools/check_models.py 'PATTERN'`.

Each is built with random weights. Its scores, by the path that the package takes, are compared with
those of one whole forward pass per mask. Without a pattern all are compared, which takes hours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from small_models import Candidate, find_candidates
from vit_reciprocam.cli.console import errors_in_one_line, progress
from vit_reciprocam.cli.options import AsJson, Debug
from vit_reciprocam.core.closed_form import closed_form_rows
from vit_reciprocam.core.direct import direct_rows
from vit_reciprocam.core.masks import Masking, mask_matrix
from vit_reciprocam.core.split import Cut, Split, logits_of
from vit_reciprocam.errors import ModelError, ReciproCAMError
from vit_reciprocam.libraries import LIBRARIES
from vit_reciprocam.libraries.dispatch import split_model
from vit_reciprocam.libraries.listing import nothing_fits, short_reason
from vit_reciprocam.results.files import write_atomically

__all__ = ["Check", "app", "check", "check_models", "introduction", "report"]

app = typer.Typer(add_completion=False)

_INTRODUCTION = """# Supported models

Written by `python tools/check_models.py --out docs/models.md`, with {versions}.

Each model was built with random weights. Its logits under masks were compared with the definition:
one whole forward pass per mask, with a hook on the model's own module.

- **compared**: "whole" is the model as it is; "cut" is a small model with few blocks and mostly few
  patches, if its builder can make one. With up to 16 masks, all are compared; with more, four: the
  first, the last of the first row, the middle one and the last.
- **largest error**: the largest difference of a logit from the definition, divided by the largest
  difference between two masks' values of a logit. Up to 1e-3 counts as "equal", in float32, or in
  float64 if masks make too little difference for float32. If they make none, the comparison proves
  nothing and is "unproven".
- **cost**: the multiplications for the prediction and all maps, divided by those for the prediction
  alone, of the whole model.
- **with a head**: the library builds this model without a head, so one was added.

Names after `hf:` are classes of transformers; their cost is that of the default size. `load` takes
a model of such a class, from the hub or a folder. Names after `open_clip:` are image towers, with
prompts as classes. The first two tables count all models of timm, and those models of torchvision
that classify images. The last table lists a refused model only if the name of its module contains
"vit" or "former", or if that module uses a supported class.

"""
_ALL_MASKS = 16
_TOLERANCE = 1e-3
_LEAST_SPREAD = 1e-12
"""The smallest share of the largest logit by which masks must change a logit; below it, rounding
of float64 hides the difference."""


@app.command()
def check_models(
    pattern: Annotated[
        str, typer.Argument(help="Names to check, such as 'deit*' or 'torchvision:*'.")
    ] = "*",
    destination: Annotated[Path | None, typer.Option("--out", help="File for the table.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare every architecture with the naive loop, one whole forward pass per mask.

    The exit code is 1 if a score differs, a comparison proves nothing, or a model cannot be built.
    """
    with errors_in_one_line(debug, lambda: "nothing is written"):
        found = list(find_candidates(pattern))
        if not found:
            raise nothing_fits(pattern)
        results = [check(one) for one in progress(found, "Checking")]
        if destination is not None:
            write_atomically(destination, (introduction() + report(results)).encode())
        everything = [dataclasses.asdict(one) for one in results]
        typer.echo(json.dumps(everything, indent=2) if as_json else report(results))
    if any(one.status not in ("equal", "refused") for one in results):
        raise typer.Exit(1)


@dataclass(frozen=True)
class Check:
    """The result of one architecture.

    Attributes:
        spec: The model as `load` takes it, or a class of transformers.
        kind: The class of the model and of its last block.
        path: "closed-form", "direct" or "-" if refused.
        reason: Why not the closed form, why refused, or why unproven.
        cost: Multiplications of all maps and the prediction ÷ those of the prediction alone.
        error: The largest difference from the logits of whole forward passes ÷ the largest
            difference between two masks' values of a logit; None if masks make no difference.
        compared: Whether the whole model was compared or a small one, and with how many masks.
        status: "equal", "refused", "DIFFERENT", "unproven" if masks make no difference to the
            logits, so that any map would pass, or "failed" if it could not be built.
        listed: Whether a table should list it even if it is refused.
        headless: Whether a head was added.
    """

    spec: str
    kind: str
    path: str
    reason: str = ""
    cost: float | None = None
    error: float | None = None
    compared: str = ""
    status: str = "refused"
    listed: bool = True
    headless: bool = False


def check(candidate: Candidate) -> Check:
    """Build an architecture and compare its path with whole forward passes, one per mask."""
    try:
        return _compare(candidate)
    except Exception as error:  # one that cannot be built must not stop the check of the others
        return Check(candidate.spec, "", "-", f"{type(error).__name__}: {error}", status="failed")


def _compare(candidate: Candidate) -> Check:
    kind = candidate.spec.partition(":")[2] if candidate.listed else "others"
    try:
        whole, images = candidate.whole()
        tower: Any = getattr(whole, "tower", whole)
        kind = type(getattr(tower, "trunk", tower)).__name__
        split = split_model(whole)
    except ReciproCAMError as refused:
        reason = short_reason(str(refused))
        return Check(candidate.spec, kind, "-", reason, listed=candidate.listed)
    whole.requires_grad_(False)  # the counter of multiplications would ask for gradients
    try:
        plain = _multiplications(lambda: whole(images))
    except (AssertionError, RuntimeError) as problem:
        reason = f"its library cannot run it on images of the size that it names: {problem}"
        return Check(candidate.spec, kind, "-", reason)
    try:
        cost = _multiplications(lambda: _all_masks(split, images)) / plain
    except ReciproCAMError as refused:
        return Check(candidate.spec, kind, "-", str(refused))
    model, small_images = candidate.small()
    if _kind(split_model(model)) != _kind(split):
        raise ModelError("the small model is of another kind than the whole one")
    model = _shake(model)
    error, masks = _error(model, small_images)
    if error is None or not error <= _TOLERANCE:  # rounding may hide masks that matter little
        error, masks = _error(model.double(), small_images.double())
    same = _size(model) == _size(whole) and small_images.shape[1:] == images.shape[1:]
    return Check(
        spec=candidate.spec,
        kind=f"{kind}, {type(split.block).__name__}",
        path="direct" if split.direct_because else "closed-form",
        reason="masks make no difference to its logits" if error is None else split.direct_because,
        cost=cost,
        error=error,
        compared=f"{'whole' if same else 'cut'}, {masks} masks",
        status=_verdict(error),
        headless=candidate.headless,
    )


def _verdict(error: float | None) -> str:
    if error is None:
        return "unproven"
    return "equal" if error <= _TOLERANCE else "DIFFERENT"


def _kind(split: Split) -> tuple[object, ...]:
    """Return what a small model must have in common with the whole one."""
    return type(split.block), split.direct_because, split.prefix_tokens, type(split.tap)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def _multiplications(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def _rows(split: Split, cut: Cut) -> Callable[[int, int], Tensor]:
    prepare = direct_rows if split.direct_because else closed_form_rows
    return prepare(cut, split.prefix_tokens, [Masking()])


def _all_masks(split: Split, images: Tensor) -> Tensor:
    cut = split.cut(images)
    return _rows(split, cut)(0, 1 + cut.grid[0] * cut.grid[1])


@torch.no_grad()
def _shake(model: nn.Module) -> nn.Module:
    """Set weights with which masks matter, and BatchNorm statistics as if they had seen data."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:  # those of norms, biases and LayerScale
            parameter.add_(0.3 * noise)
        else:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


@torch.no_grad()
def _error(model: nn.Module, images: Tensor) -> tuple[float | None, int]:
    """Return `Check.error` and the number of masks compared."""
    split = split_model(model)
    cut = split.cut(images)
    rows = _rows(split, cut)
    height, width = cut.grid
    patches = list(range(height * width))
    if len(patches) > _ALL_MASKS:  # the first, the last of its row, the middle, the last
        patches = [0, width - 1, height // 2 * width + width // 2, height * width - 1]
    masks = mask_matrix(cut.grid, Masking(), prefix_tokens=split.prefix_tokens)[patches]
    ours, naive = [rows(0, 1)[0]], [logits_of(model(images))]
    for patch, mask in zip(patches, torch.from_numpy(masks).to(images), strict=True):

        def masked(tokens: Tensor, _number: int, mask: Tensor = mask) -> Tensor:
            if tokens.ndim == 3:
                return tokens * mask[:, None]
            on_grid = mask.view(cut.grid)
            return tokens * (on_grid if cut.channels_first else on_grid[..., None])

        with split.tap.changed(masked):
            naive.append(logits_of(model(images)))
        ours.append(rows(patch, patch + 2)[1])  # computed together with another mask's
    expected = torch.stack(naive)
    difference = (torch.stack(ours) - expected).abs().max()
    spread = (expected[1:].amax(dim=0) - expected[1:].amin(dim=0)).max()
    unproven = spread <= _LEAST_SPREAD * expected.abs().max()
    return None if unproven else float(difference / spread), len(patches)


def introduction() -> str:
    """Return the text before the report in a file: what was done, with which versions."""
    versions = []
    for package in (*(library.package for library in LIBRARIES.values()), "torch"):
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    return _INTRODUCTION.format(versions=", ".join(versions))


def report(checks: Sequence[Check]) -> str:
    """Return three Markdown tables: of kinds of models, of refusals by reason, and of names."""
    groups: dict[tuple[str, ...], list[Check]] = defaultdict(list)
    refused: dict[tuple[str, str], list[Check]] = defaultdict(list)
    for one in checks:
        library = one.spec.partition(":")[0]
        if one.status == "refused":
            refused[library, one.reason].append(one)
        else:
            groups[library, one.kind, one.path, one.reason, one.status].append(one)
    lines = [
        "| library | model, its last block | names | path | cost | largest error | compared "
        "| status |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (library, kind, path, reason, status), members in groups.items():
        costs = [one.cost for one in members if one.cost is not None]
        errors = [one.error for one in members if one.error is not None]
        cost = f"{min(costs):.2f} to {max(costs):.2f}" if costs else ""
        error = f"{max(errors):.0e}" if errors else ""
        because = f"{path}: {reason}" if reason else path
        compared = "; ".join(sorted({one.compared for one in members}))
        lines.append(
            f"| {library} | {kind} | {len(members)} | {because} | {cost} | {error} | {compared} "
            f"| {status} |"
        )
    if refused:
        lines += ["", "| library | refused | names | because |", "| --- | --- | --- | --- |"]
    for (library, reason), members in refused.items():
        kinds = ", ".join(sorted({one.kind for one in members}))
        lines.append(f"| {library} | {kinds} | {len(members)} | {reason} |")
    lines += [
        "",
        "| name | path | cost | compared | status |",
        "| --- | --- | --- | --- | --- |",
    ]
    for one in checks:
        if one.listed or one.status != "refused":
            cost = "" if one.cost is None else f"{one.cost:.2f}"
            status = one.status + (", with a head" if one.headless else "")
            if one.status == "refused":
                status = f"refused: {one.reason}"
            lines.append(f"| `{one.spec}` | {one.path} | {cost} | {one.compared} | {status} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    app()
