"""Recipes are validated, names listed and help printed without loading a tensor library."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import lorakit

REPO = Path(__file__).resolve().parents[2]
LIGHT = ("cli", "methods", "recipe", "tasks")
HEAVY = ("accelerate", "datasets", "numpy", "pandas", "scipy", "sklearn", "torch", "transformers")


def modules_of(package: str) -> list[str]:
    folder = Path(lorakit.__file__).parent / package
    found = pkgutil.walk_packages([str(folder)], f"lorakit.{package}.")
    # The layers of methods, which are imported when a model is adapted.
    return [info.name for info in found if not info.name.endswith("_layer")]


@pytest.mark.parametrize("package", LIGHT)
def test_package_imports_nothing_heavy(package: str) -> None:
    names = modules_of(package)
    assert names
    code = (
        "import importlib, json, sys\n"
        f"for name in {['lorakit', 'lorakit.api', 'lorakit.registry', *names]!r}: importlib.import_module(name)\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO
    )
    assert json.loads(done.stdout) == []
