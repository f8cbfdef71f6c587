"""The registry names the file of a method or task that cannot be listed."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from lorakit import registry
from lorakit.errors import UserError


@pytest.mark.parametrize(
    ("package", "text", "message"),
    [
        ("methods", "class Nameless: ...\nMETHOD = Nameless()\n", "METHOD has no name"),
        ("tasks", "class Nameless:\n    names = ()\nTASK = Nameless()\n", "TASK has no names"),
    ],
)
def test_a_module_without_a_name(
    package: str, text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"nameless_{package}.py"
    file.write_text(text)
    folder = importlib.import_module(f"lorakit.{package}")
    monkeypatch.setattr(folder, "__path__", [*folder.__path__, str(tmp_path)])
    find = getattr(registry, package)
    find.cache_clear()
    try:
        with pytest.raises(UserError) as caught:
            find()
    finally:
        monkeypatch.undo()
        find.cache_clear()
    assert str(caught.value) == f"{file}: {message}"
