""".github/workflows: they run what scripts/test.sh runs, and release what the version says."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorakit.version import __version__
from tests.shipped.test_docs import REPO

WORKFLOWS = REPO / ".github" / "workflows"
PROJECT = (REPO / "pyproject.toml").read_text(encoding="utf-8")


def steps(name: str) -> list[dict[str, Any]]:
    # YAML 1.1 reads the key `on` as true.
    jobs = yaml.safe_load((WORKFLOWS / f"{name}.yml").read_text(encoding="utf-8"))["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def commands(name: str) -> list[str]:
    return [step["run"] for step in steps(name) if "run" in step]


@pytest.mark.parametrize("name", ["ci", "release"])
def test_they_run_the_tests_as_everyone_does(name: str) -> None:
    assert "bash scripts/test.sh" in commands(name)


def test_the_site_is_built_as_in_the_tests() -> None:
    install, build = commands("docs")
    assert build == "python -m mkdocs build --strict -f docs/site/mkdocs.yml"
    for requirement in re.findall(r'"([^"]+)"', install):
        assert f'"{requirement}"' in PROJECT
    [folder] = [step["with"]["path"] for step in steps("docs") if "path" in step.get("with", {})]
    site = (REPO / "docs" / "site" / "mkdocs.yml").read_text(encoding="utf-8")
    [target] = re.findall(r"^site_dir: (\S+)$", site, re.MULTILINE)
    assert (REPO / "docs" / "site" / target).resolve() == REPO / folder


@pytest.mark.parametrize(("tag", "code"), [(f"v{__version__}", 0), ("v0.0.0", 1), (__version__, 1)])
def test_a_tag_that_is_not_the_version_is_not_released(tag: str, code: int) -> None:
    [check] = [command for command in commands("release") if "GITHUB_REF_NAME" in command]
    done = subprocess.run(
        ["bash", "-c", check],
        cwd=REPO,
        env={"GITHUB_REF_NAME": tag, "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert done.returncode == code


def test_the_manual_release_is_that_of_the_workflow() -> None:
    page = Path(REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for command in commands("release")[3:]:
        assert f"\n{command}\n" in page


def test_the_versions_of_python_are_those_of_the_package() -> None:
    [needed] = re.findall(r'requires-python = ">=3\.(\d+)"', PROJECT)
    matrix = yaml.safe_load((WORKFLOWS / "ci.yml").read_text(encoding="utf-8"))
    versions = matrix["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert versions[0] == f"3.{needed}"
