"""A run's folder: what was run, its records in Parquet parts, and last the manifest.

    RUN/run.json                 what was run, written first; a resumed run must be of the same
    RUN/part-000000.parquet      records of some pictures, each part whole or absent
    RUN/manifest.json            written last: the run is complete

A process that is killed leaves whole parts behind, and the next goes on after them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
from filelock import FileLock, Timeout
from pyarrow import parquet

from vit_reciprocam.errors import InputError
from vit_reciprocam.results.files import GENERATOR, check_folder, is_ours, write_atomically

__all__ = [
    "RUN",
    "SCHEMA",
    "RunFolder",
    "columns_of",
    "read_run",
]

RUN = "run.json"
MANIFEST = "manifest.json"
_FORMAT = 1
_KEY = ("index", "model", "method")
_SHARE = pyarrow.float64()

SCHEMA = pyarrow.schema(
    [
        ("index", pyarrow.int64()),  # of the picture in the data set
        ("source", pyarrow.string()),
        ("digest", pyarrow.string()),  # SHA-256 of the picture's pixels
        ("model", pyarrow.string()),
        ("method", pyarrow.string()),
        ("label", pyarrow.int64()),  # null where not known
        ("target", pyarrow.int64()),  # the explained class c
        ("predicted", pyarrow.int64()),
        ("p", _SHARE),  # probability of c on the picture
        ("o", _SHARE),  # and on the picture under its map
        ("drop", _SHARE),
        ("increase", _SHARE),
        ("coherency", _SHARE),
        ("complexity", _SHARE),
        ("adcc", _SHARE),
        ("insertion", _SHARE),  # null where not measured, as all below
        ("deletion", _SHARE),
        ("pointing_game", _SHARE),
        ("energy_in_box", _SHARE),
        ("mass_accuracy", _SHARE),
        ("map", pyarrow.list_(pyarrow.float32())),  # row by row
        ("rows", pyarrow.int64()),
        ("note", pyarrow.string()),  # why the objects' place is not measured, where it is given
        ("error", pyarrow.string()),  # why there are no values; null where there are
    ]
)
"""A row for each picture, model and method; shares are 0 to 1."""


@dataclass(frozen=True)
class RunFolder:
    """An open run, of which no other process can write.

    Attributes:
        path: The folder.
        settings: What is run.
    """

    path: Path
    settings: Mapping[str, Any]

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, path: Path, settings: Mapping[str, Any], *, resume: bool = False
    ) -> Iterator[RunFolder]:
        """Begin a run in a new or empty folder, or go on with one.

        Raises:
            InputError: If another process writes it, it holds a run and `resume` is false, it
                holds something else, or another run than `settings` say: the message names what
                differs.
        """
        check_folder(path)
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise InputError(
                f"another process is writing {path}: wait for it, or choose another folder"
            ) from error
        try:
            _check(path, settings, resume)
            (path / MANIFEST).unlink(missing_ok=True)  # until it is complete again
            text = json.dumps({"generator": GENERATOR, "format": _FORMAT, **settings}, indent=2)
            if not (path / RUN).exists():
                write_atomically(path / RUN, (text + "\n").encode())
            yield cls(path, settings)
        finally:
            lock.release()

    def done(self) -> set[tuple[int, str]]:
        """(index, model) of the pictures that are measured; those that failed are tried again."""
        found: dict[tuple[int, str], bool] = {}
        for row in _read_parts(self.path, ["error"]).to_pylist():
            key = row["index"], row["model"]
            found[key] = found.get(key, True) and row["error"] is None
        return {key for key, measured in found.items() if measured}

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add records, as one part.

        Raises:
            OSError: If they cannot be written; the parts before are whole.
        """
        table = pyarrow.Table.from_pylist(list(records), schema=SCHEMA)
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(table, sink, compression="zstd")
        parts = _parts(self.path)
        number = int(parts[-1].stem.removeprefix("part-")) + 1 if parts else 0
        write_atomically(self.path / f"part-{number:06d}.parquet", sink.getvalue().to_pybytes())

    def finish(self, more: Mapping[str, Any]) -> dict[str, Any]:
        """Write the manifest: the run is complete.

        Args:
            more: What the manifest says beside the settings, the counts and the failures.

        Returns:
            The manifest.
        """
        rows = _read_parts(self.path, ["source", "digest", "note", "error"]).to_pylist()
        pictures = {row["index"]: row["digest"] for row in rows}
        digests = json.dumps(sorted(pictures.items())).encode()
        manifest = {
            "generator": GENERATOR,
            "format": _FORMAT,
            **self.settings,
            **more,
            "images": len({row["index"] for row in rows if row["error"] is None}),
            "failures": _listed(rows, "error"),
            "not_located": _listed(rows, "note"),
            "pixels": hashlib.sha256(digests).hexdigest(),
            "parts": [part.name for part in _parts(self.path)],
        }
        write_atomically(self.path / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
        return manifest


def read_run(path: Path) -> tuple[dict[str, Any], pyarrow.Table]:
    """What was run, and its records; of a run that is not complete those there are.

    Returns:
        The manifest, or run.json where the run is not complete (then without the key "images"); and
        a table of `SCHEMA`, ordered by model, method and index.

    Raises:
        InputError: If it is no run of this version.
    """
    if not is_ours(path / RUN):
        raise InputError(
            f"{path} is no run of vit-reciprocam evaluate: expected a folder with {RUN}"
        )
    settings = json.loads((path / RUN).read_bytes())
    _check_format(path, settings)
    if is_ours(path / MANIFEST):
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["parts"] == [part.name for part in _parts(path)]:
            settings = manifest
    table = _read_parts(path, SCHEMA.names)
    return settings, table.sort_by([(name, "ascending") for name in ("model", "method", "index")])


def columns_of(table: pyarrow.Table, model: str, method: str) -> dict[str, np.ndarray]:
    """One model's and method's figures, picture by picture in order, without those that failed.

    A column that is not measured for every picture, such as of boxes, has those it is measured for.
    """
    chosen = pyarrow.compute.and_(
        pyarrow.compute.and_(
            pyarrow.compute.equal(table["model"], model),
            pyarrow.compute.equal(table["method"], method),
        ),
        pyarrow.compute.is_null(table["error"]),
    )
    part = table.filter(chosen)
    figures = [field.name for field in SCHEMA if field.type == _SHARE]
    columns = {name: part[name].drop_null().to_numpy() for name in figures}
    return {name: values for name, values in columns.items() if len(values) or name == "p"}


def _check(path: Path, settings: Mapping[str, Any], resume: bool) -> None:
    others = [p.name for p in path.iterdir() if p.name != ".lock" and not p.name.endswith(".tmp")]
    if not others:
        return
    if not is_ours(path / RUN):
        raise InputError(
            f"{path} holds {others[0]} and no run: choose an empty folder, so that nothing is mixed"
        )
    if not resume:
        raise InputError(
            f"{path} holds a run already: pass --resume (in Python resume=True) to go on with it, "
            "or choose another folder"
        )
    before = json.loads((path / RUN).read_bytes())
    _check_format(path, before)
    now = json.loads(json.dumps(settings))
    old, new = _flat(before), _flat(now)
    changed = [
        f"{key}: {old.get(key, 'absent')} there, {new.get(key, 'absent')} now"
        for key in sorted({*old, *new} - {"generator", "format"})
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise InputError(
            f"the run in {path} cannot be resumed, it was made otherwise: {'; '.join(changed)}. "
            "Choose another folder, or the settings of before"
        )


def _check_format(path: Path, settings: Mapping[str, Any]) -> None:
    if settings.get("format") != _FORMAT:
        raise InputError(
            f"the run in {path} was written in format {settings.get('format')}, this version reads "
            f"{_FORMAT}: read it with the version of vit-reciprocam that wrote it"
        )


def _flat(content: Any, name: str = "") -> dict[str, Any]:
    """Nested mappings as one: {"protocol.name": …}."""
    if not isinstance(content, dict):
        return {name: content}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{name}.{key}" if name else key)
    return flat


def _parts(path: Path) -> list[Path]:
    return sorted(path.glob("part-*.parquet"))


def _listed(rows: Sequence[Mapping[str, Any]], column: str) -> list[dict[str, Any]]:
    """Pictures with something in a column, once a model: what every method says is said once."""
    found: dict[tuple[str, int, str], dict[str, Any]] = {}
    for row in rows:
        if row[column] is not None:
            about = {"source": row["source"], "model": row["model"], column: row[column]}
            found.setdefault((row["model"], row["index"], row[column]), about)
    return [found[key] for key in sorted(found)]


def _read_parts(path: Path, columns: Sequence[str]) -> pyarrow.Table:
    """Columns of all records, and their keys; of records with the same key the last."""
    columns = list(dict.fromkeys([*_KEY, *columns]))
    tables = []
    for part in _parts(path):
        try:
            tables.append(parquet.read_table(part, columns=columns))
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"{part} is damaged: {error}. Remove it and resume the run") from error
    empty = pyarrow.schema([SCHEMA.field(name) for name in columns]).empty_table()
    table = pyarrow.concat_tables([empty, *tables], promote_options="default")
    keys = zip(*(table[name].to_pylist() for name in _KEY), strict=True)
    last = {key: row for row, key in enumerate(keys)}
    return table if len(last) == table.num_rows else table.take(sorted(last.values()))
