"""What an explanation costs beside a plain forward pass, measured in one run on this machine.

    python benchmarks/cost.py                              # time, DeiT-Tiny/Small/Base at batch 1
    python benchmarks/cost.py --batch 16 --models deit_tiny_patch16_224 deit_small_patch16_224
    python benchmarks/cost.py --size 1024 --models deit_tiny_patch16_224
    python benchmarks/cost.py --memory                     # peak memory instead of time
    python benchmarks/cost.py --naive                      # adds the direct path, H once a mask
    python benchmarks/cost.py --pool avg --naive --runs 5 --models vit_base_patch16_224

Times are taken in turn (forward, explanation, forward, ...), so that the machine's drift hits all
alike; "all classes" is the prediction and the scores of all classes as NumPy arrays, and "with
maps" scales each class's to [0, 1] besides. Memory is the peak of a fresh process, and in brackets
what the call added to what the process had held at most before, results included. Weights are
random: cost does not depend on them.
"""

from __future__ import annotations

import argparse
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import timm
import torch

from vit_reciprocam import ReciproCAM

MODELS = ["deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224"]


def calls(args: argparse.Namespace, name: str) -> dict[str, Callable[[], Any]]:
    """What is measured, by name."""
    pool = {"global_pool": args.pool} if args.pool else {}
    model = timm.create_model(name, img_size=args.size, **pool).eval().to(args.device)
    images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    explainer = ReciproCAM(model)

    def forward() -> np.ndarray:
        with torch.no_grad():
            return model(images).cpu().numpy()

    found: dict[str, Callable[[], Any]] = {
        "forward": forward,
        "top-1 map": lambda: explainer(images).maps,
        "all classes": lambda: explainer(images, "all").scores,
        "all classes, with maps": lambda: explainer(images, "all").maps,
    }
    if args.naive:
        direct = ReciproCAM(model, path="direct")
        at_once = ReciproCAM(model, path="direct", memory_limit=2**60)
        found["direct path, in chunks"] = lambda: direct(images).maps
        found["direct path, all masks at once"] = lambda: at_once(images).maps
    return found


def time_in_turn(what: dict[str, Callable[[], Any]], runs: int) -> dict[str, np.ndarray]:
    """Seconds of each run of each call, taken in turn after two rounds of warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in what}
    for turn in range(runs + 2):
        for name, call in what.items():
            began = time.perf_counter()
            call()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - began)
    return {name: np.array(values) for name, values in seconds.items()}


def peak_mebibytes(args: argparse.Namespace, name: str, what: str) -> tuple[float, float]:
    """Peak memory of a fresh process that makes one call, and how much of it the call added."""
    command = [sys.executable, __file__, "--models", name, "--batch", str(args.batch)]
    command += ["--size", str(args.size), "--threads", str(args.threads), "--child", what]
    command += ["--device", args.device, *(["--pool", args.pool] if args.pool else [])]
    command += ["--naive"] if args.naive else []
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(printed[0]), float(printed[1])


def child(args: argparse.Namespace) -> None:
    """In a fresh process: print the peak of one call, and what it is over the peak before, MiB."""
    call = calls(args, args.models[0])[args.child]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(peak / 1024, (peak - before) / 1024)


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pool", help="Of the head, such as avg, instead of the model's own.")
    parser.add_argument("--naive", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        child(args)
        return
    print(
        f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}, {args.device}; "
        f"batch {args.batch}, {args.size}x{args.size} px, {args.runs} runs\n"
    )
    if args.memory:
        print("| model | what | peak, MiB (added) | ÷ forward (of added) |")
        print("| --- | --- | --- | --- |")
        whats = ["forward", "all classes, with maps"]
        whats += ["direct path, in chunks", "direct path, all masks at once"] if args.naive else []
        for name in args.models:
            plain, plain_added = peak_mebibytes(args, name, "forward")
            for what in whats:
                peak, added = peak_mebibytes(args, name, what)
                print(
                    f"| {name} | {what} | {peak:.0f} ({added:.0f}) "
                    f"| {peak / plain:.2f} ({added / plain_added:.2f}) |",
                    flush=True,
                )
        return
    print("| model | what | median ms | ÷ forward | middle half |\n| --- | --- | --- | --- | --- |")
    for name in args.models:
        seconds = time_in_turn(calls(args, name), args.runs)
        for what, values in seconds.items():
            ratio = np.median(values) / np.median(seconds["forward"])
            low, high = np.percentile(values / seconds["forward"], [25, 75])
            median = 1000 * np.median(values)
            print(
                f"| {name} | {what} | {median:.1f} | {ratio:.3f} | {low:.3f} to {high:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
