"""Open an ONNX file in ONNX Runtime or OpenVINO as a `Session`, without torch."""

from __future__ import annotations

import math
import os
import re
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vit_reciprocam.errors import InputError, MissingDependencyError, ModelError, check_choice
from vit_reciprocam.onnx.run.protobuf import Header, read_header

__all__ = ["BACKENDS", "Port", "Session", "open_onnxruntime", "open_session"]

BACKENDS = ("onnxruntime", "openvino")

Feed = Mapping[str, np.ndarray]  # inputs by name

_VIRTUAL = ("AUTO", "HETERO", "MULTI", "BATCH")  # OpenVINO's devices that stand for others
# ONNX Runtime's names of types -> NumPy's
_DTYPES = {"float": "float32", "double": "float64"}
_DTYPES |= {name: name for name in ("float16", "int64", "int32", "uint8", "int8", "bool")}
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class Port(NamedTuple):
    """An input or output: its type, and its shape with None where that is dynamic."""

    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Session:
    """A file loaded into a runtime."""

    backend: str  # one of `BACKENDS`
    device: str  # the device that computes, by the runtime's name for it
    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]
    # Names of outputs, and the inputs of each run -> these outputs of each run.
    run_all: Callable[[Sequence[str], Sequence[Feed]], list[list[np.ndarray]]]
    streams: int = 1  # number of runs that may overlap

    def run(self, names: Sequence[str], batch: Feed) -> list[np.ndarray]:
        """Return outputs of a batch, each with the batch as its first axis.

        The batch is cut into pieces if the graph's own is static, or if streams share it.
        """
        count = len(next(iter(batch.values())))
        fixed = self.inputs[next(iter(batch))].shape[0]
        step = fixed or math.ceil(count / self.streams)
        pieces = []
        for start in range(0, count, step):
            piece = {name: value[start : start + step] for name, value in batch.items()}
            if fixed and start + step > count:
                # The last piece is filled up with its last image; those results are cut off.
                rows = np.arange(step).clip(0, count - start - 1)
                piece = {name: value[rows] for name, value in piece.items()}
            pieces.append(piece)
        results = self.run_all(names, pieces)
        if len(results) == 1:
            return [values[:count] for values in results[0]]
        return [np.concatenate(parts)[:count] for parts in zip(*results, strict=True)]


def open_session(
    path: str | os.PathLike[str],
    *,
    backend: str = "onnxruntime",
    device: str = "cpu",
    threads: int | None = None,
    streams: int | None = None,
) -> Session:
    """Open an ONNX file.

    Args:
        path: The file.
        backend: "onnxruntime" or "openvino".
        device: Execution provider of ONNX Runtime, such as "CUDAExecutionProvider" or "cuda";
            for OpenVINO a device, such as "GPU" or "AUTO:GPU,CPU". If it is missing it is refused:
            nothing runs on another device than the one named.
        threads: Number of CPU threads inside one run; None leaves it to the runtime.
        streams: Number of runs that may overlap, in OpenVINO only.
    """
    check_choice("backend", backend, BACKENDS)
    for name, number in (("threads", threads), ("streams", streams)):
        if number is not None and number < 1:
            raise InputError(f"{name} must be 1 or more; got {number}")
    header = read_header(path)
    if backend == "openvino":
        return _open_in_openvino(Path(path), header, device, threads, streams)
    if streams is not None:
        raise InputError("streams are OpenVINO's: pass backend='openvino', or threads=")
    return _open_in_onnxruntime(Path(path), header.opset, device, threads)


