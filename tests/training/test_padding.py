"""The lengths that batches are padded to on the CPU."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lorakit.training.run import start_unwritten
from tests.training.runs import recipe_for


@pytest.mark.parametrize(
    ("dtype", "max_length", "multiple"),
    [("float32", 256, 1), ("bfloat16", 256, 4), ("bfloat16", 512, 8)],
)
def test_lengths_are_multiples(
    dtype: str, max_length: int, multiple: int, tiny_llama: Path, tmp_path: Path
) -> None:
    changes = {"model__dtype": dtype, "task__max_length": max_length}
    recipe = recipe_for(tmp_path, tiny_llama, train__per_device_batch_size=1, **changes)
    loader = start_unwritten(recipe, lambda line: None).loader
    lengths = [loader.take(step).micro_batches[0].input_ids.shape[1] for step in range(30)]
    assert math.gcd(*lengths) == multiple
