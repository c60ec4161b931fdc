"""The records in docs/decisions: one form, all in the index, about things that exist."""

import re

import pytest

from dependencies import ROOT, SOURCE

FOLDER = ROOT / "docs" / "decisions"
RECORDS = sorted(FOLDER.glob("[0-9]*.md"))
HEADINGS = ["Context", "Decision", "Consequences", "What would change it"]
PLACES = [ROOT, SOURCE / "vit_reciprocam"]


def text_of(record):
    return record.read_text(encoding="utf-8")


def named(record):
    return record.name


def head(record):
    """The number, title and status of a record."""
    return re.match(r"# (\d{4})\. (.+)\n\nStatus: (.+)\n\n", text_of(record)).groups()


def test_numbers_follow_each_other():
    assert [record.name[:4] for record in RECORDS] == [f"{n + 1:04d}" for n in range(len(RECORDS))]
    assert len(RECORDS) >= 10


@pytest.mark.parametrize("record", RECORDS, ids=named)
def test_a_record_has_the_form_of_all(record):
    number, _, status = head(record)
    assert record.name.startswith(f"{number}-")
    assert re.fullmatch(r"proposed|accepted|open|replaced by \d{4}", status)
    assert re.findall(r"^## (.+)$", text_of(record), re.MULTILINE) == HEADINGS
    for heading in HEADINGS:
        assert re.search(rf"^## {heading}\n\n[A-Z`]", text_of(record), re.MULTILINE), "it is empty"
    assert len(text_of(record).splitlines()) <= 40, "a record is one page"


def test_the_index_has_every_record_with_its_title_and_status():
    rows = re.findall(
        r"^\| \[(\d{4})\]\((.+)\) \| (.+) \| (.+) \|$", text_of(FOLDER / "README.md"), re.MULTILINE
    )
    assert rows == [
        (number, r.name, title, status) for r in RECORDS for number, title, status in [head(r)]
    ]


@pytest.mark.parametrize("record", RECORDS, ids=named)
def test_files_and_rooms_that_are_named_exist(record):
    for name in re.findall(r"`([\w.]+/[\w./]*)`", text_of(record)):
        assert any((place / name).exists() for place in PLACES), name
