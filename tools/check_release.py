"""Check that everything that names the version of a release agrees with its tag.

    python tools/check_release.py v0.1.0

The release workflow runs this first, and a maintainer runs it before tagging. It only reads files,
so it needs nothing installed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Each file that names the version, with the pattern of the line that does so, once per file.
PLACES = {
    "src/vit_reciprocam/__init__.py": r'^__version__ = "(.+)"$',
    "CITATION.cff": r"^version: (.+)$",
}


def disagreements(tag: str, root: Path = ROOT) -> list[str]:
    """Return a sentence for each thing that disagrees with a tag such as "v0.1.0"."""
    version = re.fullmatch(r"v(\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?)", tag)
    if version is None:
        return [f"a release's tag is v and a version, such as v0.1.0 or v0.1.0rc1; got {tag!r}"]
    found = []
    for name, pattern in PLACES.items():
        named = re.findall(pattern, _text(root / name), re.MULTILINE)
        if named != [version[1]]:
            found.append(f"{name} names {', '.join(named) or 'no version'}, the tag {version[1]}")
    heading = rf"^## \[{re.escape(version[1])}\] - \d{{4}}-\d\d-\d\d$"
    changes = re.split(r"^## ", _text(root / "CHANGELOG.md"), flags=re.MULTILINE)
    if not re.search(heading, _text(root / "CHANGELOG.md"), re.MULTILINE):
        found.append(f"CHANGELOG.md has no heading ## [{version[1]}] - YYYY-MM-DD")
    elif any(one.startswith("[Unreleased]") and "\n- " in one for one in changes):
        found.append("CHANGELOG.md still lists changes under [Unreleased]: move them down")
    return found


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Print what disagrees, and return the exit code: 1 if anything does, 2 for wrong usage."""
    if len(arguments) != 1:
        print("usage: python tools/check_release.py TAG", file=sys.stderr)
        return 2
    found = disagreements(arguments[0])
    for line in found:
        print(f"error: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
