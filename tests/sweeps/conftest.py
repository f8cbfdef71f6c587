from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.runs import without_dropout


@pytest.fixture(scope="session")
def still_bert(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the tiny encoder without dropout."""
    return without_dropout(tiny_bert, tmp_path_factory.mktemp("still"))
