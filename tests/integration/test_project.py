"""What stands around the package: the version, the changelog, the citation, and the files that GitHub reads."""

import re
import subprocess
from datetime import date
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

import lightning_prune

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = [path for path in sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")) if path.stem != "config"]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
TEXTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md")),
    *chain.from_iterable((ROOT / name).rglob("*.md") for name in ("docs", ".github")),
    *chain.from_iterable((ROOT / name).rglob("*.py") for name in ("lightning_prune", "examples")),
]


def read(path: Path) -> dict[str, Any]:
    found = yaml.safe_load(path.read_text())
    assert isinstance(found, dict)
    return found


def steps(workflow: Path) -> list[dict[str, Any]]:
    return [step for job in read(workflow)["jobs"].values() for step in job["steps"]]


def targets(workflow: Path) -> set[str]:
    """Return the make targets that a workflow runs, by themselves or as a value of a matrix."""
    named = {word for step in steps(workflow) for word in re.findall(r"\bmake ([\w-]+)", step.get("run", ""))}
    matrices = [job.get("strategy", {}).get("matrix", {}) for job in read(workflow)["jobs"].values()]
    return named.union(*(matrix.get("target", []) for matrix in matrices))


def test_the_version_stands_in_one_place() -> None:
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads(PYPROJECT)
    assert "version" not in settings["project"]
    assert settings["project"]["dynamic"] == ["version"]
    text = (ROOT / settings["tool"]["hatch"]["version"]["path"]).read_text()
    assert re.findall(r'^__version__ = "(.+)"$', text, flags=re.MULTILINE) == [lightning_prune.__version__]


def test_the_installed_version_is_that_of_the_package() -> None:
    assert version("lightning-prune") == lightning_prune.__version__


def test_the_changelog_keeps_a_changelog() -> None:
    headings = re.findall(r"^## (.+)$", CHANGELOG, flags=re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    versions = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", heading) for heading in headings[1:]]
    released = [(found[1], date.fromisoformat(found[2])) for found in versions if found]
    assert len(released) == len(headings) - 1
    assert released[0][0] == lightning_prune.__version__
    assert [day for _, day in released] == sorted((day for _, day in released), reverse=True)
    kinds = set(re.findall(r"^### (.+)$", CHANGELOG, flags=re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    links = re.findall(r"^\[(.+)\]: https://github.com/lightning-prune/lightning-prune/", CHANGELOG, flags=re.MULTILINE)
    assert links == ["Unreleased", *(number for number, _ in released)]


def test_entries_of_the_changelog_are_one_line_each_and_unique() -> None:
    entries = [line for line in CHANGELOG.splitlines() if line.startswith(("- ", "  "))]
    assert all(line.startswith("- ") and line.endswith(".") for line in entries)
    assert len(entries) == len(set(entries)) >= 50


def test_the_citation_is_of_this_version() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["version"] == lightning_prune.__version__
    assert f"## [{citation['version']}] - {citation['date-released']}" in CHANGELOG


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_targets_that_make_knows(workflow: Path) -> None:
    for target in sorted(targets(workflow)):
        done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_workflows_check_all_that_has_to_hold() -> None:
    inside = set().union(*(targets(workflow) for workflow in WORKFLOWS))
    everything = set(re.findall(r"^make ([\w-]+)", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE))
    assert inside >= everything | {"compat", "coverage"}


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_pin_actions_and_may_only_read(workflow: Path) -> None:
    used = re.findall(r"uses: (.+)", workflow.read_text())
    assert used
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action) for action in used), used
    assert read(workflow)["permissions"] == {"contents": "read"}
    assert all("timeout-minutes" in job for job in read(workflow)["jobs"].values())


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.name)
def test_issue_forms_have_what_github_requires(form: Path) -> None:
    found = read(form)
    assert {"name", "description", "body"} <= found.keys()
    ids = [field["id"] for field in found["body"]]
    assert len(ids) == len(set(ids))
    for field in found["body"]:
        assert field["type"] in {"textarea", "input", "dropdown", "checkboxes"}
        assert field["attributes"]["label"]
    assert any(field.get("validations", {}).get("required") for field in found["body"])


def test_people_find_how_to_take_part() -> None:
    assert {form.stem for form in FORMS} == {"bug", "feature"}
    assert all((GITHUB / name).stat().st_size for name in ("PULL_REQUEST_TEMPLATE.md", "CODE_OF_CONDUCT.md"))
    assert "weights_only=True" in (ROOT / "SECURITY.md").read_text()
    urls = re.findall(r'^(\w+) = "https://github.com/lightning-prune/lightning-prune', PYPROJECT, flags=re.MULTILINE)
    assert {"Repository", "Documentation", "Changelog", "Issues"} <= set(urls)


def test_nothing_claims_a_published_package() -> None:
    claims = re.compile(r"pip\s+install\s+['\"]?lightning[-_]prune")
    assert [path for path in TEXTS if claims.search(path.read_text())] == []
