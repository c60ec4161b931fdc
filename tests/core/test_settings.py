import pytest

from vit_reciprocam.core.settings import parse_settings, read_value, split_pair, write_value
from vit_reciprocam.errors import InputError

NAMES = {"names": ["a", "b"], "expected": "NAME:KEY=VALUE, such as a:b=1"}


@pytest.mark.parametrize(
    ("text", "name", "settings"),
    [
        ("a", "a", {}),
        ("b:", "b", {}),
        ("a:x=1", "a", {"x": "1"}),
        ("a: x = 1 ,y=p=q,", "a", {"x": "1", "y": "p=q"}),
    ],
)
def test_a_name_with_settings(text, name, settings):
    assert parse_settings("thing", text, **NAMES) == (name, settings)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("c:x", r"thing must be one of 'a', 'b'; got 'c'"),
        ("a:x", r"thing 'a:x': expected NAME:KEY=VALUE, such as a:b=1"),
        ("a:=1", "expected"),
        ("a:x= ", "expected"),
        ("a:y=1,x", "expected"),
    ],
)
def test_texts_of_another_form(text, words):
    with pytest.raises(InputError, match=words):
        parse_settings("thing", text, **NAMES)


def test_pairs():
    assert split_pair("img_size=[1, 2]") == ("img_size", "[1, 2]")
    assert split_pair("pool=") == ("pool", "")
    assert split_pair("pool")[0] == split_pair("=1")[0] == ""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("0.5", 0.5),
        (".5", 0.5),
        ("true", True),
        ("False", False),
        ("null", None),
        ("[96, 160]", [96, 160]),
        ("dirac", "dirac"),
        ('"3"', "3"),
        ("", ""),
    ],
)
def test_values_are_read_and_written(text, value):
    assert read_value(text) == value
    assert type(read_value(text)) is type(value)
    assert read_value(write_value(value)) == value
