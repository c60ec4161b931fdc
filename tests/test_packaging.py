"""What is declared is what is used: libraries, versions, and the tests that need only the core."""

import pytest

import vit_reciprocam
from dependencies import (
    PYPROJECT,
    ROOT,
    SOURCE,
    TESTS,
    beyond_core,
    core,
    distribution,
    import_name,
    libraries,
)

PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
ITSELF = PROJECT["name"]
IMPORTED = set().union(*(libraries(path) for path in SOURCE.rglob("*.py")))

# Imported without being declared: what is there wherever the code that imports it runs.
FOUND_THERE = {"IPython": "runs a notebook, the only place where pictures are shown by it"}
# Declared without being imported: what another library imports for us.
CALLED_BY_OTHERS = {"onnxscript": "torch.onnx.export needs it"}

# What the core promises without extras: the demo, ONNX files, pictures, results, the commands.
TESTED_ON_THE_CORE = {
    "cli/test_demo_command.py",
    "cli/test_environment.py",
    "cli/test_explain_command.py",
    "core/test_targets.py",
    "evaluate/test_perturbation.py",
    "pictures/test_preprocess.py",
    "pictures/test_read.py",
    "pictures/test_render.py",
    "pictures/test_scenes.py",
    "results/test_explanation.py",
    "test_architecture.py",
    "test_packaging.py",
}


def requirements(*extras):
    """What extras ask for, but for other extras."""
    return [one for extra in extras for one in EXTRAS[extra] if distribution(one) != ITSELF]


def test_every_library_that_the_source_imports_is_declared():
    declared = core() | {import_name(one) for one in requirements(*set(EXTRAS) - {"dev"})}
    assert IMPORTED - declared == set(FOUND_THERE)


@pytest.mark.parametrize("extra", ["", *sorted(set(EXTRAS) - {"dev"})])
def test_every_declared_library_is_imported(extra):
    for one in requirements(extra) if extra else PROJECT["dependencies"]:
        assert import_name(one) in IMPORTED | set(CALLED_BY_OTHERS), f"nothing imports {one}"


def test_each_library_has_one_place_for_its_version():
    every = [distribution(one) for one in [*PROJECT["dependencies"], *requirements(*EXTRAS)]]
    assert sorted(every) == sorted(set(every))


def test_dev_has_all_extras():
    names = ",".join(extra for extra in EXTRAS if extra != "dev")
    assert EXTRAS["dev"][0] == f"{ITSELF}[{names}]"


def test_the_version_stands_in_the_package_and_is_cited():
    assert PROJECT["dynamic"] == ["version"]
    place = ROOT / PYPROJECT["tool"]["hatch"]["version"]["path"]
    assert f'__version__ = "{vit_reciprocam.__version__}"' in place.read_text(encoding="utf-8")
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {vit_reciprocam.__version__}\n" in cited


def test_the_source_distribution_holds_what_tests_read():
    include = PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    for name in (
        "src",
        "tests",
        "tools",
        "docs",
        "examples",
        ".github",
        "Makefile",
        "CITATION.cff",
    ):
        assert f"/{name}" in include
        assert (ROOT / name).exists()


@pytest.mark.parametrize("name", sorted(TESTED_ON_THE_CORE))
def test_what_the_core_promises_is_tested_on_the_core(name):
    assert beyond_core(TESTS / name) == []


def test_what_needs_more_is_known_by_its_imports_and_its_helpers():
    assert "torch" in beyond_core(TESTS / "test_docs.py")
    assert "pyarrow" in beyond_core(TESTS / "evaluate" / "test_report.py"), "store.py imports it"
    assert "torch" in beyond_core(TESTS / "core" / "test_masks.py"), "reference.py imports it"
