"""LoRA+ in complete runs, and the message if its ratio is too high."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest

import lorakit
from lorakit.errors import TrainingError
from lorakit.recipe.sections import Recipe, TrainSection
from lorakit.training.engine.eager import EagerEngine
from lorakit.training.run import train
from tests.training.runs import (
    adapter_bytes,
    changed,
    learning,
    log_lines,
    recipe_for,
    run_json,
    write_recipe_file,
)

ADAPTER = {"r": 4, "target_modules": ["q", "v"]}
SCHEDULERS = get_args(TrainSection.model_fields["lr_scheduler"].annotation)


def plus(
    folder: Path, model: Path, adapter: dict[str, Any] | None = None, **changes: Any
) -> Recipe:
    file = write_recipe_file(folder, model, changes.pop("task", "completion"), **changes)
    values = json.loads(file.read_text())
    values["adapter"] = ADAPTER | {"method": "lora_plus"} | (adapter or {})
    file.write_text(json.dumps(values))
    return lorakit.load_recipe(file)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("task", ["completion", "glue/sst2"])
def test_ratio_1_is_lora_bit_for_bit(
    task: str, optimizer: str, tiny_llama: Path, still_bert: Path, tmp_path: Path
) -> None:
    """Including an embedding, a head, weight decay, biases, clipping and dropout."""
    model, embedding = (
        (tiny_llama, "embed_tokens") if task == "completion" else (still_bert, "word_embeddings")
    )
    settings = {
        "train__weight_decay": 0.1, "train__optimizer": optimizer, "train__max_grad_norm": 0.05,
    }  # fmt: skip
    adapter = {"target_modules": ["q", "v", embedding], "bias": "all", "lora_dropout": 0.1}
    keys = {f"adapter__{key}": value for key, value in adapter.items()}
    plain = recipe_for(tmp_path, model, task, **settings, **keys)
    ours = plus(tmp_path, model, adapter | {"loraplus_lr_ratio": 1}, task=task, **settings)
    first = train(changed(plain, train__output_dir=str(tmp_path / "lora"))).output_dir
    second = train(changed(ours, train__output_dir=str(tmp_path / "plus"))).output_dir
    assert adapter_bytes(first) == adapter_bytes(second)
    assert run_json(first)["metrics"] == run_json(second)["metrics"]
    for one, other in zip(learning(first), learning(second), strict=True):
        assert other.pop("learning_rate_B", None) == one.get("learning_rate")
        assert one == other


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_both_rates_follow_every_schedule(scheduler: str, tiny_llama: Path, tmp_path: Path) -> None:
    recipe = plus(
        tmp_path, tiny_llama, {"loraplus_lr_ratio": 4}, train__lr_scheduler=scheduler,
        train__warmup_steps=2, train__learning_rate=1e-3,
    )  # fmt: skip
    lines = log_lines(train(recipe).output_dir)
    rates = [line["learning_rate"] for line in lines]
    assert rates[0] == pytest.approx(5e-4)
    assert max(rates) == pytest.approx(1e-3)
    for line in lines:
        assert line["learning_rate_B"] == pytest.approx(4 * line["learning_rate"])
    assert (len(set(rates)) > 3) == (scheduler != "constant")


def test_auto_logs_the_largest_rate(tiny_llama: Path, tmp_path: Path) -> None:
    """q (32, 32): sqrt(8); v (16, 32): 2 * sqrt(8)."""
    recipe = plus(tmp_path, tiny_llama, {"loraplus_lr_ratio": "auto"}, train__learning_rate=1e-3)
    for line in log_lines(train(recipe).output_dir):
        want = 2 * math.sqrt(8) * line["learning_rate"]
        assert line["learning_rate_B"] == pytest.approx(want)


def test_the_written_recipe_repeats_the_run(tiny_llama: Path, tmp_path: Path) -> None:
    for ratio in (16, 1, "auto"):
        folder = tmp_path / str(ratio)
        folder.mkdir()
        recipe = plus(folder, tiny_llama, {"loraplus_lr_ratio": ratio}, train__epochs=1)
        run = train(recipe).output_dir
        again = lorakit.load_recipe(
            run / "recipe.yaml", {"train.output_dir": str(folder / "again")}
        )
        assert again.adapter == recipe.adapter
        assert adapter_bytes(train(again).output_dir) == adapter_bytes(run)


class Killed(BaseException):
    """Ends a process like SIGKILL."""


def kill_after(steps: int, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
    own = EagerEngine.step

    def until(engine: EagerEngine, *batches: Any) -> Any:
        if engine.steps == steps:
            raise Killed
        return own(engine, *batches)

    with monkeypatch.context() as patch:
        patch.setattr(EagerEngine, "step", until)
        with pytest.raises(Killed):
            train(recipe, **more)


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_a_killed_run_resumes_exactly(
    init: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = plus(
        tmp_path, tiny_llama, {"init": init, "lora_dropout": 0.1, "target_modules": ["q", "v", "up_proj"]},
        train__save_every_steps=1, train__log_every_steps=2,
    )  # fmt: skip
    whole = train(recipe).output_dir
    stopped = changed(recipe, train__output_dir=str(tmp_path / "stopped"))
    kill_after(5, stopped, monkeypatch)
    run = train(stopped, resume="auto").output_dir
    assert adapter_bytes(run) == adapter_bytes(whole)
    assert learning(run) == learning(whole)


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_8_bit_on_a_gpu(tiny_llama: Path, tmp_path: Path) -> None:
    """Ratio 1 is bit-equal to LoRA there too; a larger one trains B faster."""
    plain = recipe_for(tmp_path, tiny_llama, train__optimizer="adamw_8bit")
    first = train(changed(plain, train__output_dir=str(tmp_path / "lora"))).output_dir
    recipe = plus(tmp_path, tiny_llama, {"loraplus_lr_ratio": 1}, train__optimizer="adamw_8bit")
    assert adapter_bytes(train(recipe).output_dir) == adapter_bytes(first)
    faster = changed(recipe, adapter__loraplus_lr_ratio=8, train__output_dir=str(tmp_path / "8"))
    lines = log_lines(train(faster).output_dir)
    assert lines[0]["learning_rate_B"] == pytest.approx(8 * lines[0]["learning_rate"])
    assert adapter_bytes(tmp_path / "8") != adapter_bytes(first)


# Divergence

#: Finite, and far from where it began.
WILD = {"loraplus_lr_ratio": 1000, "target_modules": ["lm_head"]}
FAST = {
    "train__learning_rate": 1e-2, "train__lr_scheduler": "constant", "train__warmup_steps": 0,
    "train__max_grad_norm": None,
}  # fmt: skip


def warnings(text: str) -> list[str]:
    return [line for line in text.splitlines() if "at the start; likely" in line]


def test_a_growing_loss_is_reported_once_with_the_ratio(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = plus(tmp_path, tiny_llama, WILD, **FAST)
    run = train(recipe).output_dir
    losses = {line["step"]: line["loss"] for line in log_lines(run)}
    grown = [s for s, loss in losses.items() if loss > 3 * losses[1] and loss > losses[1] + 1]
    assert len(grown) > 1
    (line,) = warnings(capsys.readouterr().err)
    assert line == (
        f"step {grown[0]}: the loss is {losses[grown[0]]:.4g}, up from "
        f"{losses[1]:.4g} at the start; likely cause: train.learning_rate (0.01) too high, or "
        "adapter.loraplus_lr_ratio (1000) too high"
    )
    assert run_json(run)["exit_reason"] == "completed"


def test_a_resumed_run_reports_a_growing_loss_once(
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = plus(tmp_path, tiny_llama, WILD, **FAST, train__save_every_steps=1)
    losses = [line["loss"] for line in log_lines(train(recipe).output_dir)]
    (said,) = warnings(capsys.readouterr().err)
    at = int(said.split(":")[0].removeprefix("step "))
    assert at > 1
    for killed, before, after in ((at - 1, [], [said]), (at, [said], [])):
        again = changed(recipe, train__output_dir=str(tmp_path / f"killed-{killed}"))
        kill_after(killed, again, monkeypatch)
        assert warnings(capsys.readouterr().err) == before
        run = train(again, resume="auto").output_dir
        assert warnings(capsys.readouterr().err) == after
        assert [line["loss"] for line in log_lines(run)] == losses


def test_a_decreasing_loss_is_not_reported(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(plus(tmp_path, tiny_llama))
    assert not warnings(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("ratio", "steps", "what"),
    [
        (1e22, 8, "step 2: the gradient is not finite"),
        (1e39, 8, "step 2: the loss is inf"),
        (3e4, 4, "perplexity = inf"),  # of a loss that is finite
        (1e42, 1, "step 1: lm_head.lora_B is not finite after this step"),
    ],
)
def test_a_nonfinite_value_names_the_ratio(
    ratio: float, steps: int, what: str, tiny_llama: Path, tmp_path: Path
) -> None:
    settings = FAST | {"train__epochs": None, "train__max_steps": steps}
    recipe = plus(tmp_path, tiny_llama, WILD | {"loraplus_lr_ratio": ratio}, **settings)
    with pytest.raises(TrainingError) as caught:
        train(recipe)
    text = str(caught.value)
    assert what in text
    advice = f"adapter.loraplus_lr_ratio ({ratio:g}) too high"
    assert f"train.learning_rate (0.01) too high, or {advice}" in text
    assert run_json(tmp_path / "run")["message"] == text
