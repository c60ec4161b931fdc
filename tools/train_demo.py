"""Train the bundled demo model on drawn scenes: `python tools/train_demo.py --out runs/demo`.

A timm VisionTransformer learns two things at once. From its class token it predicts for each
class, independently of the others, whether it is in the scene; with a softmax over the classes,
evidence for one object would count against another. From every patch token it predicts what the
patch shows (token labelling, Jiang et al. 2021, "All Tokens Matter"). Without that, such a small
model would hardly learn from so few pictures. The head for patches is not shipped.

Before the last two epochs of the first stage, half of the patches are dropped at random, which
halves the cost. In half of the scenes the class token enters the last block as it entered the
first. So the last block, where the method masks, learns to read the patches rather than to trust
what earlier blocks decided. In two more, short stages, without the loss for patches, the last
attention sees only some of the patches, and those faintly, so that a little evidence moves the
prediction only a little. The weights shipped are the mean of those after each stage (Izmailov et
al. 2018, "Averaging Weights Leads to Wider Optima").

The training is seeded and takes under an hour on two cores.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from vit_reciprocam.pictures.scenes import CLASSES, draw_scene

Batch = tuple[Tensor, Tensor, Tensor]  # images, classes present, classes of the patches
Losses = dict[str, Tensor]

SIZE, PATCH = 112, 8
GRID = SIZE // PATCH
ARCHITECTURE = {
    "img_size": SIZE,
    "patch_size": PATCH,
    "embed_dim": 96,
    "depth": 6,
    "num_heads": 3,
    "num_classes": len(CLASSES),
}
TRAIN_SEEDS = 1_000_000  # the first seed of training scenes; tests and demos use lower ones
VALID_SEEDS = 900_000
BACKGROUND = len(CLASSES)


def draw(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw a scene: pixels (SIZE, SIZE, 3), classes present (classes,), patch classes (GRID, GRID).

    A patch has the class of the object that covers more than 40 % of it, or is background.
    """
    scene = draw_scene(seed, size=SIZE)
    present = np.zeros(len(CLASSES), dtype=np.float32)
    present[list(scene.labels)] = 1
    patches = np.full((GRID, GRID), BACKGROUND)
    for label, mask in zip(scene.labels, scene.masks, strict=True):
        patches[mask.reshape(GRID, PATCH, GRID, PATCH).mean(axis=(1, 3)) > 0.4] = label
    return np.asarray(scene.image), present, patches


def draw_many(first: int, count: int) -> Batch:
    """Draw many scenes: images uint8 (count, 3, SIZE, SIZE), classes present, patch classes."""
    with ProcessPoolExecutor() as pool:
        drawn = pool.map(draw, range(first, first + count), chunksize=256)
        images, present, patches = (torch.from_numpy(np.stack(c)) for c in zip(*drawn, strict=True))
    return images.permute(0, 3, 1, 2).contiguous(), present, patches


def normalise(images: Tensor) -> Tensor:
    """Turn uint8 images into the model's input: mean 0.5, standard deviation 0.5."""
    return images.float() / 127.5 - 1


