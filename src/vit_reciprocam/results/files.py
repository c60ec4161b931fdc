"""Write results: each file whole or not at all, and only over what this package wrote; tables."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from vit_reciprocam.errors import InputError
from vit_reciprocam.libraries import LIBRARIES

__all__ = [
    "GENERATOR",
    "check_folder",
    "csv_text",
    "holds_results",
    "is_ours",
    "library_versions",
    "markdown_row",
    "npz",
    "write_atomically",
    "write_folder",
]

GENERATOR = "vit-reciprocam"
MANIFEST = "manifest.json"
PARTIAL = "manifest.partial.json"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under another name and move it into place, so that nobody sees half of it."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # before the name, so that a power cut leaves no empty file
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_ours(path: Path) -> bool:
    """Return whether a JSON file was written by this package."""
    return _read(path).get("generator") == GENERATOR


def holds_results(folder: Path) -> bool:
    """Return whether `write_folder` wrote to a folder, or began to."""
    return is_ours(folder / MANIFEST) or is_ours(folder / PARTIAL)


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be made or written to, without making it."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise InputError(
            f"results go to a folder, and {existing} is a file: choose another place than {folder}"
        )
    if not os.access(existing, os.W_OK):
        raise InputError(f"results cannot be written to {folder}: no permission for {existing}")


def write_folder(folder: Path, files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> None:
    """Write files, and last `manifest.json`, which lists them and the versions that made them.

    What an earlier call wrote there is replaced; anything else is left alone. Until the manifest
    is written, `manifest.partial.json` says that the files are this package's. The folder is made
    if it does not exist; `files` is name -> content, and `manifest` holds further entries.

    Raises:
        InputError: If a file that this package did not write has one of the names, or the folder
            cannot be written to.
    """
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    complete, partial = folder / MANIFEST, folder / PARTIAL
    earlier: set[str] = set()
    for path in (complete, partial):
        if is_ours(path):
            earlier |= {path.name, *_read(path).get("files", [])}
    taken = [n for n in (MANIFEST, *files) if n not in earlier and (folder / n).exists()]
    if taken:
        raise InputError(
            f"{folder / taken[0]} was not written by {GENERATOR}, so it is not replaced: save to "
            "another folder, or move it away"
        )
    begun = {"generator": GENERATOR, "files": sorted({*files, *earlier} - {MANIFEST, PARTIAL})}
    write_atomically(partial, _json(begun))
    complete.unlink(missing_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, content)
    for name in earlier - {MANIFEST, PARTIAL, *files}:
        (folder / Path(name).name).unlink(missing_ok=True)
    made = {"versions": library_versions(), "files": sorted(files)}
    write_atomically(complete, _json({"generator": GENERATOR, **manifest, **made}))
    partial.unlink()


def library_versions() -> dict[str, str]:
    """Return the versions of this package and of the libraries it uses, if they are installed."""
    packages = [
        *("vit-reciprocam", "numpy", "pillow", "torch"),
        *(library.package for library in LIBRARIES.values()),
        *("safetensors", "onnx", "onnx-ir", "onnxscript", "protobuf", "onnxruntime", "openvino"),
        *("pyarrow", "grad-cam", "captum"),
    ]
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def npz(arrays: Mapping[str, np.ndarray | None]) -> bytes:
    """Return arrays as the content of a compressed .npz file; those that are None are left out."""
    sink = io.BytesIO()
    given = {name: array for name, array in arrays.items() if array is not None}
    np.savez_compressed(sink, **given)  # type: ignore[arg-type]
    return sink.getvalue()


def csv_text(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return a CSV file: a line with the columns' names, then one line per row.

    A value that is missing or None is left empty; a row with another column is a `ValueError`.
    """
    sink = io.StringIO()
    writer = csv.DictWriter(sink, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue()


def markdown_row(cells: Iterable[str]) -> str:
    """Return one row of a Markdown table; the cells must not hold "|" or line ends."""
    return f"| {' | '.join(cells)} |"
