"""Read facts about an ONNX file without the package onnx, with a small protobuf reader.

docs/decisions/0002 says why. Weights are skipped, so that a file of gigabytes takes a few
milliseconds. A damaged file is told apart from one that is not an ONNX file.

An ONNX file is one protobuf message, a sequence of fields. Each begins with an integer that holds
the number of the field and how its value is stored: as an integer of variable length ("varint"), in
4 or 8 bytes, or as a length followed by that many bytes, which are text or another message
(https://protobuf.dev/programming-guides/encoding). The numbers of the fields are in onnx.proto.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vit_reciprocam.errors import ModelError
from vit_reciprocam.onnx.files import find_weights

__all__ = ["Header", "digest", "read_header"]

_VARINT, _BYTES = 0, 2  # how a field's value is stored
_FIXED_SIZES = {1: 8, 5: 4}


class _DamagedError(Exception):
    """The bytes are not a protobuf message."""


class Header(NamedTuple):
    """Facts about an ONNX file."""

    properties: dict[str, str]  # metadata properties
    opset: int  # version of ONNX's own operators
    external: tuple[Path, ...]  # files beside it that hold its weights
    ports: frozenset[str]  # names of the graph's inputs and outputs


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read the header of an ONNX file, and check that the files of its weights are there."""
    file = Path(path)
    if not file.is_file():
        raise ModelError(f"no such model file: {file}")
    if not file.stat().st_size:
        raise ModelError(f"{file} is empty (0 bytes)")
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        begin = bytes(data[:16])
        # The first field of a model is its ir_version, number 1, an integer.
        looks_like_onnx = len(begin) > 1 and begin[0] == 1 << 3 | _VARINT
        try:
            properties, opset, locations, ports = _read_model(data)
        except _DamagedError as error:
            if not looks_like_onnx:
                raise ModelError(f"{file} is not an ONNX file: it begins with {begin!r}") from error
            raise ModelError(f"{file} is truncated or damaged: fetch or write it anew") from error
    if not ports:
        what = "truncated or damaged: it holds no graph" if looks_like_onnx else "not an ONNX file"
        raise ModelError(f"{file} is {what}")
    external = []
    for location, end in sorted(locations.items()):
        weights = find_weights(file, location)
        if weights.stat().st_size < end:
            raise ModelError(
                f"{weights}, which holds weights of {file.name}, is truncated: it has "
                f"{weights.stat().st_size} bytes, and {end} are needed"
            )
        external.append(weights)
    return Header(properties, opset, tuple(external), frozenset(ports))


def digest(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file followed by the files of its weights in the order of names."""
    summary = hashlib.sha256()
    for file in (Path(path), *read_header(path).external):
        with file.open("rb") as opened:
            while block := opened.read(2**20):
                summary.update(block)
    return summary.hexdigest()


Span = tuple[int, int]  # begin and end of the bytes of a value
Data = bytes | mmap.mmap


def _read_model(data: Data) -> tuple[dict[str, str], int, dict[str, int], set[str]]:
    """Read a ModelProto: its metadata, its opset, its external weights, its inputs and outputs.

    The external weights are the location of each file -> how many of its bytes are needed.
    """
    properties: dict[str, str] = {}
    opset = 1
    locations: dict[str, int] = {}
    ports: set[str] = set()
    for number, value in _read_fields(data, (0, len(data))):
        if number == 7:  # graph
            for inner, part in _read_fields(data, value):
                if inner == 5:  # initializer
                    _note_external(data, part, locations)
                elif inner in (11, 12):  # input, output
                    ports.add(_read_text(data, part, 1)[0])
        elif number == 8:  # opset_import
            version = dict(_read_fields(data, value)).get(2, 0)
            if _read_text(data, value, 1) == [""]:  # the domain
                opset = version if isinstance(version, int) else 0
        elif number == 14:  # metadata_props, each with a key and a value
            key, text = _read_text(data, value, 1, 2)
            properties[key] = text
    return properties, opset, locations, ports


def _note_external(data: Data, tensor: int | Span, locations: dict[str, int]) -> None:
    """If the values of a TensorProto are in another file, add that file to `locations`."""
    parts = [value for number, value in _read_fields(data, tensor) if number == 13]  # external_data
    about = dict(_read_text(data, part, 1, 2) for part in parts)
    if "location" in about:
        offset_and_length = (about.get("offset", "0"), about.get("length", "0"))
        if not all(text.isdigit() for text in offset_and_length):
            raise _DamagedError
        needed = sum(map(int, offset_and_length))
        locations[about["location"]] = max(locations.get(about["location"], 0), needed)


def _read_text(data: Data, message: int | Span, *numbers: int) -> list[str]:
    """Return the fields of a message with these numbers, which hold text; "" if they are absent."""
    fields = dict(_read_fields(data, message))
    spans = [fields.get(number, (0, 0)) for number in numbers]
    try:
        return [data[slice(*_as_span(span))].decode() for span in spans]
    except UnicodeDecodeError as error:
        raise _DamagedError from error


def _read_fields(data: Data, message: int | Span) -> Iterator[tuple[int, int | Span]]:
    """Yield the number and value of each field; a value is an integer, or where its bytes lie."""
    at, end = _as_span(message)
    while at < end:
        key, at = _read_varint(data, at, end)
        number, kind = key >> 3, key & 7
        value: int | Span
        if kind == _VARINT:
            value, at = _read_varint(data, at, end)
        else:
            if kind == _BYTES:
                size, at = _read_varint(data, at, end)
            elif kind in _FIXED_SIZES:
                size = _FIXED_SIZES[kind]
            else:
                raise _DamagedError
            value, at = (at, at + size), at + size
        if at > end or number == 0:
            raise _DamagedError
        yield number, value


def _read_varint(data: Data, at: int, end: int) -> tuple[int, int]:
    """Return an integer, stored as 7 bits per byte, the lowest first, and the place after it."""
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


def _as_span(value: int | Span) -> Span:
    if isinstance(value, int):
        raise _DamagedError
    return value
