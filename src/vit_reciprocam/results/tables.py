"""Tables as text: whole CSV files, and rows of Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["csv_text", "markdown_row"]


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
