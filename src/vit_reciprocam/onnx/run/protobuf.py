"""What stands at the top of an ONNX file, read without the onnx package and without its weights.

An ONNX file is one protobuf message. Only the few fields that are needed here are looked at, and
everything else is skipped, so that a file of gigabytes costs a few milliseconds. Field numbers:
onnx.proto, ModelProto and what it holds.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vit_reciprocam.errors import ModelError
from vit_reciprocam.onnx.paths import find_weights

__all__ = ["Header", "digest", "read_header"]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class _DamagedError(Exception):
    """The bytes are no protobuf message."""


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        properties: Its metadata.
        opsets: Version of each operator domain; "" is ONNX's own.
        external: Files beside it that hold its weights.
        ends: Names of the graph's inputs and outputs.
    """

    properties: dict[str, str]
    opsets: dict[str, int]
    external: tuple[Path, ...]
    ends: frozenset[str]


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read it, and check that the files of its weights are there.

    Raises:
        ModelError: If there is no such file, it is not an ONNX file or not a whole one, or its
            weights lie outside its folder or are not there.
    """
    file = Path(path)
    if not file.is_file():
        raise ModelError(f"no such model file: {file}")
    if not file.stat().st_size:
        raise ModelError(f"{file} is empty (0 bytes)")
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        begin = bytes(data[:16])
        version = begin[1] if begin[0] == 1 << 3 | _VARINT and len(begin) > 1 else None
        try:
            properties, opsets, locations, ends = _model(data)
        except _DamagedError as error:
            if version is None:
                raise ModelError(f"{file} is not an ONNX file: it begins with {begin!r}") from error
            raise ModelError(f"{file} is truncated or damaged: fetch or write it anew") from error
    if not ends:
        what = "not an ONNX file" if version is None else "truncated or damaged: it holds no graph"
        raise ModelError(f"{file} is {what}")
    return Header(properties, opsets, _checked(file, locations), frozenset(ends))


def digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of the file and then of the files of its weights, by name."""
    summary = hashlib.sha256()
    for file in (Path(path), *read_header(path).external):
        with file.open("rb") as opened:
            while block := opened.read(2**20):
                summary.update(block)
    return summary.hexdigest()


Span = tuple[int, int]
Data = bytes | mmap.mmap


def _model(data: Data) -> tuple[dict[str, str], dict[str, int], dict[str, int], set[str]]:
    """Of a ModelProto: metadata, opsets, the end of what is used of each external file, ends."""
    properties: dict[str, str] = {}
    opsets: dict[str, int] = {}
    locations: dict[str, int] = {}
    ends: set[str] = set()
    for number, value in _fields(data, (0, len(data))):
        if number == 7:  # graph
            for inner, part in _fields(data, _span(value)):
                if inner == 5:  # initializer
                    _external(data, _span(part), locations)
                elif inner in (11, 12):  # input, output
                    ends.add(_text(data, dict(_fields(data, _span(part))).get(1, (0, 0))))
        elif number == 8:  # opset_import
            opset = dict(_fields(data, _span(value)))
            domain = _text(data, opset[1]) if 1 in opset else ""
            version = opset.get(2, 0)
            opsets[domain] = version if isinstance(version, int) else 0
        elif number == 14:  # metadata_props
            properties |= _entry(data, _span(value))
    return properties, opsets, locations, ends


def _external(data: Data, tensor: Span, locations: dict[str, int]) -> None:
    """Add to `locations` where a TensorProto's values lie, if outside this file."""
    about: dict[str, str] = {}
    for number, value in _fields(data, tensor):
        if number == 13:  # external_data
            about |= _entry(data, _span(value))
    if "location" in about:
        ends = (about.get("offset", "0"), about.get("length", "0"))
        if not all(end.isdigit() for end in ends):
            raise _DamagedError
        known = locations.get(about["location"], 0)
        locations[about["location"]] = max(known, sum(map(int, ends)))


def _entry(data: Data, span: Span) -> dict[str, str]:
    """Of a StringStringEntryProto."""
    pair = dict(_fields(data, span))
    return {_text(data, pair.get(1, (0, 0))): _text(data, pair.get(2, (0, 0)))}


def _fields(data: Data, span: Span) -> Iterator[tuple[int, int | Span]]:
    """Number and value of each field of a message: an integer, or where its bytes lie."""
    at, end = span
    while at < end:
        key, at = _varint(data, at, end)
        number, kind = key >> 3, key & 7
        value: int | Span
        if kind == _VARINT:
            value, at = _varint(data, at, end)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
            value, at = (at, at + size), at + size
        elif kind == _BYTES:
            size, at = _varint(data, at, end)
            value, at = (at, at + size), at + size
        else:
            raise _DamagedError
        if at > end or number == 0:
            raise _DamagedError
        yield number, value


def _varint(data: Data, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise _DamagedError
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise _DamagedError


def _span(value: int | Span) -> Span:
    if isinstance(value, int):
        raise _DamagedError
    return value


def _text(data: Data, value: int | Span) -> str:
    start, end = _span(value)
    try:
        return data[start:end].decode()
    except UnicodeDecodeError as error:
        raise _DamagedError from error


def _checked(file: Path, locations: dict[str, int]) -> tuple[Path, ...]:
    """The files of external data.

    Raises:
        ModelError: If one lies outside the folder, is not there, or is too short.
    """
    found = []
    for location, end in sorted(locations.items()):
        weights = find_weights(file, location)
        if weights.stat().st_size < end:
            raise ModelError(
                f"{weights}, which holds weights of {file.name}, is truncated: it has "
                f"{weights.stat().st_size} bytes, and {end} are needed"
            )
        found.append(weights)
    return tuple(found)
