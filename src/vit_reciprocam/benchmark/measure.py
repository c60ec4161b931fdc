"""Measure what explanations cost on this machine, as ratios within one run (the paper's Table 2).

In every round each call is made once, in an order drawn anew, so that the machine's drift hits all
calls alike. A ratio is taken in each round, and the median of the ratios is reported. PyTorch is
needed only for PyTorch models.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import random
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from vit_reciprocam.benchmark.calls import (
    FIXED,
    FORWARD,
    NAIVE,
    RECIPROCAM,
    Call,
    OnnxFiles,
    device_name,
    make_call,
    prepare_model,
    set_threads,
)
from vit_reciprocam.benchmark.memory import measure_peak
from vit_reciprocam.classifier.classifier import Classifier
from vit_reciprocam.errors import InputError, ReciproCAMError, first_line
from vit_reciprocam.methods import MethodSpec, check_settings
from vit_reciprocam.onnx.run.explainer import OnnxExplainer
from vit_reciprocam.results.files import library_versions

__all__ = ["Row", "Spread", "benchmark", "environment"]

_SLOW = 10  # number of forward passes; a call that takes longer is made in fewer rounds
_FEWEST = 5  # least number of rounds in which a slow call is made


@dataclass(frozen=True)
class Spread:
    """A median, and the quartiles, between which the middle half of the values lies."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """The cost of one call. Figures that were not measured are None, and `note` says why."""

    model: str  # spec, as `load` takes it
    method: str  # one of `FIXED`, or a method of `METHODS`
    path: str  # "closed-form" or "direct" if the call ran ReciproCAM, else ""
    batch: int  # number of images in one call
    size: tuple[int, int]  # (height, width) of the images in pixels
    device: str  # name of the processor
    threads: int  # number of CPU threads
    rounds: int = 0  # number of rounds in which the call was timed
    ms: Spread | None = None  # milliseconds per call
    fps: float | None = None  # images per second, from the median
    to_forward: Spread | None = None  # time ÷ that of "forward" in the same round
    to_reciprocam: Spread | None = None  # time ÷ that of "reciprocam" in the same round
    # peak memory of a fresh process that made this one call; on a GPU, the most that PyTorch held
    peak_bytes: int | None = None
    added_bytes: int | None = None  # part of the peak that the call added to the loaded model
    note: str = ""  # reason why something was not measured
    backend: str = "torch"  # or the runtime of an ONNX file, "onnxruntime" or "openvino"


@dataclass
class _Case:
    """A call while it is measured."""

    row: Row
    model: Any
    call: Call | None = None  # None if it cannot be made
    every: int = 1  # it is timed in rounds 0, every, 2 · every and so on
    trial: float = 0.0  # seconds that its last warm-up took
    seconds: dict[int, float] = field(default_factory=dict)  # round -> seconds that it took


def benchmark(
    classifiers: Sequence[Classifier],
    methods: Sequence[str] | None = None,
    *,
    batch_sizes: Sequence[int] = (1,),
    rounds: int = 30,
    warmup: int = 2,
    threads: int | None = None,
    naive: bool = True,
    memory: bool = False,
    untouched: Sequence[str | os.PathLike[str] | None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Measure the prediction alone, ReciproCAM, its naive computation, and other methods.

    Images are random, the same in every run, and lie on the model's device; logits and the results
    of ReciproCAM come back as NumPy arrays. A call slower than ten forward passes is timed in every
    second round only, or every fourth, and so on, but in at least five rounds.

    Args:
        classifiers: Classifiers from `load`. Weights do not change the cost, so weights="random"
            will do.
        methods: Names of `METHODS` with settings, as `MethodSpec.parse` reads them, to measure
            beside the fixed calls; by default relevance, for the models that have it.
        batch_sizes: Numbers of images in one call; each of them is measured.
        rounds: Number of rounds that are timed.
        warmup: Number of times that each call is made before the first round.
        threads: Number of CPU threads; by default as many as PyTorch is set to, or as an ONNX file
            was loaded with. PyTorch's number is set back at the end.
        naive: Whether to measure "naive H", which takes long with many patches.
        memory: Whether to measure peak memory too, in a fresh process for each row.
        untouched: File of the untouched model for each classifier that is an ONNX file, which
            "forward" then runs; None for the others. By default it is cut out of the file, which
            needs the package onnx; the demo model brings its own.
        progress: Function that is called with the number of calls done and the number of all calls,
            which may change on the way.

    Returns:
        For each model and batch size the rows of the fixed calls, see `FIXED`, and then those of
        the methods. "naive H" is left out for ONNX files, and if ReciproCAM itself takes the direct
        path.

    Raises:
        InputError: If there is no such method or setting, a number is out of range, or `untouched`
            does not fit the classifiers.
        ModelError: If the untouched model cannot be cut out of an ONNX file.
        MissingDependencyError: If the library of a method, or onnx for cutting, is not installed.
    """
    files = [None] * len(classifiers) if untouched is None else list(untouched)
    numbers = {"rounds": rounds, "warmup": warmup, "threads": threads}
    _check(classifiers, batch_sizes, files, numbers)
    specs = [MethodSpec.parse(one) for one in methods or ()]
    for spec in specs:
        check_settings(spec.name, spec.settings)
    optional = ("relevance",) if methods is None else ()
    fixed = [label for label in FIXED if naive or label != NAIVE]
    labels = list(dict.fromkeys((*fixed, *map(str, specs), *optional)))
    # the most calls that there can be; how many there are is known after the warm-up
    total = len(classifiers) * len(batch_sizes) * len(labels) * (1 + rounds + memory)
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    with contextlib.ExitStack() as stack:
        used_threads = stack.enter_context(set_threads(threads, classifiers))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        models = [
            prepare_model(classifier, file, threads, folder / f"{number}.onnx")
            for number, (classifier, file) in enumerate(zip(classifiers, files, strict=True))
        ]
        groups = [
            _warm_up(classifier, model, batch, used_threads, labels, optional, warmup, tick)
            for classifier, model in zip(classifiers, models, strict=True)
            for batch in batch_sizes
        ]
        _space_out_slow_calls(groups, rounds)
        timed = sum(math.ceil(rounds / case.every) for group in groups for case in group)
        total = done + timed + memory * sum(map(len, groups))
        _time_in_turn(groups, rounds, tick)
        rows = []
        for group in groups:
            for case in group:
                rows.append(_make_row(case, group))
                if memory:
                    rows[-1] = _add_memory(rows[-1], case.model)
                    tick()
    return rows


