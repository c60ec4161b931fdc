"""ONNX Runtime and OpenVINO, each behind one function: a file in, a `Session` out. No torch."""

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
from typing import Any

import numpy as np

from vit_reciprocam.errors import InputError, MissingDependencyError, ModelError, check_choice
from vit_reciprocam.onnx.run.protobuf import Header, read_header

__all__ = ["BACKENDS", "Port", "Session", "open_session"]

BACKENDS = ("onnxruntime", "openvino")

Feed = Mapping[str, np.ndarray]

_VIRTUAL = ("AUTO", "HETERO", "MULTI", "BATCH")  # OpenVINO's devices that stand for others


@dataclass(frozen=True)
class Port:
    """An input or output: its type, and its shape with None where that is dynamic."""

    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Session:
    """A file made ready in a runtime.

    Attributes:
        backend: Of `BACKENDS`.
        device: What it runs on, by the runtime's name.
        inputs: By name.
        outputs: By name.
        run_all: Names of outputs, and inputs by name for each of several runs -> a list of those
            outputs for each run. Runs may overlap where the session has several streams.
        streams: How many runs may overlap.
    """

    backend: str
    device: str
    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]
    run_all: Callable[[Sequence[str], Sequence[Feed]], list[list[np.ndarray]]]
    streams: int = 1

    def run(self, names: Sequence[str], batch: Feed) -> list[np.ndarray]:
        """These outputs of a batch, in pieces where the graph's is static or there are streams."""
        count = len(next(iter(batch.values())))
        fixed = self.inputs[next(iter(batch))].shape[0]
        step = fixed or math.ceil(count / self.streams)
        pieces = []
        for start in range(0, count, step):
            piece = {name: value[start : start + step] for name, value in batch.items()}
            if fixed and start + step > count:
                rows = np.arange(step).clip(0, count - start - 1)  # the last image again
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
        device: Of ONNX Runtime an execution provider, such as "CUDAExecutionProvider" or "cuda";
            of OpenVINO a device, such as "GPU" or "AUTO:GPU,CPU". What is not there is refused:
            nothing runs on another device than the one named.
        threads: Of the CPU, inside one run; None leaves it to the runtime.
        streams: Of OpenVINO: how many runs may overlap.

    Raises:
        ModelError: If the file cannot be read, or the runtime cannot run it.
        InputError: If there is no such backend or device, or it has no such setting.
        MissingDependencyError: If the backend is not installed.
    """
    check_choice("backend", backend, BACKENDS)
    for name, number in (("threads", threads), ("streams", streams)):
        if number is not None and number < 1:
            raise InputError(f"{name} must be 1 or more; got {number}")
    header = read_header(path)
    opset = header.opsets.get("", 1)
    if backend == "openvino":
        return _openvino(Path(path), header, device, threads, streams)
    if streams is not None:
        raise InputError("streams are OpenVINO's: pass backend='openvino', or threads=")
    return _onnxruntime(Path(path), opset, device, threads)


def _onnxruntime(path: Path, opset: int, device: str, threads: int | None) -> Session:
    import onnxruntime

    provider = _provider(device, onnxruntime.get_available_providers())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised
    # Between runs threads would go on spinning and slow down whatever runs then.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of falling back, which is refused below
            session = onnxruntime.InferenceSession(path, options, providers=[provider])
    except Exception as error:  # ONNX Runtime's own exceptions share no public base
        raise _unfit(path, "ONNX Runtime", "onnxruntime", opset, error) from error
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
            raise ModelError(f"{path} failed in ONNX Runtime: {_reason(error)}") from error

    def ports(nodes: Any) -> dict[str, Port]:
        return {
            node.name: Port(
                _dtype(path, node.name, node.type),
                tuple(side if isinstance(side, int) else None for side in node.shape),
            )
            for node in nodes
        }

    inputs, outputs = ports(session.get_inputs()), ports(session.get_outputs())
    return Session("onnxruntime", provider, inputs, outputs, run_all)


def _provider(device: str, available: Sequence[str]) -> str:
    """ONNX Runtime's name of a device, which may be written without "ExecutionProvider"."""
    wanted = device.lower().removesuffix("executionprovider")
    for provider in available:
        if provider.lower().removesuffix("executionprovider") == wanted:
            return provider
    raise InputError(
        f"ONNX Runtime has no {device!r} here; available: {', '.join(available)}. Others come with "
        "other builds of it, such as the package onnxruntime-gpu"
    )


