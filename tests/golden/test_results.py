"""The comparison of golden results distinguishes changed results from rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden.results import Results, differences, exact_differences


def results(**changes: Any) -> Results:
    found = Results()
    found.add("train", {"loss": 2.5, "steps": 4, "kept": [True, False], "text": "a b"} | changes)
    found.tensors["train/lora_A"] = torch.linspace(-1, 2, 64).reshape(4, 16)
    return found


def changed_tensor(tensor: torch.Tensor) -> Results:
    found = results()
    found.tensors["train/lora_A"] = tensor
    return found


def test_equal_results_and_rounding_pass() -> None:
    A = results().tensors["train/lora_A"]
    rounded = changed_tensor(A * (1 + 1e-7))
    rounded.values["train/loss"] = 2.5 * (1 + 1e-7)
    assert differences(results().summary(), results().summary()) == []
    assert differences(rounded.summary(), results().summary()) == []
    assert len(exact_differences(rounded, results())) == 2, "to the bit they differ"


@pytest.mark.parametrize(
    "change",
    [{"loss": 2.50002}, {"steps": 5}, {"kept": [False, True]}, {"text": "a c"}, {"more": 1}],
)
def test_a_changed_value_fails(change: dict[str, Any]) -> None:
    for compared in (
        differences(results(**change).summary(), results().summary()),
        exact_differences(results(**change), results()),
    ):
        assert compared


@pytest.mark.parametrize(
    "change",
    [lambda A: A * 1.00001, lambda A: A.flip(0), lambda A: A.t(), torch.Tensor.double,
     lambda A: A + 1e-4 * (torch.arange(64) == 7).view(4, 16)],
    ids=["scaled", "rows in another order", "transposed", "another dtype", "one element"],
)  # fmt: skip
def test_a_changed_tensor_fails(change: Any) -> None:
    found = changed_tensor(change(results().tensors["train/lora_A"]))
    assert differences(found.summary(), results().summary())
    assert exact_differences(found, results())


def test_full_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    results(nan=float("nan"), none=None).save_full(tmp_path, "run")
    again = Results.load_full(tmp_path, "run")
    assert exact_differences(again, results(nan=float("nan"), none=None)) == []