def environment() -> dict[str, Any]:
    """Return the machine and the versions that figures are measured with, as JSON values."""
    return {
        "processor": device_name(None),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": library_versions(),
    }


def _check(
    classifiers: Sequence[Classifier],
    batch_sizes: Sequence[int],
    files: Sequence[Any],
    numbers: dict[str, int | None],
) -> None:
    if not classifiers or not batch_sizes:
        raise InputError("nothing to measure: pass at least one model and one batch size")
    for name, value in [*numbers.items(), *(("a batch size", batch) for batch in batch_sizes)]:
        if value is not None and value < 1:
            raise InputError(f"{name} must be 1 or more; got {value}")
    if len(files) != len(classifiers):
        raise InputError(
            f"{len(files)} files of untouched models for {len(classifiers)} models: pass one for "
            "each, None for a PyTorch model"
        )
    for classifier, file in zip(classifiers, files, strict=True):
        if file is not None and not isinstance(classifier.backend, OnnxExplainer):
            raise InputError(
                f"{classifier.name} is not an ONNX file and needs no file of an untouched model: "
                "pass None for it"
            )


def _warm_up(
    classifier: Classifier,
    model: Any,
    batch: int,
    threads: int,
    labels: Sequence[str],
    optional: Sequence[str],
    warmup: int,
    tick: Callable[[], None],
) -> list[_Case]:
    """Make each call of a model and batch size, or say in its row why it cannot be made."""
    size, device = classifier.preprocess.size, device_name(model)
    onnx = isinstance(model, OnnxFiles)
    if onnx:
        threads = model.options["threads"] or threads
    backend = model.explainer.session.backend if onnx else "torch"
    cases: dict[str, _Case] = {}
    for label in labels:
        if label == NAIVE and (onnx or cases[RECIPROCAM].row.path != "closed-form"):
            continue
        row = Row(classifier.name, label, "", batch, size, device, threads, backend=backend)
        try:
            call = make_call(model, label, size=size, batch=batch)
            for _ in range(warmup):
                began = perf_counter()
                _, path = call()
                trial = perf_counter() - began
            cases[label] = _Case(replace(row, path=path), model, call, trial=trial)
        except ReciproCAMError as error:
            if label not in optional:
                cases[label] = _Case(replace(row, note=str(error)), model)
        except (RuntimeError, MemoryError) as error:  # for instance because memory runs out
            note = f"{type(error).__name__}: {first_line(error)}"
            cases[label] = _Case(replace(row, note=note), model)
        tick()
    return list(cases.values())