def open_onnxruntime(
    model: Path | bytes,
    *,
    provider: str = "CPUExecutionProvider",
    threads: int | None = None,
    optimize: bool = True,
    weights_folder: Path | None = None,
) -> Any:
    """Return an `onnxruntime.InferenceSession`; errors are ONNX Runtime's own.

    Without `optimize` no nodes are rearranged or fused. A model that is given as bytes needs the
    folder of its external weights.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # log nothing, since errors are raised
    # Otherwise threads go on spinning between runs, and slow down whatever else runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if weights_folder is not None:
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(weights_folder.resolve()))
    return onnxruntime.InferenceSession(model, options, providers=[provider])


def _open_in_onnxruntime(path: Path, opset: int, device: str, threads: int | None) -> Session:
    import onnxruntime

    provider = _find_provider(device, onnxruntime.get_available_providers())
    try:
        with warnings.catch_warnings():
            # ONNX Runtime warns of falling back to another provider, which is refused below.
            warnings.simplefilter("ignore")
            session = open_onnxruntime(path, provider=provider, threads=threads)
    except Exception as error:  # ONNX Runtime's own exceptions share no public base
        raise _loading_error(path, "ONNX Runtime", "onnxruntime", opset, error) from error
    if provider not in session.get_providers():
        raise ModelError(
            f"ONNX Runtime has {provider} but could not start it, and would run {path} on "
            f"{', '.join(session.get_providers())} instead: install what the provider needs, such "
            "as its GPU libraries, or name another device"
        )
    session.disable_fallback()

    def run_all(names: Sequence[str], feeds: Sequence[Feed]) -> list[list[np.ndarray]]:
        try:
            return [session.run(list(names), dict(feed)) for feed in feeds]
        except Exception as error:
            raise ModelError(f"{path} failed in ONNX Runtime: {_one_line(error)}") from error

    def ports(nodes: Any) -> dict[str, Port]:
        found = {}
        for node in nodes:
            kind = node.type.removeprefix("tensor(").removesuffix(")")
            if kind not in _DTYPES:
                raise ModelError(
                    f"{path}: {node.name!r} is {node.type}, and only tensors of NumPy's types can "
                    "be read"
                )
            shape = tuple(side if isinstance(side, int) else None for side in node.shape)
            found[node.name] = Port(np.dtype(_DTYPES[kind]), shape)
        return found

    inputs, outputs = ports(session.get_inputs()), ports(session.get_outputs())
    return Session("onnxruntime", provider, inputs, outputs, run_all)


def _find_provider(device: str, available: Sequence[str]) -> str:
    """Return the provider of that name, which may lack "ExecutionProvider" at its end."""
    wanted = device.lower().removesuffix("executionprovider")
    for provider in available:
        if provider.lower().removesuffix("executionprovider") == wanted:
            return provider
    raise InputError(
        f"ONNX Runtime has no {device!r} here; available: {', '.join(available)}. Others come with "
        "other builds of it, such as the package onnxruntime-gpu"
    )


def _open_in_openvino(
    path: Path, header: Header, device: str, threads: int | None, streams: int | None
) -> Session:
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise MissingDependencyError("backend 'openvino'", "openvino") from error
    core = openvino.Core()
    device = device.upper()
    _check_device(device, core.available_devices)
    config: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "f32",  # else a device may compute in bfloat16
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": streams,
        "PERFORMANCE_HINT": "LATENCY" if streams is None else "THROUGHPUT",
    }
    config = {name: value for name, value in config.items() if value is not None}
    if device.partition(":")[0] not in _VIRTUAL:
        known = core.get_property(device, "SUPPORTED_PROPERTIES")
        for name, value in (("INFERENCE_NUM_THREADS", threads), ("NUM_STREAMS", streams)):
            if value is not None and name not in known:
                raise InputError(f"OpenVINO's device {device} has no {name}: leave it out")
        config = {name: value for name, value in config.items() if name in known}
    try:
        compiled = _compile(core, path, device, config)
    except RuntimeError as error:
        raise _loading_error(path, "OpenVINO", "openvino", header.opset, error) from error

    # OpenVINO's own AsyncInferQueue is not used: it may free its Python callback in a thread that
    # does not hold Python's lock, and so crash the process.
    most = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
    requests: list[Any] = []
    lock = threading.Lock()

    def run_all(names: Sequence[str], feeds: Sequence[Feed]) -> list[list[np.ndarray]]:
        ports = [compiled.output(name) for name in names]

        def collect(request: Any) -> list[np.ndarray]:
            request.wait()
            return [np.array(request.get_tensor(port).data) for port in ports]

        count = min(len(feeds), most)
        with lock:
            try:
                while len(requests) < count:
                    requests.append(compiled.create_infer_request())
                results = []
                for number, feed in enumerate(feeds):
                    request = requests[number % count]
                    if number >= count:
                        results.append(collect(request))
                    request.start_async(dict(feed))
                last = range(len(feeds) - count, len(feeds))
                return results + [collect(requests[number % count]) for number in last]
            except BaseException as error:
                requests.clear()  # some may still run
                if not isinstance(error, RuntimeError):
                    raise
                raise ModelError(f"{path} failed in OpenVINO: {_one_line(error)}") from error

    def ports(found: Any) -> dict[str, Port]:
        return {
            name: Port(
                np.dtype(port.element_type.to_dtype()),
                tuple(side.get_length() if side.is_static else None for side in port.partial_shape),
            )
            for port in found
            for name in port.names & header.ports  # OpenVINO may add names of its own
        }

    inputs, outputs = ports(compiled.inputs), ports(compiled.outputs)
    return Session("openvino", device, inputs, outputs, run_all, streams or 1)


def _compile(core: Any, path: Path, device: str, config: Mapping[str, Any]) -> Any:
    """Compile a file, without fusing element-wise nodes if OpenVINO fails at that.

    OpenVINO 2026.4 runs out of registers for some long chains of nodes with static shapes ("not
    enough registers for a snippet"). Without fusing, the same nodes run one by one.
    """
    try:
        return core.compile_model(path, device, config)
    except RuntimeError as error:
        if "snippet" not in str(error):
            raise
        return core.compile_model(path, device, {**config, "SNIPPETS_MODE": "DISABLE"})


def _check_device(device: str, available: Sequence[str]) -> None:
    """Refuse a device that OpenVINO does not have here; "GPU" also names "GPU.0"."""
    virtual, _, listed = device.partition(":")
    names = listed.split(",") if virtual in _VIRTUAL and listed else [device]
    for name in names:
        # AUTO and MULTI take priorities and exclusions: "AUTO:-CPU,GPU(2)" names CPU and GPU.
        bare = re.sub(r"\(\d+\)$", "", name.strip().removeprefix("-"))
        known = {one.partition(".")[0] for one in available} | {*available}
        if bare not in known and device not in _VIRTUAL:
            raise InputError(
                f"OpenVINO has no device {bare!r} here; available: {', '.join(available)}, and "
                f"{', '.join(_VIRTUAL)} of these"
            )


def _loading_error(
    path: Path, runtime: str, package: str, opset: int, error: Exception
) -> ModelError:
    return ModelError(
        f"{path}, of opset {opset}, cannot be loaded by {runtime} {version(package)}: "
        f"{_one_line(error)}. If an operator or opset is too new for it, upgrade {package}, "
        "take the other backend, or write the file with a lower opset"
    )


_NOISE = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : |Exception from \S+:\s*|"
    r"Check '.*' failed at \S+:\s*|FrontEnd API failed with \w+:\s*"
)


def _one_line(error: Exception) -> str:
    """Return a runtime's message in one line, without the places in its sources."""
    text = " ".join(_NOISE.sub("", str(error)).split()).rstrip(".: ")
    return text[:400] or type(error).__name__
