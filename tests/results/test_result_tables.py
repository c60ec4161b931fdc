import csv
import io

import pytest

from vit_reciprocam.results.files import csv_text, markdown_row


def test_csv_by_hand_and_back():
    rows = [{"a": 1, "b": 'x, "y"'}, {"b": None}]
    text = csv_text(rows, ["b", "a"])
    assert text == 'b,a\n"x, ""y""",1\n,\n'
    assert list(csv.DictReader(io.StringIO(text))) == [
        {"b": 'x, "y"', "a": "1"},
        {"b": "", "a": ""},
    ]
    with pytest.raises(ValueError, match="'c'"):
        csv_text([{"c": 1}], ["a"])


def test_a_row_of_markdown():
    assert markdown_row(["a", "", "b"]) == "| a |  | b |"