def _space_out_slow_calls(groups: Iterable[Sequence[_Case]], rounds: int) -> None:
    """Time slow calls in fewer rounds.

    A call then takes at most `_SLOW` forward passes per round on average. Steps are powers of two,
    so that two calls share all the rounds of the rarer one.
    """
    for group in groups:
        forward = group[0].trial
        for case in group:
            while (
                case.trial > _SLOW * case.every * forward > 0
                and math.ceil(rounds / (2 * case.every)) >= _FEWEST
            ):
                case.every *= 2


def _time_in_turn(groups: Iterable[Sequence[_Case]], rounds: int, tick: Callable[[], None]) -> None:
    """Make and time the calls; those of a group follow each other, in an order drawn each round."""
    shuffle = random.Random(0).shuffle
    for number in range(rounds):
        for group in groups:
            turn = [case for case in group if number % case.every == 0]
            shuffle(turn)
            for case in turn:
                if case.call is not None:
                    began = perf_counter()
                    case.call()
                    case.seconds[number] = perf_counter() - began
                tick()


def _make_row(case: _Case, group: Sequence[_Case]) -> Row:
    """Return the row of a call with its times, and their ratios to others of its group."""
    if not case.seconds:
        return case.row
    by_label = {other.row.method: other.seconds for other in group}
    ms = _spread(1000 * seconds for seconds in case.seconds.values())
    return replace(
        case.row,
        rounds=len(case.seconds),
        ms=ms,
        fps=1000 * case.row.batch / ms.median,
        to_forward=_ratio(case.seconds, by_label[FORWARD]),
        to_reciprocam=_ratio(case.seconds, by_label[RECIPROCAM]),
    )


def _spread(values: Iterable[float]) -> Spread:
    """Return the median of values and their quartiles."""
    low, median, high = np.percentile(list(values), [25, 50, 75])
    return Spread(float(median), float(low), float(high))


def _ratio(seconds: Mapping[int, float], reference: Mapping[int, float]) -> Spread | None:
    """Return the spread of the ratios over the rounds that both were timed in, if any."""
    shared = seconds.keys() & reference.keys()
    return _spread(seconds[number] / reference[number] for number in shared) if shared else None


def _add_memory(row: Row, model: Any) -> Row:
    """Return the row with its peak memory, or with a note that says why not."""
    if row.ms is None:
        return row
    try:
        peak, added = measure_peak(
            model, row.method, size=row.size, batch=row.batch, threads=row.threads
        )
    except ReciproCAMError as error:
        return replace(row, note=str(error))
    return replace(row, peak_bytes=peak, added_bytes=added)