_DTYPES = {
    "float": "float32",
    "float16": "float16",
    "double": "float64",
    "int64": "int64",
    "int32": "int32",
    "uint8": "uint8",
    "int8": "int8",
    "bool": "bool",
}


def _dtype(path: Path, name: str, written: str) -> np.dtype[Any]:
    """Of ONNX Runtime's name of a type, such as "tensor(float)"."""
    kind = re.fullmatch(r"tensor\((\w+)\)", written)
    if kind is None or kind[1] not in _DTYPES:
        raise ModelError(
            f"{path}: {name!r} is {written}, and only tensors of NumPy's types can be read"
        )
    return np.dtype(_DTYPES[kind[1]])


def _openvino(
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
        compiled = _compiled(core, path, device, config)
    except RuntimeError as error:
        opset = header.opsets.get("", 1)
        raise _unfit(path, "OpenVINO", "openvino", opset, error) from error

    # Requests in turn, and not an AsyncInferQueue: that may drop its Python callback in a thread of
    # its own, without Python's lock, and the process with it.
    most = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
    requests: list[Any] = []
    lock = threading.Lock()

    def run_all(names: Sequence[str], feeds: Sequence[Feed]) -> list[list[np.ndarray]]:
        ports = [compiled.output(name) for name in names]

        def taken(request: Any) -> list[np.ndarray]:
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
                        results.append(taken(request))
                    request.start_async(dict(feed))
                last = range(len(feeds) - count, len(feeds))
                return results + [taken(requests[number % count]) for number in last]
            except BaseException as error:
                requests.clear()  # some may still run
                if not isinstance(error, RuntimeError):
                    raise
                raise ModelError(f"{path} failed in OpenVINO: {_reason(error)}") from error

    def ports(found: Any) -> dict[str, Port]:
        return {
            name: Port(
                np.dtype(port.element_type.to_dtype()),
                tuple(side.get_length() if side.is_static else None for side in port.partial_shape),
            )
            for port in found
            for name in port.names & header.ends  # a port may have others besides
        }

    inputs, outputs = ports(compiled.inputs), ports(compiled.outputs)
    return Session("openvino", device, inputs, outputs, run_all, streams or 1)


def _compiled(core: Any, path: Path, device: str, config: Mapping[str, Any]) -> Any:
    """Compile a file; where OpenVINO's fusing of element-wise nodes fails, without it.

    OpenVINO 2026.4 runs out of registers on some long chains of static shape ("not enough registers
    for a snippet"). Without fusing these are the same nodes, one by one.
    """
    try:
        return core.compile_model(path, device, config)
    except RuntimeError as error:
        if "snippet" not in str(error):
            raise
        return core.compile_model(path, device, {**config, "SNIPPETS_MODE": "DISABLE"})


def _check_device(device: str, available: Sequence[str]) -> None:
    """Refuse a device that OpenVINO does not have here; "GPU" also names "GPU.0".

    Raises:
        InputError: If it does not; the message lists those that it has.
    """
    virtual, _, listed = device.partition(":")
    names = listed.split(",") if virtual in _VIRTUAL and listed else [device]
    for name in names:
        plain = re.sub(r"\(\d+\)$", "", name.strip().removeprefix("-"))
        parts = {one.partition(".")[0] for one in available} | {*available}
        if plain not in parts and device not in _VIRTUAL:
            raise InputError(
                f"OpenVINO has no device {plain!r} here; available: {', '.join(available)}, and "
                f"{', '.join(_VIRTUAL)} of these"
            )


def _unfit(path: Path, runtime: str, package: str, opset: int, error: Exception) -> ModelError:
    return ModelError(
        f"{path}, of opset {opset}, cannot be loaded by {runtime} {version(package)}: "
        f"{_reason(error)}. Where an operator or opset is too new for it, upgrade {package}, take "
        "the other backend, or write the file with a lower opset"
    )


_NOISE = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : |Exception from \S+:\s*|"
    r"Check '.*' failed at \S+:\s*|FrontEnd API failed with \w+:\s*"
)


def _reason(error: Exception) -> str:
    """A runtime's message in one line, without the places in its sources."""
    text = " ".join(_NOISE.sub("", str(error)).split()).rstrip(".: ")
    return text[:400] or type(error).__name__
