"""Divergence: numbers that are not finite, and losses that explode but stay finite."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.cli.main import run
from lorakit.training.divergence import (
    AsyncScalars,
    LossHistory,
    StepScalars,
    divergence_cause,
    has_diverged,
    loss_growth,
    nonfinite_step,
    nonfinite_weight,
)
from lorakit.training.engine import StepResult
from lorakit.training.run import train
from tests.training.runs import log_lines, recipe_for, run_json, write_recipe_file, write_rows

CAUSE = divergence_cause(0.25, None)


def values(losses: list[float], norms: list[float]) -> StepScalars:
    return StepScalars({"step": 20, "learning_rate": 0.25}, losses, norms)


def test_finite_steps() -> None:
    assert nonfinite_step(values([1.0, 2.0], [3.0, 1e9]), scales_loss=False, cause=CAUSE) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_first_nonfinite_step_and_the_rate_are_named(bad: float) -> None:
    message = nonfinite_step(
        values([1.0, bad, math.nan], [1.0, 1.0, 1.0]), scales_loss=False, cause=CAUSE
    )
    assert message is not None
    assert message.startswith(f"step 19: the loss is {bad}; ")
    assert "train.learning_rate (0.25)" in message


def test_a_gradient_that_grew_is_the_cause() -> None:
    message = nonfinite_step(
        values([1.0, math.nan], [5e4, math.nan]), scales_loss=False, cause=CAUSE
    )
    assert message is not None
    assert "the gradient norm had grown to 5e+04" in message


def test_a_gradient_that_overflows_is_skipped_in_float16_only() -> None:
    overflown = values([1.0], [math.inf])
    assert nonfinite_step(overflown, scales_loss=True, cause=CAUSE) is None
    message = nonfinite_step(overflown, scales_loss=False, cause=CAUSE)
    assert message is not None
    assert "step 20: the gradient is not finite" in message
    assert nonfinite_step(values([math.nan], [1.0]), scales_loss=True, cause=CAUSE) is not None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nonfinite_weights(dtype: torch.dtype, bad: float) -> None:
    weights = {name: torch.ones(2, 3, dtype=dtype) for name in "abc"} | {
        "empty": torch.zeros(0, 3, dtype=dtype),
        "scalar": torch.zeros((), dtype=torch.float32),
        "count": torch.ones(2, dtype=torch.int64),
    }
    weights["large"] = torch.full((2,), torch.finfo(dtype).max, dtype=dtype)
    assert nonfinite_weight(weights) is None
    weights["b"][1, 0] = bad
    assert nonfinite_weight(weights) == "b"
    assert nonfinite_weight({"empty": weights["empty"]}) is None


@pytest.mark.parametrize(
    ("first", "loss", "grown"),
    [
        (2.0, 6.1, True),
        (2.0, 6.0, False),  # not more than 3 times
        (0.1, 1.0, False),  # a small loss that swings
        (0.1, 1.2, True),
        (2.0, 1.0, False),
        (0.0, 1.5, True),
    ],
)
def test_a_finite_loss_far_above_the_first(first: float, loss: float, grown: bool) -> None:
    message = loss_growth(values([loss - 0.5, loss + 0.5], [1.0, 1.0]), first, "too high")
    assert (message is not None) == grown
    if message is not None:
        assert message == (
            f"step 20: the loss is {loss:.4g}, up from {first:.4g} at the start; likely cause: too high"
        )


def test_the_advice_of_the_method_is_added_to_the_cause() -> None:
    cause = divergence_cause(0.25, "adapter.x (3) too high")
    told = (
        nonfinite_step(values([math.nan], [1.0]), False, cause),
        nonfinite_step(values([1.0, math.nan], [5e4, 1.0]), False, cause),
    )
    for message in told:
        assert message is not None
        assert "too high, or adapter.x (3) too high" in message


def test_scalars_arrive_a_log_line_at_a_time() -> None:
    def add(loss: float, norm: float) -> None:
        scalars.add(StepResult(torch.tensor(loss), torch.tensor(norm), (), 1))

    scalars = AsyncScalars()
    scalars.stage({"step": 0})
    assert scalars.arrived() == [], "no step, no line"
    for step in range(3):
        add(float(step), 10.0 + step)
    assert scalars.window() == [[0.0, 10.0], [1.0, 11.0], [2.0, 12.0]]
    scalars.stage({"step": 3})
    assert scalars.window() == []
    add(0.1, 1.0)
    (line,) = scalars.arrived()
    assert line.known == {"step": 3}
    assert line.losses == [0.0, 1.0, 2.0]
    assert line.grad_norms == [10.0, 11.0, 12.0]
    again = AsyncScalars()
    again.restore_window(scalars.window(), torch.device("cpu"))
    assert again.window() == scalars.window()


def history(*losses: float) -> LossHistory:
    made = LossHistory()
    for loss in losses:
        made.add([loss])
    return made


@pytest.mark.parametrize(
    ("losses", "again", "expected"),
    [
        ([3.0, 322.0, *[21.0] * 10], 20.0, True),
        ([3.0, 322.0, *[21.0] * 10], None, True),
        ([3.0, *[8.0] * 10], 7.5, True),  # never a peak, but destroyed
        ([0.69, 322.0, *[0.7] * 10], 0.69, True),  # a classifier that says one thing only
        ([3.0, 322.0, *[0.5] * 10], 0.4, False),  # it recovered
        ([3.0, *[2.5] * 10], 2.4, False),
        ([3.0, *[3.4] * 10], 3.3, False),  # a little worse is no explosion
        # The first rows were easy, the last are not; what was easy still is.
        ([0.2, 4.0, *[2.5] * 10], 0.2, False),
        ([1e-4, *[0.3] * 10], 0.2, False),  # starts near zero
        # The first rows are unlucky in the end, all others fine.
        ([0.2, *[0.3] * 10], 1.9, False),
        ([2.0, *[1.0] * 5, 11.9, *[0.9] * 10], 0.9, False),  # one bad batch
        ([2.0, *[1.0] * 10], float("inf"), False),
    ],
)
def test_divergence_rule(losses: list[float], again: float | None, expected: bool) -> None:
    assert has_diverged(history(*losses), again) == expected


def test_the_history_is_of_steps_and_not_of_lines() -> None:
    made = LossHistory()
    made.add([1.0, 9.0, *[2.0] * 9])
    made.add([4.0])
    assert (made.start, made.peak, made.last) == (1.0, 9.0, [*[2.0] * 9, 4.0])
    assert not has_diverged(LossHistory(), 5.0)


def trained(folder: Path, model: Path, **changes: Any) -> tuple[int, Path]:
    file = write_recipe_file(folder, model, "glue/sst2", **changes)
    return run(["train", str(file), "--json"]), folder / "run"


def test_a_rate_of_50_is_reported_as_divergence(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, output = trained(tmp_path, tiny_bert, train__learning_rate=50.0)
    out, err = capsys.readouterr()
    assert code == 0
    last = err.splitlines()[-1]
    assert last.startswith("warning: the run diverged: the loss was 0.69")
    assert last.endswith("likely cause: train.learning_rate (50) too high")
    assert json.loads(out)["diverged"] is True
    record = run_json(output)
    assert (record["diverged"], record["exit_reason"]) == (True, "completed")
    assert "**The training diverged**" in (output / "adapter" / "README.md").read_text()
    # The finished run still knows.
    assert run(["train", str(tmp_path / "recipe.yaml"), "--resume", "auto", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["diverged"] is True


def test_what_happened_before_a_checkpoint_is_remembered(tiny_bert: Path, tmp_path: Path) -> None:
    changes = {"train__learning_rate": 50.0, "train__save_every_steps": 6, "train__epochs": 2}
    recipe = recipe_for(tmp_path, tiny_bert, "glue/sst2", **changes)
    whole: list[str] = []
    train(recipe, say=whole.append)
    peak = max(line["loss"] for line in log_lines(tmp_path / "run"))
    said: list[str] = []
    result = train(recipe, str(tmp_path / "run" / "checkpoints" / "step-6"), said.append)
    assert result.diverged
    assert said[-1] == whole[-1]
    assert f"{peak:.4g} at its peak" in said[-1]


@pytest.mark.parametrize(
    "changes",
    [
        {"train__learning_rate": 1e-3},
        # One row per step, and labels that cannot be learned.
        {"train__learning_rate": 1e-2, "train__per_device_batch_size": 1, "train__epochs": 3},
        {"train__learning_rate": 1e-2, "train__lr_scheduler": "cosine_with_restarts"},
        {"adapter__method": "adalora", "adapter__target_r": 2, "train__learning_rate": 1e-2},
    ],
    ids=["usual", "noisy", "restarts", "adalora"],
)
def test_an_ordinary_run_did_not_diverge(
    changes: dict[str, Any], tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_recipe_file(tmp_path, tiny_bert, "glue/sst2", **changes)
    if "adapter__method" in changes:  # AdaLoRA has no r
        values = json.loads(file.read_text())
        del values["adapter"]["r"]
        file.write_text(json.dumps(values))
    rows = [{"sentence": "one two"[: n % 7 + 1], "label": (n * n // 3) % 2} for n in range(30)]
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    assert run(["train", str(file)]) == 0
    assert "diverged" not in capsys.readouterr().err
    assert run_json(tmp_path / "run")["diverged"] is False
    assert "diverged" not in (tmp_path / "run" / "adapter" / "README.md").read_text()
