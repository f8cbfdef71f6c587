"""Fixtures of tests that run commands."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.training.processes import Launcher


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path_factory.mktemp("streams"))
    yield launcher
    launcher.close()
