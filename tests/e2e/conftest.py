"""Fixtures of tests that run commands."""

from __future__ import annotations

import pytest

from tests.training.processes import Launcher


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    return Launcher(tmp_path_factory.mktemp("streams"))
