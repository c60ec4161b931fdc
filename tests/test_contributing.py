"""CONTRIBUTING.md maps the house as it is: everything named once, nothing that is not there."""

import re
from collections import Counter

import pytest

from dependencies import ROOT, SOURCE, TESTS

PACKAGE = SOURCE / "vit_reciprocam"
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def chapter(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)[1]


def second_columns(text):
    """What stands in backticks in the second column of tables."""
    rows = re.findall(r"^\|[^|]+\|([^|]+)\|$", text, re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


PACKAGE_MAP, MAP_BESIDE = map(second_columns, chapter("The house").split("Beside it:"))


def entries(folder):
    """Files and folders, folders with a slash at the end, without what running leaves behind."""
    for path in sorted(folder.iterdir()):
        if not path.name.startswith((".", "__pycache__")):
            yield path.name + "/" * path.is_dir()


def folders_within(folder):
    """Folders at any depth that hold modules, relative, with a slash at the end."""
    modules = {path.parent for path in folder.rglob("*.py")} - {folder}
    return {f"{path.relative_to(folder).as_posix()}/" for path in modules}


def test_every_room_of_the_package_is_named_once():
    assert Counter(PACKAGE_MAP) == Counter({*entries(PACKAGE), *folders_within(PACKAGE)})


def test_every_tool_and_every_test_of_the_whole_is_named_once():
    tools = {f"tools/{name}" for name in entries(ROOT / "tools")}
    tests = {f"tests/{name}" for name in entries(TESTS) if name.endswith(".py")}
    others = {"tests/", "docs/", "docs/decisions/", "examples/browser/"}
    assert Counter(MAP_BESIDE) == Counter(tools | tests | others)
    assert all((ROOT / name).exists() for name in others)


def test_each_folder_of_tests_is_a_room_or_the_tools():
    rooms = {name.rstrip("/").removesuffix(".py") for name in entries(PACKAGE)}
    folders = {name.rstrip("/") for name in entries(TESTS) if name.endswith("/")}
    assert folders <= rooms | {"tools"}


@pytest.mark.parametrize("title", ["What goes where", "English"])
def test_places_and_examples_that_are_named_exist(title):
    for name in re.findall(r"`([\w/]+(?:/|\.py))`", chapter(title)):
        if "NAME" not in name and "/" in name:
            assert any((place / name).exists() for place in (PACKAGE, ROOT)), name


def test_releasing_names_what_the_workflow_does():
    releasing = chapter("Releasing")
    workflow = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    for step in ("tools/check_release.py", "twine check", "--core-only", "environment: release"):
        assert step in workflow
    for word in ("tools/check_release.py v", "`twine check`", "attests", "trusted publishing"):
        assert word in releasing
