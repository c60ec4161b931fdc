"""What stands in .github: forms that ask for what helps, and workflows that may do little."""

import itertools
import re

import pytest
import typer
import yaml

from dependencies import PYPROJECT, ROOT
from vit_reciprocam.cli import app

GITHUB = ROOT / ".github"
FILES = sorted(GITHUB.rglob("*.yml"))
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").glob("[!c]*.yml"))
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
REPORT = "vit-reciprocam --version --json"


def text_of(path):
    return path.read_text(encoding="utf-8")


def read(path):
    return yaml.safe_load(text_of(path))


def workflow(name):
    found = read(GITHUB / "workflows" / name)
    return found | {"on": found.pop(True)}  # YAML 1.1 takes the key `on` for true


def steps_of(job):
    return " ".join(step.get("run", "") for step in job["steps"])


def named(path):
    return path.relative_to(GITHUB).as_posix()


@pytest.mark.parametrize("path", FILES, ids=named)
def test_every_file_is_yaml_and_repeats_no_key(path):
    node = yaml.compose(text_of(path))
    ahead = [node]
    while ahead:
        node = ahead.pop()
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value]
            assert len(keys) == len(set(keys)), keys
            ahead += itertools.chain(*node.value)
        elif isinstance(node, yaml.SequenceNode):
            ahead += node.value


# --- forms ---------------------------------------------------------------------------------------


def test_there_are_three_forms_and_no_blank_issue():
    assert [path.stem for path in FORMS] == ["bug", "feature", "model"]
    assert read(GITHUB / "ISSUE_TEMPLATE" / "config.yml") == {"blank_issues_enabled": False}


@pytest.mark.parametrize("path", FORMS, ids=named)
def test_a_form_is_as_github_reads_it(path):
    form = read(path)
    assert set(form) == {"name", "description", "labels", "body"}
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in fields} <= {"textarea", "input", "checkboxes"}
    names = [field["id"] for field in fields]
    assert len(set(names)) == len(names)
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


@pytest.mark.parametrize("name", ["bug", "model"])
def test_who_reports_is_asked_for_the_environment(name):
    fields = read(GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml")["body"]
    (environment,) = [field for field in fields if field.get("id") == "environment"]
    assert REPORT in environment["attributes"]["description"]
    assert environment["validations"]["required"]
    assert environment["attributes"]["render"] == "json"


@pytest.mark.parametrize("path", [*FORMS, GITHUB / "pull_request_template.md"], ids=named)
def test_commands_and_files_that_are_named_exist(path):
    text = text_of(path)
    options = {option for one in typer.main.get_command(app).params for option in one.opts}
    assert set(REPORT.split()[1:]) <= options
    commands = typer.main.get_command(app).commands
    for name in re.findall(r"vit-reciprocam ([a-z]+)", text):
        assert name in commands
    for name in re.findall(r"[\w/]+\.md|docs/\w+", text):
        assert (ROOT / name).exists(), name


# --- workflows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WORKFLOWS, ids=named)
def test_actions_are_pinned_by_commit_with_the_version_beside_it(path):
    text = text_of(path)
    used = re.findall(r"uses: (.+)", text)
    assert used
    for one in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", one), one
    assert "Actions are pinned by commit, because" in text


@pytest.mark.parametrize("path", WORKFLOWS, ids=named)
def test_no_workflow_has_a_secret_or_runs_with_more_than_the_event_gives(path):
    text = text_of(path)
    assert "secrets." not in text
    assert "pull_request_target" not in text
    assert "workflow_run" not in text
    found = workflow(path.name)
    assert found["permissions"] in ({}, {"contents": "read"})
    for job in found["jobs"].values():
        assert "timeout-minutes" in job
        for step in job["steps"]:
            assert "${{" not in step.get("run", ""), (
                "what an event names is not pasted into a shell"
            )
            if "actions/checkout" in step.get("uses", ""):
                assert step["with"]["persist-credentials"] is False


def test_ci_covers_every_python_that_is_declared_on_three_systems():
    jobs = workflow("ci.yml")["jobs"]
    declared = re.findall(r"Python :: (3\.\d+)", " ".join(PYPROJECT["project"]["classifiers"]))
    least = re.fullmatch(r">=(3\.\d+)", PYPROJECT["project"]["requires-python"])[1]
    assert declared[0] == least
    for name in ("core", "full"):
        matrix = jobs[name]["strategy"]["matrix"]
        assert matrix["python"] == declared
        assert [os.partition("-")[0] for os in matrix["os"]] == ["ubuntu", "macos", "windows"]
        assert jobs[name]["runs-on"] == "${{ matrix.os }}"


def test_the_core_job_installs_no_extra_and_the_full_job_all():
    jobs = workflow("ci.yml")["jobs"]
    assert "pip install . pytest" in steps_of(jobs["core"])
    assert "[" not in re.search(r"pip install (.*?) python", steps_of(jobs["core"]))[1]
    assert "pytest --core-only" in steps_of(jobs["core"])
    assert '".[dev]"' in steps_of(jobs["full"])
    assert steps_of(jobs["full"]).endswith("python -m pytest")


def test_ci_does_what_the_script_in_dot_ci_does():
    targets = re.findall(r"^make (\w+)$", text_of(ROOT / ".ci" / "run"), re.MULTILINE)
    assert targets == ["lint", "browser", "test"]
    everything = " ".join(steps_of(job) for job in workflow("ci.yml")["jobs"].values())
    assert "make lint" in everything
    assert "make browser" in everything


def test_a_release_comes_from_a_tag_of_this_repository_alone():
    release = workflow("release.yml")
    assert release["on"] == {"push": {"tags": ["v*"]}}
    assert release["permissions"] == {}
    for job in release["jobs"].values():
        assert job["if"] == "${{ !github.event.repository.fork }}"
    assert release["jobs"]["attest"]["needs"] == "build"
    assert release["jobs"]["publish"]["needs"] == "attest"
    assert release["jobs"]["publish"]["environment"] == "release"


def test_each_job_of_a_release_has_the_rights_that_it_needs():
    jobs = workflow("release.yml")["jobs"]
    assert {name: job["permissions"] for name, job in jobs.items()} == {
        "build": {"contents": "read"},
        "attest": {"id-token": "write", "attestations": "write"},
        "publish": {"id-token": "write"},
    }
    for job in jobs.values():
        if "id-token" in job["permissions"]:
            assert steps_of(job).strip() == "", (
                "no code of ours or of a package may ask for a token"
            )


def test_a_release_is_checked_before_it_is_published():
    steps = steps_of(workflow("release.yml")["jobs"]["build"])
    order = ["check_release.py", "python -m build", "twine check --strict", "install dist/*.whl"]
    order += ['vit-reciprocam" demo', 'pytest" --core-only']
    places = [steps.index(one) for one in order]
    assert places == sorted(places)


def test_dependabot_looks_where_something_is_declared():
    updates = read(GITHUB / "dependabot.yml")["updates"]
    declared = {(one["package-ecosystem"], one["directory"]) for one in updates}
    assert declared == {("pip", "/"), ("github-actions", "/"), ("npm", "/examples/browser")}
    assert (ROOT / "examples" / "browser" / "package-lock.json").exists()
