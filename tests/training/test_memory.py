"""A step that needs more memory than the device has."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from lorakit.errors import TrainingError
from lorakit.training.engine.eager import EagerEngine
from lorakit.training.memory import (
    evaluation_memory_advice,
    held_by_others,
    memory_advice,
    out_of_memory,
)
from lorakit.training.run import train
from tests.training.engines import built
from tests.training.runs import recipe_for, run_json


def test_the_message_has_the_largest_batch(tiny_llama: Path, tmp_path: Path) -> None:
    run = built(recipe_for(tmp_path, tiny_llama))
    batches = run.loader.take(0).micro_batches
    rows, length = batches[0].input_ids.shape
    message = out_of_memory(run.prepared, 3, batches)
    assert message.startswith(f"step 3: out of memory on cpu with a batch of {rows} x {length} ")
    assert message.endswith("; or lower task.max_length (128)")


@pytest.mark.parametrize(
    ("changes", "first", "absent"),
    [
        ({}, "set train.gradient_checkpointing: true", "offload"),
        ({"train__gradient_checkpointing": True}, "set train.gradient_checkpointing: off", "true"),
        (
            {"train__gradient_checkpointing": "offload"},
            "lower train.per_device_batch_size",
            "set t",
        ),
        ({"train__max_tokens_per_batch": 512}, "set train.gradient", "per_device_batch_size"),
        ({"train__per_device_batch_size": 1}, "set train.gradient", "per_device_batch_size"),
        ({"model__base_precision": "nf4"}, "set train.gradient", "base_precision"),
    ],
)
def test_the_advice_fits_the_recipe(
    changes: dict[str, Any], first: str, absent: str, tiny_llama: Path, tmp_path: Path
) -> None:
    advice = memory_advice(recipe_for(tmp_path, tiny_llama, **changes))
    assert advice[0].startswith(first)
    assert not any(absent in line for line in advice)


@pytest.mark.parametrize(
    ("reserved_gib", "text"),
    [(4, "; other processes hold 130.5 GiB: end them or use another GPU"), (134, ""), (133.5, "")],
)
def test_memory_that_other_processes_hold_is_named(reserved_gib: float, text: str) -> None:
    gib = 2**30
    assert held_by_others(gib // 2, 135 * gib, int(reserved_gib * gib)) == text


def test_an_evaluation_that_does_not_fit_loses_no_step(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"train__eval_every_steps": 3, "train__save_every_steps": 9}
    with monkeypatch.context() as patch:
        patch.setattr("lorakit.training.control.evaluate_model", no_memory)
        with pytest.raises(TrainingError) as failed:
            train(recipe_for(tmp_path, tiny_llama, **keys))
    text = str(failed.value)
    lower = "lower train.per_device_eval_batch_size (8); saved "
    assert text.startswith(f"step 3: out of memory on cpu in an evaluation; {lower}")
    assert text.endswith("step-3; resume with --resume auto")
    smaller = recipe_for(tmp_path, tiny_llama, **keys, train__per_device_eval_batch_size=2)
    resumed = train(smaller, resume="auto")
    whole = train(recipe_for(tmp_path, tiny_llama, **keys, train__output_dir=f"{tmp_path}/whole"))
    files = [run.adapter_dir / "adapter_model.safetensors" for run in (resumed, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("rows", "measures_loss", "generates", "advice"),
    [
        (4, True, False, ["lower train.per_device_eval_batch_size (8)"]),
        (4, False, True, ["lower task.generation_batch_size (4)"]),
        (None, True, True, ["lower train.per_device_eval_batch_size (8)",
                            "set task.generation_batch_size, such as to 1"]),
    ],
)  # fmt: skip
def test_the_advice_is_on_what_the_evaluation_does(
    tiny_llama: Path, tmp_path: Path,
    rows: int | None, measures_loss: bool, generates: bool, advice: list[str],
) -> None:  # fmt: skip
    recipe = recipe_for(tmp_path, tiny_llama, "completion", task__generation_batch_size=rows)
    assert evaluation_memory_advice(recipe, measures_loss, generates) == "; or ".join(advice)


def no_memory(*_args: Any, **_options: Any) -> NoReturn:
    raise torch.OutOfMemoryError("no memory left")


def test_the_run_ends_with_the_last_good_checkpoint(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = EagerEngine.step

    def step(engine: EagerEngine, *batches: Any) -> Any:
        if engine.steps == 5:
            raise torch.OutOfMemoryError("no memory left")
        return own(engine, *batches)

    monkeypatch.setattr(EagerEngine, "step", step)
    with pytest.raises(TrainingError, match=r"step 6: out of memory on cpu .*step-4$"):
        train(recipe_for(tmp_path, tiny_llama, train__save_every_steps=4))
    assert run_json(tmp_path / "run")["exit_reason"] == "failed"
    assert not run_json(tmp_path / "run")["diverged"]
