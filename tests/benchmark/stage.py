"""A benchmark by a clock of our own, and what all tests of it share."""

from types import SimpleNamespace

import torch

import vit_reciprocam as vr
from vit_reciprocam.benchmark import measure
from vit_reciprocam.benchmark.measure import benchmark
from vit_reciprocam.classifier.classifier import Classifier

SMALL = "timm:test_vit"
FIXED = [
    "forward",
    "reciprocam",
    "reciprocam, all scores",
    "reciprocam, all maps",
    "naive H",
]


class Stage:
    """Calls that take the seconds they are told, on a clock that only they move."""

    def __init__(self, monkeypatch, seconds, warmup=2):
        self.now, self.log = 0.0, []
        self.seconds, self.warmup = seconds, warmup
        monkeypatch.setattr(measure, "make_call", self.make_call)
        monkeypatch.setattr(measure, "perf_counter", lambda: self.now)
        model = torch.nn.Linear(1, 1)
        backend = SimpleNamespace(model=model, num_classes=2, device="cpu")
        self.classifier = Classifier("fake", backend, vr.Preprocess((4, 4)), None)

    def make_call(self, model, label, *, size, batch):
        count = 0

        def call():
            nonlocal count
            self.log.append((label, batch))
            self.now += self.seconds(label, max(0, count - self.warmup))
            count += 1
            return None, "closed-form" if label == "reciprocam" else ""

        return call

    def run(self, **options):
        options = {"warmup": self.warmup, "rounds": 6} | options
        return benchmark([self.classifier], ["rollout"], **options)
