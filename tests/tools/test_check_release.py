import pytest

import check_release
import vit_reciprocam

CHANGES = "# Changelog\n\n## [Unreleased]\n{unreleased}\n## [1.2.0] - 2027-01-31\n\n- A thing\n"


@pytest.fixture
def release(tmp_path):
    """A repository that is ready to be released as 1.2.0, and what writes one of its files anew."""

    def write(name, content):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")

    write("src/vit_reciprocam/__init__.py", '"""Doc."""\n\n__version__ = "1.2.0"\n')
    write("CITATION.cff", "cff-version: 1.2.0\nversion: 1.2.0\n")
    write("CHANGELOG.md", CHANGES.format(unreleased=""))
    return tmp_path, write


def test_a_release_whose_files_agree(release):
    assert check_release.disagreements("v1.2.0", release[0]) == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("src/vit_reciprocam/__init__.py", '__version__ = "1.1.0"\n', "names 1.1.0, the tag 1.2.0"),
        ("CITATION.cff", "cff-version: 1.2.0\n", "CITATION.cff names no version, the tag 1.2.0"),
        ("CHANGELOG.md", "## [Unreleased]\n", "has no heading ## [1.2.0] - YYYY-MM-DD"),
        ("CHANGELOG.md", "## [1.2.0]\n", "has no heading ## [1.2.0] - YYYY-MM-DD"),
        ("CHANGELOG.md", CHANGES.format(unreleased="\n- More\n"), "changes under [Unreleased]"),
    ],
)
def test_what_does_not_agree_is_named(name, content, words, release):
    folder, write = release
    write(name, content)
    (found,) = check_release.disagreements("v1.2.0", folder)
    assert words in found


@pytest.mark.parametrize("tag", ["1.2.0", "v1.2", "v1.2.0-beta", "v1.2.0\n"])
def test_a_tag_that_is_not_a_version_is_refused(tag, release):
    (found,) = check_release.disagreements(tag, release[0])
    assert "such as v0.1.0" in found


def test_the_places_exist_here_and_hold_this_version():
    found = check_release.disagreements(f"v{vit_reciprocam.__version__}")
    assert [line for line in found if "CHANGELOG" not in line] == []


def test_the_exit_code(capsys):
    assert check_release.main([]) == 2
    assert check_release.main(["v0.0.0"]) == 1
    assert "error: " in capsys.readouterr().err
