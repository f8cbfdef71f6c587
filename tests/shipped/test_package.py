"""The wheel: what it contains, and that it trains in an environment that has nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib import import_module
from pathlib import Path

import pytest

from lorakit.version import __version__
from tests.shipped.test_docs import REPO
from tests.training.runs import write_recipe_file

wheel_builder = pytest.importorskip("hatchling.builders.wheel", reason="needs hatchling")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    [file] = wheel_builder.WheelBuilder(str(REPO)).build(
        directory=str(tmp_path_factory.mktemp("dist"))
    )
    return Path(file)


def test_it_contains_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = {path.relative_to(REPO) for path in (REPO / "lorakit").rglob("*") if path.is_file()}
    assert packed == {file.as_posix() for file in files if "__pycache__" not in file.parts}
    assert "lorakit/py.typed" in packed
    assert "lorakit/data/chat/templates/chatml.jinja" in packed


def test_its_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        folder = f"lorakit-{__version__}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{folder}/METADATA").decode())
        scripts = archive.read(f"{folder}/entry_points.txt").decode()
        assert f"{folder}/licenses/LICENSE" in archive.namelist()
    assert (metadata["Name"], metadata["Version"]) == ("lorakit", __version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    [(name, module, function)] = re.findall(r"^(\w+) = ([\w.]+):(\w+)$", scripts, re.MULTILINE)
    assert name == "lorakit"
    assert callable(getattr(import_module(module), function))


def test_the_source_distribution_has_what_its_tests_read(tmp_path: Path) -> None:
    from hatchling.builders.sdist import SdistBuilder

    [file] = SdistBuilder(str(REPO)).build(directory=str(tmp_path))
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("lorakit", "tests", "docs", "recipes", "configs", "scripts", ".github"):
        assert any(name.startswith(f"{folder}/") for name in names), folder
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "LICENSE"} <= names
    assert not [name for name in names if name.startswith(("models", ".venv", "runs", "data"))]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_trains_in_a_new_environment(wheel: Path, tiny_llama: Path, in_tmp: Path) -> None:
    """Needs PyPI, or a mirror of it: installs lorakit and what it depends on, without extras."""
    subprocess.run([sys.executable, "-m", "venv", "environment"], check=True)
    programs = in_tmp / "environment" / "bin"
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(
        [programs / "python", "-m", "pip", "install", "-q", wheel], env=clean, check=True
    )
    recipe = write_recipe_file(in_tmp, tiny_llama, "completion")
    lorakit = programs / "lorakit"
    for arguments in (
        ["train", str(recipe)],
        ["eval", str(recipe)],
        ["merge", tiny_llama, "run/adapter", "merged"],
    ):
        subprocess.run([lorakit, *arguments], env=clean, cwd=in_tmp, check=True)
    assert json.loads((in_tmp / "run" / "run.json").read_text())["exit_reason"] == "completed"
    assert (in_tmp / "merged" / "model.safetensors").is_file()
