"""Golden runs reproduce the recorded results (see the package's docstring)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.golden.commands import GoldenRun, execute
from tests.golden.data import write_data
from tests.golden.models import write_models
from tests.golden.record import EXPECTED
from tests.golden.results import Results, differences, exact_differences
from tests.golden.runs import RUNS

_EXACT = os.environ.get("LORAKIT_GOLDEN_EXACT")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    write_models(folder / "models")
    write_data(folder / "data")
    return folder


@pytest.mark.parametrize("golden", RUNS, ids=lambda golden: golden.name)
def test_golden_run(golden: GoldenRun, workspace: Path) -> None:
    if _EXACT is None and not golden.portable:
        pytest.skip("depends on the processor: compared with LORAKIT_GOLDEN_EXACT only")
    exact = None if _EXACT is None else Results.load_full(Path(_EXACT), golden.name)
    results = execute(golden, workspace)
    if exact is not None:
        found = exact_differences(results, exact)
    else:
        expected = json.loads((EXPECTED / f"{golden.name}.json").read_text(encoding="utf-8"))
        found = differences(results.summary(), expected, golden.tensor_tolerance)
    assert not found, f"{golden.name}: {len(found)} differences\n" + "\n".join(found[:40])


def test_every_expected_file_belongs_to_a_run() -> None:
    names = {golden.name for golden in RUNS}
    assert len(names) == len(RUNS)
    recorded = {file.stem for file in EXPECTED.iterdir()}
    assert recorded == {golden.name for golden in RUNS if golden.portable}
