"""The calls that are measured, and what they run on: PyTorch models, ONNX files, threads."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_reciprocam.classifier.classifier import Classifier
from vit_reciprocam.classifier.load import ASSETS
from vit_reciprocam.errors import InputError, MissingDependencyError, ModelError
from vit_reciprocam.methods import METHODS, MethodSpec, check_settings
from vit_reciprocam.onnx.contract import Metadata
from vit_reciprocam.onnx.run.explainer import OnnxExplainer
from vit_reciprocam.onnx.run.sessions import Session, open_session
from vit_reciprocam.results.explanation import Explanation

__all__ = [
    "ALL_MAPS",
    "FIXED",
    "FORWARD",
    "NAIVE",
    "RECIPROCAM",
    "Call",
    "OnnxFiles",
    "device_name",
    "make_call",
    "prepare_model",
    "set_threads",
]

FORWARD = "forward"  # the prediction alone
RECIPROCAM = "reciprocam"  # the map of each image's top class
ALL_SCORES = "reciprocam, all scores"  # the scores of all classes
ALL_MAPS = "reciprocam, all maps"  # these scores scaled to [0, 1] too
NAIVE = "naive H"  # the top class's map with H, the rest of the network, run once per mask
FIXED = (FORWARD, RECIPROCAM, ALL_SCORES, ALL_MAPS, NAIVE)
"""The calls that are measured for every model."""

_PRODUCTS = ("MatMul", "Gemm", "Conv", "MatMulInteger", "QLinearMatMul")

Call = Callable[[], tuple[Any, str]]
"""A function that returns the result, and the path of ReciproCAM, or "" if it did not run."""


def make_call(model: Any, label: str, *, size: tuple[int, int], batch: int) -> Call:
    """Return a call of a PyTorch classifier or `OnnxFiles` on random images of that size.

    The images are the same in every run and lie on the model's device. The label is one of `FIXED`,
    or a method as `MethodSpec.parse` reads it.
    """
    images = np.random.default_rng(0).standard_normal((batch, 3, *size), dtype=np.float32)
    if isinstance(model, OnnxFiles):
        return _onnx_call(label, model, images)
    return _torch_call(label, model, images)


def _torch_call(label: str, model: Any, pixels: np.ndarray) -> Call:
    import torch

    from vit_reciprocam.core.split import logits_of
    from vit_reciprocam.reciprocam import ReciproCAM

    images = torch.from_numpy(pixels).to(next(model.parameters()))

    @torch.no_grad()
    def forward() -> tuple[Any, str]:
        return logits_of(model(images)).float().cpu().numpy(), ""

    if label == FORWARD:
        return forward
    method = MethodSpec.parse(RECIPROCAM if label in FIXED else label)
    if method.name == RECIPROCAM:
        settings = {"path": "direct"} if label == NAIVE else method.settings
        return _explainer_call(label, ReciproCAM(model, **settings), images)
    # this imports the method's library, so that the import is not timed
    check_settings(method.name, method.settings)

    def other() -> tuple[Any, str]:
        maps = METHODS[method.name](model, images, **method.settings)
        if maps.device.type == "cuda":
            torch.cuda.synchronize(maps.device)
        return maps.cpu(), ""

    return other


def _onnx_call(label: str, files: OnnxFiles, images: np.ndarray) -> Call:
    if label == FORWARD:
        forward = files.forward(images)
        return lambda: (forward(), "")
    if label not in (RECIPROCAM, ALL_SCORES, ALL_MAPS):
        raise InputError(
            "an ONNX file holds ReciproCAM's maps and no other method: measure "
            f"{label!r} on a PyTorch model"
        )
    kind = files.explainer.metadata.targets
    if label != RECIPROCAM and kind not in ("all", "input"):
        raise InputError(f"the file explains the {kind} classes only")
    return _explainer_call(label, files.explainer, images)


def _explainer_call(label: str, explainer: Callable[..., Explanation], images: Any) -> Call:
    targets = "all" if label in (ALL_SCORES, ALL_MAPS) else None
    result = "scores" if label == ALL_SCORES else "maps"

    def call() -> tuple[Any, str]:
        explanation = explainer(images, targets)
        return getattr(explanation, result), explanation.path

    return call


@dataclasses.dataclass(frozen=True)
class OnnxFiles:
    """Two ONNX files of one model, with and without maps, each opened on first use."""

    options: dict[str, Any]  # arguments of `OnnxExplainer` for the file with maps, JSON values
    untouched: str  # path of the file without maps

    @functools.cached_property
    def explainer(self) -> OnnxExplainer:
        """The file with maps, open."""
        return OnnxExplainer(**self.options)

    @functools.cached_property
    def _untouched_session(self) -> Session:
        """The file without maps, open in the same runtime."""
        return open_session(**{**self.options, "path": self.untouched})

    def check(self, size: tuple[int, int]) -> None:
        """Refuse two files whose predictions for a random image of that size differ."""
        image = np.random.default_rng(0).standard_normal((1, 3, *size), dtype=np.float32)
        ours, theirs = self.explainer.predict(image), self.forward(image)()
        if ours.shape != theirs.shape or abs(ours - theirs).max() > 0.1 * abs(ours).max():
            raise InputError(
                f"{self.untouched} is not the model that {self.explainer.path} explains: their "
                "predictions differ"
            )

    def forward(self, images: np.ndarray) -> Callable[[], np.ndarray]:
        """Return a call that predicts the images with the untouched model."""
        session = self._untouched_session
        if len(session.inputs) != 1 or len(session.outputs) != 1:
            raise ModelError(
                f"{self.untouched} must be the untouched model, with one input and one output; it "
                f"has {sorted(session.inputs)} and {sorted(session.outputs)}"
            )
        ((name, port),) = session.inputs.items()
        (output,) = session.outputs
        pixels = images.astype(port.dtype)
        return lambda: session.run([output], {name: pixels})[0]


def prepare_model(
    classifier: Classifier,
    untouched: str | os.PathLike[str] | None,
    threads: int | None,
    cut_file: Path,
) -> Any:
    """Return a classifier's PyTorch model, or the `OnnxFiles` that `make_call` takes instead.

    If no untouched file is given, it is the demo model's own, or it is cut out of another file
    with maps and written to `cut_file`.
    """
    backend = classifier.backend
    if not isinstance(backend, OnnxExplainer):
        return classifier.model
    options = backend.options() if threads is None else backend.options() | {"threads": threads}
    if untouched is None and backend.path == ASSETS / "demo.onnx":
        untouched = ASSETS / "demo-plain.onnx"
    if untouched is None:
        _cut_out_prediction(backend.path, backend.metadata, cut_file)
        untouched = cut_file
    files = OnnxFiles(options, str(untouched))
    files.check(classifier.preprocess.size)
    return files


def _cut_out_prediction(path: Path, about: Metadata, out: Path) -> None:
    """Write to another file only those nodes of an explained file that its logits need.

    They are the untouched model if the explanation was inserted. A file in which prediction and
    maps come from the same operations, as in those that `export` writes, is refused.
    """
    try:
        import onnx.utils

        import onnx
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"cutting {path} down to its prediction (or give the untouched model: --plain FILE)",
            "onnx",
        ) from error
    from vit_reciprocam.onnx.insert.graph import Graph

    graph = Graph(onnx.load(path, load_external_data=False), path.parent)
    needed = graph.nodes_above([about.logits])
    above_maps = graph.nodes_above(["scores"], until=["classes"])
    # An inserted branch shares the nodes before F and has copies of those after it. So if the maps
    # need the prediction's last product too, nothing was inserted.
    last = [number for number in needed if graph.nodes[number].op_type in _PRODUCTS]
    if last and max(last) in above_maps:
        raise ModelError(
            f"in {path} prediction and maps come from the same operations, so the untouched model "
            "cannot be cut out of it: give that as a file of its own, --plain FILE"
        )
    onnx.utils.extract_model(path, out, [about.images], [about.logits], check_model=False)


@contextlib.contextmanager
def set_threads(wanted: int | None, classifiers: Sequence[Classifier]) -> Iterator[int]:
    """Set PyTorch's number of threads until the context ends, and yield the number in use."""
    onnx = [one.backend for one in classifiers if isinstance(one.backend, OnnxExplainer)]
    if len(onnx) == len(classifiers):  # then PyTorch need not be installed
        yield wanted or onnx[0].threads or os.cpu_count() or 1
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def device_name(model: Any) -> str:
    """Return the name of the processor that a model runs on; None stands for the CPU."""
    if isinstance(model, OnnxFiles):
        if "CPU" not in model.explainer.session.device:
            return model.explainer.session.device
    elif model is not None:
        device = next(model.parameters()).device
        if device.type == "cuda":
            import torch

            return torch.cuda.get_device_name(device)
        if device.type != "cpu":
            return str(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