def augment(images: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mirror half of the scenes and shuffle the colour channels."""
    mirrored = torch.rand(len(images)) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    patches = torch.where(mirrored[:, None, None], patches.flip(2), patches)
    return images[:, torch.randperm(3)], patches


def first_stage(model: VisionTransformer, patch_head: nn.Linear, keep: int, batch: Batch) -> Losses:
    """Return the losses of the first stage: classes, and patch classes of `keep` random patches."""
    images, present, patches = batch
    images, patches = augment(images, patches)
    tokens = model._pos_embed(model.patch_embed(normalise(images)))
    kept = torch.rand(len(images), GRID * GRID).argsort(1)[:, :keep]
    rows = kept[..., None].expand(-1, -1, tokens.shape[-1])
    start = tokens[:, :1]
    tokens = model.blocks[:-1](torch.cat([start, tokens[:, 1:].gather(1, rows)], dim=1))
    tokens = model.norm(model.blocks[-1](reset_half(tokens, start)))
    class_loss = binary_cross_entropy_with_logits(model.forward_head(tokens), present)
    logits = patch_head(tokens[:, 1:]).flatten(0, 1)
    patch_loss = cross_entropy(logits, patches.flatten(1).gather(1, kept).flatten())
    return {"class_loss": class_loss * len(CLASSES) / 2, "patch_loss": patch_loss}


def later_stage(model: VisionTransformer, batch: Batch) -> Losses:
    """Return the loss of a later stage, in which the last attention sees few and faint patches."""
    images, present, patches = batch
    images, _ = augment(images, patches)
    tokens = model._pos_embed(model.patch_embed(normalise(images)))
    x = reset_half(model.blocks[:-1](tokens), tokens[:, :1])
    count = len(images)
    share, level = torch.rand(count, 1, 1), 0.1 + 0.9 * torch.rand(count, 1, 1)
    seen = level * (torch.rand(count, x.shape[1], 1) < share)
    seen = torch.where(torch.rand(count, 1, 1) < 0.3, 1.0, seen)  # in 30 % of scenes, everything
    seen[:, 0] = 1.0  # the class token
    block = model.blocks[-1]
    x = x + block.attn(block.norm1(x) * seen)
    x = x + block.mlp(block.norm2(x))
    logits = model.forward_head(model.norm(x))
    loss = binary_cross_entropy_with_logits(logits, present)
    return {"class_loss": loss * len(CLASSES) / 2}


def reset_half(tokens: Tensor, start: Tensor) -> Tensor:
    """Put the class token back to what it was at the start, in half of the scenes."""
    reset = torch.rand(len(tokens), 1, 1) < 0.5
    return torch.cat([torch.where(reset, start, tokens[:, :1]), tokens[:, 1:]], dim=1)


@torch.no_grad()
def accuracy(model: VisionTransformer, valid: Batch) -> float:
    """Return the share of scenes whose top class is present."""
    images, present, _ = valid
    model.eval()
    top = torch.cat([model(normalise(batch)).argmax(1) for batch in images.split(250)])
    model.train()
    return float(present[torch.arange(len(present)), top].mean())


def fit(
    model: VisionTransformer,
    parameters: list[nn.Parameter],
    losses: list[Callable[[Batch], Losses]],
    data: Batch,
    valid: Batch,
    *,
    lr: float,
    batch: int = 64,
) -> list[dict[str, float]]:
    """Train for one epoch per loss, in one learning-rate cycle; return the log of each epoch."""
    began = time.monotonic()
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    steps = len(losses) * (len(data[0]) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    log = []
    for loss in losses:
        seen: list[dict[str, float]] = []
        for rows in torch.randperm(len(data[0])).split(batch):
            if len(rows) < batch:
                continue
            parts = loss((data[0][rows], data[1][rows], data[2][rows]))
            optimiser.zero_grad()
            torch.stack(list(parts.values())).sum().backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
            seen.append({name: value.item() for name, value in parts.items()})
        means = {name: round(float(np.mean([s[name] for s in seen])), 4) for name in seen[0]}
        seconds = round(time.monotonic() - began)
        log.append({**means, "top1_present": round(accuracy(model, valid), 4), "seconds": seconds})
        print(log[-1], flush=True)
    return log


def main() -> None:
    """Train in stages and write `demo.safetensors` and `demo.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="Folder to write weights and log to."
    )
    parser.add_argument("--scenes", type=int, default=36_000, help="Number of training scenes.")
    parser.add_argument("--start", type=Path, help="Folder of a finished first stage, to skip it.")
    args = parser.parse_args()

    torch.manual_seed(0)
    data = draw_many(TRAIN_SEEDS, args.scenes)
    valid = draw_many(VALID_SEEDS, 500)
    model = VisionTransformer(**ARCHITECTURE)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.start:
        model.load_state_dict(load_file(args.start / "demo.safetensors"))
        log = json.loads((args.start / "demo.json").read_text())["log"]
    else:
        patch_head = nn.Linear(model.embed_dim, len(CLASSES) + 1)
        half, whole = (
            functools.partial(first_stage, model, patch_head, keep)
            for keep in (GRID * GRID // 2, GRID * GRID)
        )
        parameters = [*model.parameters(), *patch_head.parameters()]
        log = fit(model, parameters, [half] * 9 + [whole] * 2, data, valid, lr=1.5e-3)
        write(model, log, args.out / "first-stage")
    stages = [copy.deepcopy(model.state_dict())]
    loss = functools.partial(later_stage, model)
    for seed, lr in ((1, 4e-4), (2, 6e-4)):
        torch.manual_seed(seed)
        log += fit(model, list(model.parameters()), [loss], data, valid, lr=lr)
        stages.append(copy.deepcopy(model.state_dict()))
    model.load_state_dict({k: sum(s[k] for s in stages) / len(stages) for k in stages[0]})
    write(model, log, args.out)


def write(model: VisionTransformer, log: list[dict[str, float]], folder: Path) -> None:
    """Write the weights, and a record of how they were trained."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "demo.safetensors")
    record = {"architecture": ARCHITECTURE, "classes": list(CLASSES), "log": log}
    (folder / "demo.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
