"""scripts/papers.py: has every experiment, and prints the paper's figures beside ours."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lorakit.api import SweepResult, load_sweep
from lorakit.sweeps.table import write_tables

REPO = Path(__file__).resolve().parents[2]
FILES = {path.stem: path for path in (REPO / "recipes" / "papers").glob("*.yaml")}
BASES = {"encoder", "causal"}


@pytest.fixture(scope="module")
def papers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("papers", REPO / "scripts" / "papers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def results(
    name: str, folder: Path, scores: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Write what a sweep writes, with the ``scores`` of members, and 0.5 for the others."""
    monkeypatch.chdir(REPO)
    sweep = load_sweep(FILES[name])
    result = SweepResult(folder, "accuracy", sweep.members)
    for member in result.members:
        member.status = "completed"
        member.metrics = {"accuracy": scores.get(member.name, 0.5)}
        member.trainable_parameters, member.seconds = 1234, 2.0
    result.write()
    write_tables(result)


def test_every_experiment_is_there(papers: ModuleType) -> None:
    assert set(papers.PAPERS) == set(FILES) - BASES


@pytest.mark.parametrize("name", sorted(set(FILES) - BASES))
def test_a_quick_check_changes_only_what_the_grid_does_not(
    name: str, papers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPO)
    file = FILES[name]
    recipe = Path(load_sweep(file).section.recipe).stem
    load_sweep(file, overrides=papers.settings(file, recipe))


def test_the_papers_figures_are_beside_ours(
    papers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {"r=1,target_modules=q,seed=1": 0.6, "r=1,target_modules=q,seed=2": 0.7}
    results("lora-table6", tmp_path, scores, monkeypatch)
    rows = papers.sweep_table(tmp_path / "table.csv", papers.PAPERS["lora-table6"].values)
    assert rows[0] == [
        "r", "target_modules", "accuracy", "parameters", "seconds", "GPT-3, WikiSQL", "GPT-3, MNLI"
    ]  # fmt: skip
    assert rows[1] == ["1", "q", "0.6500 ± 0.0707", "1,234", "2.0", "68.8", "90.7"]
    assert rows[-1] == ["64", "q+k+v+o", "0.5000 ± 0.0000", "1,234", "2.0", "73.9", "91.4"]
    assert all("-" not in row for row in rows)


def test_a_table_without_figures_of_a_paper(
    papers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results("lora-table7", tmp_path, {}, monkeypatch)
    assert papers.sweep_table(tmp_path / "table.csv", {}) == [
        ["r", "accuracy", "parameters", "seconds"],
        ["4", "0.5000", "1,234", "2.0"],
        ["64", "0.5000", "1,234", "2.0"],
    ]


def test_the_smallest_d_with_nine_tenths_of_the_score(
    papers: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reached = {"d=300,learning_rate=0.001": 0.73, "d=3000,learning_rate=0.005": 0.8}
    results("intrinsic-dimension", tmp_path, {"full": 0.8, **reached}, monkeypatch)
    papers.d_90(tmp_path)
    assert capsys.readouterr().out.strip() == "90% of full: 0.7200; d_90: 300"
