"""Adapters of stacked experts in two processes, with copies of the base and with its shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.processes import launch
from tests.e2e.shared_runs import (
    ADALORA,
    FSDP,
    LORA,
    TRAIN,
    assert_equal,
    split_over,
    train_alone,
)
from tests.hybrids import saved_hybrid

RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": (LORA | {"target_modules": ["q", "experts"]}, {"train__gradient_checkpointing": True}),
    "adalora": (ADALORA | {"target_parameters": ["experts.down_proj"]}, {}),
}


@pytest.mark.slow
def test_two_processes_equal_one(tiny_llama: Path, tiny_bert: Path, tmp_path: Path) -> None:
    model = saved_hybrid("mixtral", tiny_llama, tmp_path / "mixtral")
    (tmp_path / "alone").mkdir()
    alone = train_alone(tmp_path / "alone", model, tiny_bert, RUNS)
    for name, variables in (("ddp", {}), ("fsdp", FSDP)):
        (tmp_path / name).mkdir()
        shared = {run: split_over(2, file, tmp_path / name / run) for run, file in alone.items()}
        for code, _, err in launch(2, "-c", TRAIN, *shared.values(), **variables):
            assert code == 0, err
        for run, file in alone.items():
            assert_equal(file, shared[run])
