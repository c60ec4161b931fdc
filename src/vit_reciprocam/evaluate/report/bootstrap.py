"""Bootstrap over pictures, paired between methods, for the intervals of figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from vit_reciprocam.evaluate.metrics.protocols import Protocol
from vit_reciprocam.evaluate.metrics.registry import METRICS

__all__ = ["Estimate", "Resampled", "resample"]

_INTERVAL = (2.5, 97.5)
_BLOCK = 64  # resamples in one product of matrices


@dataclass(frozen=True)
class Estimate:
    """A figure or a difference in percent, and its 95 % bootstrap percentile interval."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether 0 lies outside the interval, which makes a difference clear."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Resampled:
    """Figures of several methods on the same pictures.

    The values are metric -> (1 + resamples, methods) in percent. The first row is computed from the
    pictures as they are, every other row from a resample, whose pictures are the same for all
    methods. NaN stands for what was not measured.
    """

    methods: tuple[str, ...]
    pictures: int  # their number
    values: Mapping[str, np.ndarray]

    def figures(self, method: str) -> dict[str, Estimate]:
        """Return metric -> figure of a method, for the metrics that were measured."""
        column = self.methods.index(method)
        return self._estimates({name: v[:, column] for name, v in self.values.items()})

    def differences(self, method: str, other: str) -> dict[str, Estimate]:
        """Return metric -> a method's figure minus another's, on the same resampled pictures."""
        a, b = self.methods.index(method), self.methods.index(other)
        return self._estimates({name: v[:, a] - v[:, b] for name, v in self.values.items()})

    def _estimates(self, columns: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
        found = {}
        for name, column in columns.items():
            if np.isnan(column[0]):
                continue
            drawn = column[1:][~np.isnan(column[1:])]  # NaN where no picture with a box was drawn
            low, high = np.percentile(drawn if len(drawn) else column[:1], _INTERVAL)
            found[name] = Estimate(float(column[0]), float(low), float(high))
        return found


def resample(
    columns: Mapping[str, Mapping[str, np.ndarray]],
    protocol: Protocol,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Resampled:
    """Return the figures of `summarize` for the pictures and for resamples of them.

    Bootstrap over pictures (Efron 1979): a resample draws as many pictures as there are, with
    replacement. Every figure is a mean over pictures or is computed from such means. So a resample
    is a row of weights, the number of times that each picture was drawn, and all resamples are one
    product of matrices.

    The columns are method -> metric -> (pictures,) in fractions, the same pictures in one order for
    all methods. What was not measured is NaN or absent.
    """
    names = [name for name, metric in METRICS.items() if metric.is_stored]
    pictures = len(next(iter(columns.values()))["drop"])
    absent = np.full(pictures, np.nan)
    given = [[each.get(name, absent) for name in names] for each in columns.values()]
    x = np.array(given, np.float64).reshape(-1, pictures)
    known = (~np.isnan(x)).astype(np.float64)
    filled = np.nan_to_num(x)
    with np.errstate(invalid="ignore"):  # 0/0 where nothing is known
        blocks = [
            (weights @ filled.T) / (weights @ known.T)
            for weights in _weights(pictures, resamples, seed)
        ]
    means = np.concatenate(blocks).reshape(-1, len(columns), len(names))
    values = {name: means[..., number] for number, name in enumerate(names)}
    for name, metric in METRICS.items():
        if metric.combines_means(protocol):
            terms = [values[term] for term in metric.terms]
            unknown = any(np.isnan(term).all() for term in terms)  # as in a run of mosaics
            values[name] = terms[0] * np.nan if unknown else metric.compute(*terms)
    return Resampled(
        tuple(columns), pictures, {name: 100 * value for name, value in values.items()}
    )


def _weights(pictures: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield blocks (rows, pictures) of how often pictures count: a row of ones, then the draws."""
    yield np.ones((1, pictures))
    random = np.random.default_rng(seed)
    for start in range(0, resamples, _BLOCK):
        rows = min(_BLOCK, resamples - start)
        drawn = (random.integers(pictures, size=pictures) for _ in range(rows))
        yield np.array([np.bincount(one, minlength=pictures) for one in drawn], np.float64)
