"""What explanations cost on this machine, as ratios within one run (the paper's Table 2).

In every round each call is made once, in an order drawn anew, so that the machine's drift hits all
alike. A ratio is taken in each round, and their median reported. Only PyTorch models need torch.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vit_reciprocam.benchmark.calls import (
    FIXED,
    FORWARD,
    NAIVE,
    RECIPROCAM,
    Call,
    make_call,
)
from vit_reciprocam.benchmark.memory import peak_memory, saved
from vit_reciprocam.benchmark.models import OnnxFiles, device_name, prepare_model, set_threads
from vit_reciprocam.benchmark.rows import Row, Spread, ratio, spread
from vit_reciprocam.classifier.classifier import Classifier
from vit_reciprocam.errors import InputError, ReciproCAMError
from vit_reciprocam.methods import MethodSpec, check_settings
from vit_reciprocam.onnx.run.explainer import OnnxExplainer
from vit_reciprocam.results.files import library_versions

__all__ = ["benchmark", "environment"]

_DEFAULT = ("relevance",)
_SLOW = 10  # forward passes: a call that takes longer is made in fewer rounds,
_FEWEST = 5  # but in as many as this

Progress = Callable[[int, int], None]


@dataclass
class _Case:
    """A row to be, its call, and the seconds that it took, by round."""

    row: Row
    call: Call | None = None
    every: int = 1  # it is timed in rounds 0, every, 2 every, ...
    trial: float = 0.0
    seconds: dict[int, float] = field(default_factory=dict)


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
    plain: Sequence[str | os.PathLike[str] | None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress | None = None,
) -> list[Row]:
    """Measure the prediction alone, ReciproCAM, its naive computation, and other methods.

    Images are random, the same in every run, and lie on the model's device; logits and what
    ReciproCAM gives come back as NumPy arrays. A call slower than ten forward passes is timed in
    every second round only, or every fourth, and so on, but at least in five.

    Args:
        classifiers: From `load`. Cost does not depend on weights: weights="random" will do.
        methods: Names of `METHODS` with settings as `MethodSpec.parse` reads them, beside what is
            always measured; by default relevance, for the models that have it.
        batch_sizes: Images in one call; all of them are measured.
        rounds: In which times are taken.
        warmup: Calls of each kind before.
        threads: Of the CPU; by default as many as PyTorch is set to, or of an ONNX file as it was
            loaded with. PyTorch's are set back at the end.
        naive: Measure "naive H"; of many patches it takes long.
        memory: Also measure peak memory, in a fresh process for each row.
        plain: For each classifier, of an ONNX file the untouched model's file, which "forward" then
            runs, else None. By default what `cut_out_prediction` makes of the file, which needs the package
            onnx; the demo model brings its own.
        clock: Gives seconds.
        progress: Called with the number of calls done and of all calls; the latter may change.

    Returns:
        For each model and batch size the rows that `Row.method` names, then the methods. "naive H"
        is left out where ReciproCAM itself takes the direct path, and for ONNX files.

    Raises:
        InputError: If there is no such method or setting, or a number is out of range.
        ModelError: If the untouched model cannot be cut out of an ONNX file.
        MissingDependencyError: If the library of a method, or onnx for cutting, is not installed.
    """
    _check(
        classifiers, batch_sizes, plain, {"rounds": rounds, "warmup": warmup, "threads": threads}
    )
    specs = [MethodSpec.parse(method) for method in (_DEFAULT if methods is None else methods)]
    for spec in specs if methods is not None else ():
        check_settings(spec.name, spec.settings)
    fixed = [label for label in FIXED if naive or label != NAIVE]
    labels = list(dict.fromkeys((*fixed, *map(str, specs))))
    optional = () if methods is not None else _DEFAULT
    with contextlib.ExitStack() as stack:
        used = stack.enter_context(set_threads(threads, classifiers))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        models = [
            prepare_model(classifier, given, threads, folder / f"{number}.onnx")
            for number, (classifier, given) in enumerate(
                zip(classifiers, plain or [None] * len(classifiers), strict=True)
            )
        ]
        pairs = list(zip(classifiers, models, strict=True))
        count = len(classifiers) * len(batch_sizes) * len(labels)
        tick = _Ticks(progress, count * (1 + rounds + memory))
        groups = [
            _tried(classifier, model, batch, used, labels, optional, warmup, clock, tick)
            for classifier, model in pairs
            for batch in batch_sizes
        ]
        _slow_ones_less_often(groups, rounds)
        timed = sum(math.ceil(rounds / case.every) for group in groups for case in group)
        tick.total = tick.done + timed + memory * sum(map(len, groups))
        _time_in_turn(groups, rounds, clock, tick)
        rows = [[_filled(case, group) for case in group] for group in groups]
        if memory:
            each = [model for model in models for _ in batch_sizes]
            rows = [
                _with_memory(group, model, tick) for group, model in zip(rows, each, strict=True)
            ]
    return [row for group in rows for row in group]


def environment() -> dict[str, Any]:
    """The machine and the versions that figures were taken with."""
    return {
        "processor": device_name(None),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": library_versions(),
    }


class _Ticks:
    """Counts calls, and reports."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.done, self.total = progress, 0, total

    def __call__(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


def _check(
    classifiers: Sequence[Classifier],
    batch_sizes: Sequence[int],
    plain: Sequence[Any] | None,
    numbers: dict[str, int | None],
) -> None:
    if not classifiers or not batch_sizes:
        raise InputError("nothing to measure: pass at least one model and one batch size")
    for name, value in [*numbers.items(), *(("a batch size", batch) for batch in batch_sizes)]:
        if value is not None and value < 1:
            raise InputError(f"{name} must be 1 or more; got {value}")
    if plain is not None and len(plain) != len(classifiers):
        raise InputError(f"{len(plain)} plain files for {len(classifiers)} models: one for each")
    for classifier, file in zip(classifiers, plain or [None] * len(classifiers), strict=True):
        if file is not None and not isinstance(classifier.backend, OnnxExplainer):
            raise InputError(f"{classifier.name} is no ONNX file and needs no plain file")


def _tried(
    classifier: Classifier,
    model: Any,
    batch: int,
    threads: int,
    labels: Sequence[str],
    optional: Sequence[str],
    warmup: int,
    clock: Callable[[], float],
    tick: _Ticks,
) -> list[_Case]:
    """Each call warmed up; those that cannot be made have a row that says why."""
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
                began = clock()
                _, path = call()
                trial = clock() - began
            cases[label] = _Case(replace(row, path=path), call, trial=trial)
        except ReciproCAMError as error:
            if label not in optional:
                cases[label] = _Case(replace(row, note=str(error)))
        except (RuntimeError, MemoryError) as error:  # as where memory runs out
            reason = str(error).strip().partition("\n")[0]
            cases[label] = _Case(replace(row, note=f"{type(error).__name__}: {reason}"))
        tick()
    return list(cases.values())


def _slow_ones_less_often(groups: Iterable[Sequence[_Case]], rounds: int) -> None:
    """So that none takes more than ten forward passes a round, if it is in five rounds still.

    Steps are powers of two, so that two calls share all the rounds of the rarer one.
    """
    for group in groups:
        forward = group[0].trial
        for case in group:
            while (
                case.trial > _SLOW * case.every * forward > 0
                and math.ceil(rounds / (2 * case.every)) >= _FEWEST
            ):
                case.every *= 2


def _time_in_turn(
    groups: Iterable[Sequence[_Case]], rounds: int, clock: Callable[[], float], tick: _Ticks
) -> None:
    shuffle = random.Random(0).shuffle
    for number in range(rounds):
        for group in groups:
            turn = [case for case in group if number % case.every == 0]
            shuffle(turn)
            for case in turn:
                if case.call is not None:
                    began = clock()
                    case.call()
                    case.seconds[number] = clock() - began
                tick()


def _filled(case: _Case, group: Sequence[_Case]) -> Row:
    """The row with its times."""
    if not case.seconds:
        return case.row
    by_label = {other.row.method: other.seconds for other in group}
    seconds = spread(case.seconds.values())
    return replace(
        case.row,
        rounds=len(case.seconds),
        ms=Spread(*(1000 * value for value in seconds)),
        fps=case.row.batch / seconds.median,
        to_forward=ratio(case.seconds, by_label[FORWARD]),
        to_reciprocam=ratio(case.seconds, by_label[RECIPROCAM]),
    )


def _with_memory(rows: Sequence[Row], model: Any, tick: _Ticks) -> list[Row]:
    """The rows with their peaks of memory; a note where they could not be had."""
    found = []
    with contextlib.ExitStack() as stack:
        problem, where = "", {}
        try:
            where = stack.enter_context(saved(model))
        except ReciproCAMError as error:
            problem = str(error)
        for row in rows:
            tick()
            if row.ms is None or problem:
                found.append(replace(row, note=row.note or problem))
                continue
            try:
                peak = peak_memory(
                    where, row.method, size=row.size, batch=row.batch, threads=row.threads
                )
                found.append(replace(row, peak_bytes=peak.total, added_bytes=peak.added))
            except ReciproCAMError as error:
                found.append(replace(row, note=str(error)))
    return found
