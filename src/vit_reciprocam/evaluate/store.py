"""A run's folder.

    RUN/run.json                 settings; written first, and a resumed run must agree with them
    RUN/part-000000.parquet      records of some pictures; each part is there whole or not at all
    RUN/manifest.json            summary; written last, when the run is complete

A process that is killed leaves whole parts behind, and the next one goes on after them.
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
from vit_reciprocam.evaluate.metrics.registry import METRICS
from vit_reciprocam.results.files import GENERATOR, check_folder, is_ours, write_atomically

__all__ = [
    "RUN",
    "RunFolder",
    "check_unused",
    "columns_of",
    "count_wanted",
    "read_run",
    "records_of",
    "schema",
]

RUN = "run.json"
MANIFEST = "manifest.json"
_FORMAT = 1
_KEY = ("index", "model", "method")


def schema() -> pyarrow.Schema:
    """Return the columns of a record, which is about one picture, one model and one method.

    Probabilities and metrics are fractions, and null if they were not measured.
    """
    return pyarrow.schema(
        [
            ("index", pyarrow.int64()),  # position of the picture in the data set
            ("source", pyarrow.string()),
            ("digest", pyarrow.string()),  # SHA-256 of the picture's pixels
            ("model", pyarrow.string()),
            ("method", pyarrow.string()),
            ("label", pyarrow.int64()),  # null if not known
            ("target", pyarrow.int64()),  # the explained class c
            ("predicted", pyarrow.int64()),
            *((name, pyarrow.float64()) for name in _figure_names()),
            ("map", pyarrow.list_(pyarrow.float32())),  # row by row
            ("rows", pyarrow.int64()),  # height of the map, in patches
            ("note", pyarrow.string()),  # why the objects' place is known but was not used
            ("error", pyarrow.string()),  # why there are no values; null if there are
        ]
    )


def _figure_names() -> list[str]:
    """Return p and o, the probabilities of c without and with the mask, and the stored metrics."""
    return ["p", "o", *(name for name, metric in METRICS.items() if metric.is_stored)]


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, with the run's settings."""

    path: Path
    settings: Mapping[str, Any]

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, path: Path, settings: Mapping[str, Any], *, resume: bool = False
    ) -> Iterator[RunFolder]:
        """Begin a run in a new or empty folder, or resume one, and let no other process write."""
        check_folder(path)
        path.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(path / ".lock", timeout=0).acquire()
        except Timeout as error:
            raise InputError(
                f"another process is writing {path}: wait for it, or choose another folder"
            ) from error
        with lock:
            _check_content(path, settings, resume)
            (path / MANIFEST).unlink(missing_ok=True)  # the run is not complete for now
            if not (path / RUN).exists():
                _write(path / RUN, settings)
            yield cls(path, settings)

    def done(self) -> set[tuple[int, str]]:
        """Return (index, model) of the pictures measured, without those that failed."""
        rows = _read_parts(self.path, ["error"]).to_pylist()
        failed = {(row["index"], row["model"]) for row in rows if row["error"] is not None}
        return {(row["index"], row["model"]) for row in rows} - failed

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add records as one part; a column of `schema` that a record lacks becomes null."""
        table = pyarrow.Table.from_pylist(list(records), schema=schema())
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(table, sink, compression="zstd")
        parts = _parts(self.path)
        number = int(parts[-1].stem.removeprefix("part-")) + 1 if parts else 0
        write_atomically(self.path / f"part-{number:06d}.parquet", sink.getvalue().to_pybytes())

    def finish(self, more: Mapping[str, Any]) -> dict[str, Any]:
        """Write the manifest, to which `more` adds entries and failures, and return it."""
        rows = _read_parts(self.path, ["source", "digest", "note", "error"]).to_pylist()
        pictures = {row["index"]: row["digest"] for row in rows}
        digests = json.dumps(sorted(pictures.items())).encode()
        about = {
            **self.settings,
            **more,
            "images": len({row["index"] for row in rows if row["error"] is None}),
            "failures": [*more.get("failures", ()), *_list_problems(rows, "error")],
            "not_located": _list_problems(rows, "note"),
            "pixels": hashlib.sha256(digests).hexdigest(),
            "parts": [part.name for part in _parts(self.path)],
        }
        return _write(self.path / MANIFEST, about)


def read_run(path: Path) -> tuple[dict[str, Any], pyarrow.Table]:
    """Read the settings and the records of a run, whether or not it is complete.

    The settings are the manifest, or run.json if the run is not complete: then they have no key
    "images". The records are a table of `schema`, ordered by model, method and index. If the run
    was made by a version with other metrics, columns that it lacks are null, and columns that this
    version does not know are left out.
    """
    if not is_ours(path / RUN):
        raise InputError(
            f"{path} is not a run of vit-reciprocam evaluate: expected a folder with {RUN}"
        )
    settings = json.loads((path / RUN).read_bytes())
    _check_format(path, settings)
    if is_ours(path / MANIFEST):
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["parts"] == [part.name for part in _parts(path)]:
            settings = manifest
    table = _read_parts(path, schema().names)
    return settings, table.sort_by([(name, "ascending") for name in ("model", "method", "index")])


def check_unused(path: Path) -> None:
    """Refuse a folder that cannot take a new run, because it holds one or something else."""
    check_folder(path)
    if path.exists():
        _check_content(path, {}, resume=False)


def count_wanted(settings: Mapping[str, Any]) -> int:
    """Return the number of pictures in a run, or of cells of its mosaics, each once per model."""
    if "mosaic" in settings:
        mosaics = settings["mosaic"]["models"].values()
        return int(settings["mosaic"]["n"] ** 2 * sum(one["mosaics"] for one in mosaics))
    return int(settings["data"]["pictures"] * len(settings["models"]))


def records_of(table: pyarrow.Table, model: str, method: str) -> pyarrow.Table:
    """Return the records of one method of one model, without those that failed."""
    chosen = pyarrow.compute.is_null(table["error"])
    for name, wanted in (("model", model), ("method", method)):
        chosen = pyarrow.compute.and_(chosen, pyarrow.compute.equal(table[name], wanted))
    return table.filter(chosen)


def columns_of(table: pyarrow.Table, model: str, method: str) -> dict[str, np.ndarray]:
    """Return the columns (pictures,) index, p, o and metrics of one method of one model.

    All but the index are fractions, or NaN if they were not measured. Pictures that failed are left
    out.
    """
    names = ["index", *_figure_names()]
    narrow = table.select(["model", "method", "error", *names])  # so that no maps are copied
    records = records_of(narrow, model, method)
    return {name: records[name].to_numpy() for name in names}


def _write(path: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write a JSON file that is marked as ours, and return its content."""
    content = {"generator": GENERATOR, "format": _FORMAT, **about}
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
    return content


