"""The directory in which the documentation's blocks are checked and run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.shipped import doc_sandbox


@pytest.fixture(scope="session")
def doc_files(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_bert: Path) -> Path:
    folder = tmp_path_factory.mktemp("documentation")
    doc_sandbox.write_files(folder, tiny_llama, tiny_bert)
    return folder


@pytest.fixture
def in_doc_files(doc_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the directory, as the working directory."""
    work = shutil.copytree(doc_files, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(work)
    for key, value in doc_sandbox.VARIABLES.items():
        monkeypatch.setenv(key, value)
    return work
