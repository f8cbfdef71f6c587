"""``per_device_batch_size: auto`` on a GPU: what is chosen fits, and does not affect the run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit
from lorakit.errors import UserError
from tests.training.runs import (
    WORDS,
    adapter_bytes,
    log_lines,
    recipe_for,
    run_json,
    write_rows,
)

pytestmark = pytest.mark.gpu

ROWS = 64


@pytest.fixture
def memory() -> Iterator[Any]:
    """Limit the memory of this process to a number of MiB. Rows of fewer than 128 tokens have
    deterministic kernels anyway."""
    total = torch.cuda.get_device_properties(0).total_memory
    yield lambda mib: torch.cuda.set_per_process_memory_fraction(mib * 2**20 / total)
    torch.cuda.set_per_process_memory_fraction(1.0)


def train(folder: Path, model: Path, words: int, **changes: Any) -> tuple[Path, list[str]]:
    """Train on rows of up to this many words."""
    said: list[str] = []
    text = WORDS * (words // len(WORDS) + 1)
    rows = [
        {"prompt": "count", "completion": " " + " ".join(text[i % 20 : words])}
        for i in range(2 * ROWS)
    ]
    write_rows(folder / "data" / "train.jsonl", rows)
    write_rows(folder / "data" / "validation.jsonl", rows[:8])
    settings = {
        "model__dtype": "bfloat16", "adapter__lora_dropout": 0.1, "train__epochs": 1,
        "task__max_length": 2048, "train__per_device_eval_batch_size": 8,
    }  # fmt: skip
    run = lorakit.train(recipe_for(folder, model, **(settings | changes)), say=said.append)
    return run.output_dir, said


@pytest.mark.parametrize(
    "changes", [{}, {"train__compile": False}, {"task__packing": True, "task__max_length": 128}]
)
def test_the_choice_fits_and_gives_the_same_adapter(
    changes: dict[str, Any], smollm2: Path, tmp_path: Path, memory: Any
) -> None:
    memory(4000)
    automatic = {"train__per_device_batch_size": "auto", "train__rows_per_step": ROWS}
    run, said = train(tmp_path / "auto", smollm2, 90, **changes, **automatic)
    size = run_json(run)["per_device_batch_size"]
    [line] = [text for text in said if text.startswith("train.per_device_batch_size = ")]
    assert line.startswith(f"train.per_device_batch_size = {size}: the largest that fits")
    assert ROWS % size == 0
    assert 1 <= size < ROWS, line
    numbers = {
        "train__per_device_batch_size": size,
        "train__gradient_accumulation_steps": ROWS // size,
    }
    other, _ = train(tmp_path / "numbers", smollm2, 90, **changes, **numbers)
    assert [x["loss"] for x in log_lines(run)] == [x["loss"] for x in log_lines(other)]
    assert adapter_bytes(run) == adapter_bytes(other)


def test_no_memory_for_a_row(smollm2: Path, tmp_path: Path, memory: Any) -> None:
    memory(600)
    automatic = {"train__per_device_batch_size": "auto", "train__rows_per_step": ROWS}
    with pytest.raises(UserError, match=r'"auto": a single row does not fit on cuda.*; set train'):
        train(tmp_path, smollm2, 1900, **automatic)
    assert not (tmp_path / "run").exists()
