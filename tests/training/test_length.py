"""A run that resumes with another length than it started with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.cli.main import run
from lorakit.errors import UserError
from lorakit.training.run import train
from tests.training.runs import (
    adapter_bytes,
    changed,
    learning,
    recipe_for,
    run_json,
    tree,
    write_recipe_file,
)

CONSTANT = {"train__lr_scheduler": "constant", "train__warmup_steps": 2}


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("adapter", [{}, {"adapter__method": "lora_plus"}], ids=str)
def test_more_epochs_as_if_from_the_start(
    family: str, adapter: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """With dropout in the encoder, weights, metrics and the best step are the same."""
    model: Path = request.getfixturevalue(f"tiny_{family}")
    task = "completion" if family == "llama" else "glue/sst2"
    recipe = recipe_for(tmp_path, model, task, **CONSTANT, **adapter)
    longer, said = changed(recipe, train__epochs=3.5), list[str]()
    train(recipe)
    train(longer, "auto", said.append)
    assert "continuing with 14 steps instead of 8, as a run of 14 steps from the start" in said
    train(changed(longer, train__output_dir=str(tmp_path / "whole")))
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    assert learning(tmp_path / "run") == learning(tmp_path / "whole")
    for key in ("steps", "best_step", "metrics", "trained_tokens"):
        assert run_json(tmp_path / "run")[key] == run_json(tmp_path / "whole")[key]


def test_steps_instead_of_epochs(tiny_llama: Path, tmp_path: Path) -> None:
    """inverse_sqrt depends on the warmup only. The end of the first part is logged and evaluated,
    which does not change the weights."""
    recipe = recipe_for(
        tmp_path, tiny_llama, train__lr_scheduler="inverse_sqrt", train__warmup_steps=2,
        train__epochs=1.5, train__metric_for_best_model="loss",
    )  # fmt: skip
    train(recipe)
    longer = changed(recipe, train__epochs=None, train__max_steps=12)
    train(longer, str(tmp_path / "run" / "checkpoints" / "step-6"))
    train(changed(longer, train__output_dir=str(tmp_path / "whole")))
    run_lines, whole_lines = (
        {line["step"]: line for line in learning(tmp_path / name) if "loss" in line}
        for name in ("run", "whole")
    )
    assert run_lines == whole_lines
    with pytest.raises(UserError, match=r"train\.max_steps = 11: 11 steps, but .* taken 12; "):
        train(changed(longer, train__max_steps=11), "auto")
    assert run_json(tmp_path / "run")["exit_reason"] == "completed"


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (
            {"train.lr_scheduler": "cosine", "train.warmup_steps": 1},
            r"used different learning rates from step 3 on \(cosine\)",
        ),
        (
            {"train.lr_scheduler": "constant", "train.warmup_ratio": 0.25},
            r"used different learning rates from step 2 on \(constant, warmup 6 steps instead of 2\)",
        ),
        (
            {
                "adapter": {"method": "adalora", "target_modules": ["q"]},
                "train.lr_scheduler": "constant", "train.warmup_steps": 1,
            },
            "had different adalora phases",
        ),
    ],
    ids=["cosine", "warmup", "adalora"],
)  # fmt: skip
def test_another_schedule_is_refused(
    overrides: dict[str, Any], reason: str, tiny_llama: Path, tmp_path: Path
) -> None:
    file = write_recipe_file(tmp_path, tiny_llama, "completion")
    recipe = lorakit.load_recipe(file, overrides)
    train(recipe)
    before = tree(tmp_path / "run")
    message = (
        rf"train\.epochs = 6\.0: the run in .* was started with 8 steps; with 24 it would have "
        rf"{reason}; hint: start a new run with adapter\.init_from: .*run/adapter"
    )
    with pytest.raises(UserError, match=message):
        train(changed(recipe, train__epochs=6.0), "auto")
    assert tree(tmp_path / "run") == before
    assert train(recipe, "auto").steps == 8  # the same length: complete


def test_a_run_that_stopped_early_is_complete(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_for(
        tmp_path, tiny_llama, **CONSTANT, train__early_stopping_patience=1,
        train__learning_rate=0.5, train__eval_every_steps=1,
    )  # fmt: skip
    steps = train(recipe).steps
    assert steps < 8
    said: list[str] = []
    before = tree(tmp_path / "run")
    assert train(changed(recipe, train__epochs=9.0), "auto", said.append).steps == steps
    assert f"the run stopped early, at step {steps}; more steps would not change that" in said
    assert tree(tmp_path / "run") == before


def test_the_error_names_the_line(
    tiny_llama: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(write_recipe_file(in_tmp, tiny_llama, "completion", train__epochs=1))
    assert run(["train", file]) == 0
    capsys.readouterr()
    assert run(["train", file, "--resume", "auto", "--set", "train.epochs=2"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: --set: train.epochs = 2")
