"""No docstring, help text or comment of the package begins with a word that leaves it hanging."""

import ast
import inspect
import io
import re
import tokenize
from pathlib import Path

import pytest
import typer

import vit_reciprocam
from vit_reciprocam.cli import app

SOURCE = Path(vit_reciprocam.__file__).parent
FILES = {str(path.relative_to(SOURCE)): path for path in sorted(SOURCE.rglob("*.py"))}
HANGING = re.compile(r"(of|within|where|in which|likewise)\b", re.IGNORECASE)
SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises):")
ENTRY = re.compile(r"\*{0,2}[\w.]+: *(.*)")
LEFT_OUT = re.compile(r"(noqa|type: ignore|fmt:|pragma|mypy:)")


def docstrings(source):
    """(line, text) of each docstring, also of those below a variable."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.lineno, inspect.cleandoc(text)


def descriptions(docstring):
    """What a docstring's sections say of each argument, attribute, error and result."""
    section, indent = "", ""
    for line in docstring.splitlines():
        if line and not line.startswith(" "):
            heading = SECTION.fullmatch(line)
            section, indent = (heading[1], "") if heading else ("", "")
        elif section and line.strip():
            here = line[: len(line) - len(line.lstrip())]
            first, indent = indent == "", indent or here
            if here == indent and (entry := ENTRY.fullmatch(line.strip())):
                yield entry[1]
            elif first:  # a section such as Returns is one text
                yield line.strip()


def comments(source):
    """(line, text) of each comment, those on lines of their own joined to one."""
    joined = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            (row, column), alone = token.start, token.line.lstrip().startswith("#")
            text = token.string.lstrip("#: -")
            if alone and joined and joined[-1][:3] == (row - 1, column, True):
                joined[-1] = (row, column, True, joined[-1][3], f"{joined[-1][4]} {text}")
            else:
                joined.append((row, column, alone, row, text))
    return [(row, text) for *_, row, text in joined if not LEFT_OUT.match(text)]


def hanging(source):
    """(line, text) of all that begins with one of those words."""
    found = [*comments(source)]
    for line, text in docstrings(source):
        found += [(line, text), *((line, one) for one in descriptions(text))]
    return [(line, text.partition("\n")[0]) for line, text in found if HANGING.match(text)]


def commands(command=None, name="vit-reciprocam"):
    command = typer.main.get_command(app) if command is None else command
    yield name, command
    for inner, one in getattr(command, "commands", {}).items():
        yield from commands(one, f"{name} {inner}")


COMMANDS = dict(commands())


@pytest.mark.parametrize("name", FILES)
def test_nothing_begins_with_a_word_that_leaves_it_hanging(name):
    assert hanging(FILES[name].read_text()) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_help_texts_are_sentences(name):
    command = COMMANDS[name]
    texts = {parameter.name: parameter.help for parameter in command.params}
    texts[""] = inspect.cleandoc(command.help).partition("\n")[0]
    for option, text in texts.items():
        assert text, f"{name} {option} has no help text"
        assert not HANGING.match(text), f"{name} {option}: {text}"
        assert text[0].isupper(), f"{name} {option}: {text}"
        assert text.endswith("."), f"{name} {option}: {text}"


def test_the_commands_are_found():
    assert {"vit-reciprocam", "vit-reciprocam explain", "vit-reciprocam models"} <= set(COMMANDS)
    options = {parameter.name for parameter in COMMANDS["vit-reciprocam benchmark"].params}
    assert {"rounds", "threads"} <= options


SAMPLE = '''
"""Where it stands.

Of the second paragraph nothing is said.
"""

A = 1  # of the alphabet
"""Within, it is the first."""
# A comment that speaks
# of something on its second line,
# and this is its third.
B = 2  # noqa: X
# of B


class C:
    """Offers words such as "of", whereas nothing hangs.

    Attributes:
        a: In which it is kept.
        b: Kept
            of old.
        **c: Likewise.
    """

    def d(self, e):
        """Return it.

        Args:
            e: Where: there.

        Returns:
            Of each, the first.

        Raises:
            InputError: If of no use.
            OSError: Within.
        """
        return "of course"  # Likewise: true
'''


def test_all_that_hangs_is_found():
    assert sorted(hanging(SAMPLE)) == [
        (2, "Where it stands."),
        (7, "of the alphabet"),
        (8, "Within, it is the first."),
        (13, "of B"),
        (17, "In which it is kept."),
        (17, "Likewise."),
        (27, "Of each, the first."),
        (27, "Where: there."),
        (27, "Within."),
        (39, "Likewise: true"),
    ]