def _check_content(path: Path, settings: Mapping[str, Any], resume: bool) -> None:
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
    old, new = _flatten(before), _flatten(json.loads(json.dumps(settings)))
    changed = [
        f"{key}: {old.get(key, 'absent')} there, {new.get(key, 'absent')} now"
        for key in sorted({*old, *new} - {"generator", "format"})
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise InputError(
            f"the run in {path} cannot be resumed, its settings differ: {'; '.join(changed)}. "
            "Choose another folder, or the earlier settings"
        )


def _check_format(path: Path, settings: Mapping[str, Any]) -> None:
    if settings.get("format") != _FORMAT:
        raise InputError(
            f"the run in {path} was written in format {settings.get('format')}, this version reads "
            f"{_FORMAT}: read it with the version of vit-reciprocam that wrote it"
        )


def _flatten(content: Any, name: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with keys such as "protocol.name"."""
    if not isinstance(content, dict):
        return {name: content}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flatten(value, f"{name}.{key}" if name else key)
    return flat


def _parts(path: Path) -> list[Path]:
    return sorted(path.glob("part-*.parquet"))


def _list_problems(rows: Sequence[Mapping[str, Any]], column: str) -> list[dict[str, Any]]:
    """Return the pictures with text in a column, each once per model, not once per method."""
    found: dict[tuple[str, int, str], dict[str, Any]] = {}
    for row in rows:
        if row[column] is not None:
            about = {"source": row["source"], "model": row["model"], column: row[column]}
            found.setdefault((row["model"], row["index"], row[column]), about)
    return [found[key] for key in sorted(found)]


def _read_parts(path: Path, columns: Sequence[str]) -> pyarrow.Table:
    """Read the keys and some columns of all records; for each key the last record counts."""
    columns = list(dict.fromkeys([*_KEY, *columns]))
    tables = []
    for part in _parts(path):
        try:
            stored = parquet.read_schema(part).names  # an earlier version had fewer metrics
            wanted = [name for name in columns if name in stored or name not in METRICS]
            tables.append(parquet.read_table(part, columns=wanted))
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"{part} is damaged: {error}. Remove it and resume the run") from error
    whole = schema()
    empty = pyarrow.schema([whole.field(name) for name in columns]).empty_table()
    table = pyarrow.concat_tables([empty, *tables], promote_options="default")
    keys = zip(*(table[name].to_pylist() for name in _KEY), strict=True)
    last = {key: row for row, key in enumerate(keys)}
    return table if len(last) == table.num_rows else table.take(sorted(last.values()))
