"""What Python files import, and what pyproject.toml declares that they may."""

import ast
import functools
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
TESTS = ROOT / "tests"
TOOLS = ROOT / "tools"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# The folders that tests import from: the package's, and those that pytest puts on the path.
PLACES = [SOURCE, TOOLS, *sorted({path.parent for path in TESTS.rglob("*.py")})]

# Distributions that are imported by another name than their own.
IMPORT_NAMES = {
    "grad-cam": "pytorch_grad_cam",
    "open_clip_torch": "open_clip",
    "pillow": "PIL",
    "protobuf": "google",
    "pyyaml": "yaml",
}


def distribution(requirement):
    """The name that a requirement such as "numpy>=1.26" or "a[b]" begins with."""
    return re.match(r"[\w.-]+", requirement)[0]


def import_name(requirement):
    """The name that a requirement's distribution is imported by."""
    name = distribution(requirement)
    return IMPORT_NAMES.get(name, name.replace("-", "_"))


def core():
    """The names that can be imported where this package is installed without extras."""
    return {import_name(one) for one in PYPROJECT["project"]["dependencies"]}


def libraries(path):
    """The libraries that a file imports anywhere, "torch" for `from torch.nn import Linear`."""
    return {name for name in map(library, imports(path)) if name}


def libraries_to_import(path):
    """The libraries that must be there for a file to be imported.

    Imports inside functions do not count: they run when these are called. What a file imports of
    this repository is looked into.
    """
    seen, ahead = set(), [path]
    found = set()
    while ahead:
        file = ahead.pop()
        if file in seen:
            continue
        seen.add(file)
        names = imports(file, top_level_only=True)
        found |= {library(name) for name in names}
        ahead += [inner for name in names for inner in own_files(name)]
    return found - {None}


def beyond_core(test):
    """The libraries that a test file needs before it can be imported, beside the core's."""
    return sorted(libraries_to_import(test) - core() - {"pytest"})


@functools.cache
def imports(path, top_level_only=False):
    """The dotted names that a file imports; for `from a import b` both "a" and "a.b"."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def library(name):
    """The library that a dotted name belongs to; `None` if it is Python's or this repository's."""
    first = name.partition(".")[0]
    return None if first in sys.stdlib_module_names or any(own_files(name)) else first


def own_files(name):
    """The files of this repository that run when a dotted name is imported, packages first."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        place = Path(*parts[:count])
        for folder in PLACES:
            for file in (folder / place / "__init__.py", folder / place.with_suffix(".py")):
                if file.is_file():
                    yield file
