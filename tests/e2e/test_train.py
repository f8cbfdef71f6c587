"""`lorakit train`: what it writes, what it prints, and how it fails."""

from __future__ import annotations

import json
import os
import pty
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import lorakit
from lorakit.cli.main import run
from tests.tasks.wikisql_files import ROWS, TABLE
from tests.training.runs import (
    adapter_bytes,
    checkpoint_names,
    completion_rows,
    eval_lines,
    log_lines,
    metrics_lines,
    recipe_for,
    run_json,
    tree,
    write_recipe_file,
    write_rows,
)

RUN_KEYS = {
    "versions", "git_commit", "hardware", "seed", "data", "adapted_modules",
    "trainable_parameters", "total_parameters", "steps", "trained_tokens", "seconds",
    "peak_memory_bytes", "metrics", "exit_reason",
}  # fmt: skip
LINE_KEYS = {
    "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second",
    "peak_memory_bytes",
}  # fmt: skip
STEPS = {"train__epochs": None, "train__max_steps": 4}
#: Weights that fly apart within a few steps.
ABSURD = {
    "train__learning_rate": 1e20,
    "train__lr_scheduler": "constant",
    "train__warmup_steps": 0,
    "train__max_grad_norm": None,
}
Trained = Callable[..., Path]


@pytest.fixture
def trained(tiny_llama: Path, tiny_bert: Path, tmp_path: Path) -> Trained:
    """Train a changed recipe on the command line and return the output directory."""

    def train(task: str = "completion", *options: str, code: int = 0, **changes: Any) -> Path:
        model = tiny_llama if task in ("completion", "wikisql") else tiny_bert
        recipe = write_recipe_file(tmp_path, model, task, **changes)
        assert run(["train", str(recipe), *options]) == code
        return tmp_path / "run"

    return train


def refused(capsys: pytest.CaptureFixture[str], recipe: Path, *options: str) -> str:
    """Assert exit code 2, one line of error and nothing written; return the line."""
    before = tree(recipe.parent)
    capsys.readouterr()
    code = run(["train", str(recipe), *options])
    out, err = capsys.readouterr()
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    assert tree(recipe.parent) == before
    (line,) = [x for x in err.splitlines() if x.startswith("error: ")]
    return line


# What is written


def test_the_output_directory(trained: Trained, tiny_llama: Path, tmp_path: Path) -> None:
    output = trained(train__epochs=3, train__eval_every_steps=5)
    assert sorted(path.name for path in output.iterdir()) == [
        "adapter", "checkpoints", "metrics.jsonl", "recipe.yaml", "run.json",
    ]  # fmt: skip
    record = run_json(output)
    assert record.keys() >= RUN_KEYS
    assert record["exit_reason"] == "completed"
    assert record["steps"] == 12
    assert record["seed"] == 7
    assert record["seconds"] > 0
    assert record["peak_memory_bytes"] > 1e6
    assert {name: data["rows"] for name, data in record["data"].items()} == {
        "train": 30, "validation": 8,
    }  # fmt: skip
    assert all(len(data["fingerprint"]) == 64 for data in record["data"].values())
    assert record["versions"]["torch"]
    assert record["hardware"]["device"] == "cpu"
    modules = record["adapted_modules"]
    assert [module["name"] for module in modules] == [
        f"model.layers.{layer}.self_attn.{role}_proj" for layer in (0, 1) for role in "qv"
    ]
    assert modules[1] == {"name": modules[1]["name"], "shape": [16, 32], "r": 4}
    assert record["trainable_parameters"] == 2 * (4 * (32 + 32) + 4 * (32 + 16))
    base = AutoModelForCausalLM.from_pretrained(tiny_llama).num_parameters()
    assert record["total_parameters"] == base + record["trainable_parameters"]
    assert record["trained_tokens"] == 3 * sum(
        len(row["completion"].encode()) + 1 for row in completion_rows(30)
    )


def test_metrics_lines(trained: Trained) -> None:
    output = trained(train__epochs=3, train__eval_every_steps=5, train__log_every_steps=2)
    lines = metrics_lines(output)
    logs, evaluations = log_lines(output), eval_lines(output)
    assert len(lines) == len(logs) + len(evaluations)
    assert [line["step"] for line in logs] == [2, 4, 6, 8, 10, 12]
    assert all(line.keys() == LINE_KEYS for line in logs)
    assert [line["epoch"] for line in logs] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert logs[-1]["learning_rate"] == 0.0
    assert [line["step"] for line in evaluations] == [5, 10, 12]
    assert all(line.keys() == {"step", "eval"} for line in evaluations)
    assert all(line["eval"].keys() == {"loss", "perplexity"} for line in evaluations)
    assert run_json(output)["metrics"] == evaluations[-1]["eval"]


def test_recipe_yaml_repeats_the_run(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = trained(adapter__lora_dropout=0.1, train__seed=11)
    written = lorakit.load_recipe(output / "recipe.yaml")
    assert written == lorakit.load_recipe(tmp_path / "recipe.yaml")
    again = tmp_path / "again"
    assert run(["train", str(output / "recipe.yaml"), "--output-dir", str(again)]) == 0
    assert adapter_bytes(again) == adapter_bytes(output)
    assert run_json(again)["metrics"] == run_json(output)["metrics"]
    capsys.readouterr()
    assert run(["train", str(output / "recipe.yaml"), "--output-dir", str(again)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --output-dir: train.output_dir = ")
    assert '": contains a finished run; choose' in line


def test_recipe_yaml_holds_the_labels_that_the_data_gave(
    trained: Trained, tiny_bert: Path, tmp_path: Path
) -> None:
    rows = [{"text": f"number {i}", "label": ("odd", "even", "none")[i % 3]} for i in range(9)]
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    write_rows(tmp_path / "data" / "validation.jsonl", rows[:3])
    output = trained("classification", train__epochs=1)
    again = tmp_path / "again"
    assert run(["train", str(output / "recipe.yaml"), "--output-dir", str(again)]) == 0
    assert adapter_bytes(again) == adapter_bytes(output)
    labels = lorakit.load_recipe(output / "recipe.yaml").task.labels  # type: ignore[attr-defined]
    assert sorted(labels) == ["even", "none", "odd"]
    assert "error" not in run_json(output)
    options = ["--resume", "auto"]
    assert run(["train", str(tmp_path / "recipe.yaml"), *options]) == 0, "it is that recipe's run"


def test_the_adapter_loads_here_and_in_peft(trained: Trained, tiny_llama: Path) -> None:
    adapter = trained() / "adapter"
    names = {path.name for path in adapter.iterdir()}
    assert names >= {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    ids = torch.arange(12).reshape(2, 6)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        plain = base(ids).logits
        ours = lorakit.load(tiny_llama, adapter).eval()(ids).logits
        theirs = PeftModel.from_pretrained(base, str(adapter)).eval()(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - plain).abs().max() > 1e-3


def test_the_head_is_in_the_adapter(trained: Trained, tiny_bert: Path) -> None:
    adapter = trained("glue/sst2") / "adapter"
    ids = torch.arange(4, 16).reshape(2, 6)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    with torch.no_grad():
        ours = lorakit.load(tiny_bert, adapter).eval()(ids).logits
        theirs = PeftModel.from_pretrained(base, str(adapter)).eval()(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("limit", "left"), [(1, [8]), (2, [6, 8]), (None, [2, 4, 6, 8])], ids=str)
def test_checkpoints_are_whole_and_limited(
    limit: int | None, left: list[int], trained: Trained
) -> None:
    output = trained(train__save_every_steps=2, train__save_total_limit=limit)
    assert checkpoint_names(output) == [f"step-{step}" for step in left]
    for name in checkpoint_names(output):
        files = {path.name for path in (output / "checkpoints" / name).iterdir()}
        early = name == "step-2"  # nothing is evaluated yet
        assert files == {
            *([] if early else ["best.safetensors"]), "manifest.json", "method.safetensors", "optimizer.safetensors", "random.safetensors", "state.json",
            "weights.safetensors",
        }  # fmt: skip


def test_nothing_written_is_a_pickle(trained: Trained) -> None:
    output = trained()
    endings = {path.suffix for path in output.rglob("*") if path.is_file()}
    assert endings <= {".json", ".jsonl", ".jinja", ".md", ".safetensors", ".yaml"}


# What is printed


def test_stdout_has_the_result_and_stderr_plain_lines(
    trained: Trained, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    output = trained(train__log_every_steps=4)
    out, err = capfd.readouterr()
    assert re.fullmatch(
        rf"{output / 'adapter'}: 8 steps in [\d.]+ s, best loss \d\.\d{{4}} at step [48]\n", out
    )
    assert out.count("\n") == 1
    lines = err.splitlines()
    assert any("896 of 36,000 parameters are trainable" in line for line in lines)
    assert "30 rows, 8 per step: 8 steps (4 per epoch); evaluation on 8 rows" in lines
    shown = [line.split("  lr")[0] for line in lines if line.startswith("step ")]
    assert [line[:10] for line in shown if "/8  loss" in line] == [
        f"step {step}/8  " for step in (1, 4, 8)
    ]
    logged = [line["step"] for line in log_lines(output) if "loss" in line]
    assert logged == [4, 8], "the first step is shown, but not a log line"
    assert len([line for line in lines if " perplexity " in line]) == 2
    assert re.fullmatch(
        r'next: lorakit generate \S+ --adapter \S+/adapter --prompt "\.\.\."', lines[-1]
    )
    assert not set("\x1b\r") & set(err)


def test_json(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    output = trained("completion", "--json", **STEPS)
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "adapter": str(output / "adapter"), "steps": 4, "metrics": run_json(output)["metrics"],
    }  # fmt: skip


def test_set_and_output_dir(trained: Trained, tmp_path: Path) -> None:
    other = tmp_path / "a place" / "of: its own"
    trained("completion", "--output-dir", str(other), "--set", "train.max_steps=2", "--set",
            "train.epochs=null", "--set", "train.seed=3")  # fmt: skip
    assert not (tmp_path / "run").exists()
    assert run_json(other)["steps"] == 2
    assert run_json(other)["seed"] == 3


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_dry_run_writes_nothing(
    options: list[str], tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe_file(tmp_path, tiny_llama, "completion", train__trackers=["tensorboard"])
    before = tree(tmp_path)
    assert run(["train", str(recipe), "--dry-run", *options]) == 0
    assert tree(tmp_path) == before
    out = capsys.readouterr().out
    if options:
        plan = json.loads(out)
        assert plan["steps"] == 8
        assert plan["train_rows"] == 30
        assert plan["trainable_parameters"] == 896
        assert 5 < plan["first_loss"] < 6
        return
    lines = [line.split("  ", 1) for line in out.splitlines()]
    words = {name: text.strip() for name, text in lines}
    assert words["training"] == "896 of 36,000 parameters (2.489%), 4 modules"
    assert words["data"] == "30 training rows, 8 evaluation rows"
    assert words["steps"] == "8 (4 per epoch)"
    assert words["evaluation"] == words["checkpoints"] == "every 4 steps and at the end"
    assert 5 < float(words["first loss"]) < 6
    assert re.fullmatch(r"[\d,.]+ [GM]iB \(\w+\)", words["peak memory"])


@pytest.mark.parametrize("options", [["--dry-run"], []])
def test_a_step_larger_than_the_data(
    options: list[str], tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe_file(
        tmp_path, tiny_llama, "completion", task__limit_train=1, task__limit_eval=1, train__epochs=1
    )
    assert run(["train", str(recipe), *options]) == 0
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert line == (
        "warning: a step takes 8 rows, and the training data has 1 row: each epoch is a single, "
        "smaller step; hint: reduce train.per_device_batch_size"
    )
    if not options:
        assert "1 row, 8 per step: 1 step (1 per epoch); evaluation on 1 row" in err.splitlines()
        assert "/adapter: 1 step in " in out


def test_a_bar_on_a_terminal(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reader, terminal = pty.openpty()
    shown: list[bytes] = []
    thread = threading.Thread(target=read_all, args=(reader, shown))
    thread.start()
    capfd.readouterr()
    with os.fdopen(terminal, "w", encoding="utf-8") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        trained(train__eval_every_steps=3)
        out = capfd.readouterr().out
        monkeypatch.undo()
    thread.join(timeout=10)
    text = b"".join(shown).decode()
    assert "\x1b[" in text
    assert "step 8/8" in text
    assert "━" in text
    assert "perplexity" in text
    left = "".join(part for part in text.splitlines() if not part.startswith("\x1b[2Kstep"))
    assert "━" not in left.rpartition("\x1b[2K")[2], "the bar is removed"
    assert out.count("\n") == 1
    assert "\x1b" not in out


def read_all(descriptor: int, parts: list[bytes]) -> None:
    """Read from a terminal until its writers close it."""
    try:
        while part := os.read(descriptor, 1 << 16):
            parts.append(part)
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(descriptor)


# Steps, schedules, optimizers


@pytest.mark.parametrize(
    ("changes", "steps", "evaluated"),
    [
        ({"train__epochs": 0.5}, 2, [2]),
        ({"train__epochs": 1.5}, 6, [4, 6]),
        ({"train__epochs": None, "train__max_steps": 5}, 5, [4, 5]),
        ({"train__per_device_batch_size": 64}, 2, [1, 2]),
        ({"train__per_device_batch_size": 7, "train__gradient_accumulation_steps": 3}, 4, [2, 4]),
        ({"train__eval_every_steps": 3}, 8, [3, 6, 8]),
        ({"task__limit_train": 3, "train__epochs": 1}, 1, [1]),
    ],
    ids=str,
)
def test_how_many_steps(
    changes: dict[str, Any], steps: int, evaluated: list[int], trained: Trained
) -> None:
    output = trained(**changes)
    assert run_json(output)["steps"] == steps
    assert [line["step"] for line in log_lines(output)] == list(range(1, steps + 1))
    assert [line["step"] for line in eval_lines(output)] == evaluated


@pytest.mark.parametrize(
    "name", ["constant", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"]
)
def test_every_schedule_trains(name: str, trained: Trained) -> None:
    lines = log_lines(trained(train__lr_scheduler=name, train__warmup_steps=2, **STEPS))
    rates = [line["learning_rate"] for line in lines]
    assert rates[:2] == [0.005, 0.01], "as warmup leaves them"
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_half_precision_trains_float32_adapters(trained: Trained) -> None:
    output = trained(model__dtype="bfloat16", train__epochs=3)
    lines = log_lines(output)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.01
    stored = load_file(output / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32}


def test_tensorboard(trained: Trained) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = trained(train__trackers=["tensorboard"], **STEPS)
    events = EventAccumulator(str(output / "lorakit")).Reload()
    assert set(events.Tags()["scalars"]) >= {"loss", "learning_rate", "grad_norm", "eval/loss"}
    values = [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss")]
    assert [(line["step"], line["loss"]) for line in log_lines(output)] == values


# The best model


def test_the_adapter_is_the_best_and_not_the_last(trained: Trained, tmp_path: Path) -> None:
    """The learning rate is so high that the loss rises again."""
    output = trained(
        train__epochs=6, train__learning_rate=1.0, train__eval_every_steps=2,
        train__lr_scheduler="constant", train__max_grad_norm=None,
    )  # fmt: skip
    losses = {line["step"]: line["eval"]["loss"] for line in eval_lines(output)}
    record = run_json(output)
    best = min(losses, key=losses.__getitem__)
    assert best != max(losses)
    assert record["best_step"] == best
    assert record["metrics"]["loss"] == losses[best]
    recipe = lorakit.load_recipe(output / "recipe.yaml")
    found = lorakit.evaluate(recipe, adapter=output / "adapter")
    assert found["loss"] == pytest.approx(losses[best], abs=1e-5)


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_the_metric_that_is_asked_for(metric: str, trained: Trained) -> None:
    """Higher accuracy and lower loss are better; ties go to the lower loss."""
    output = trained(
        "glue/sst2", train__metric_for_best_model=metric, train__epochs=12,
        train__learning_rate=0.1, train__lr_scheduler="constant", train__max_grad_norm=None,
        train__eval_every_steps=2,
    )  # fmt: skip
    evaluations = eval_lines(output)
    values = [line["eval"][metric] for line in evaluations]
    sign = -1 if metric == "accuracy" else 1
    best = min(evaluations, key=lambda line: (sign * line["eval"][metric], line["eval"]["loss"]))
    assert min(values) != max(values)
    record = run_json(output)
    assert record["best_step"] == best["step"]
    assert record["metrics"] == best["eval"]


def test_early_stopping(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    output = trained(
        train__epochs=50, train__learning_rate=3.0, train__lr_scheduler="constant",
        train__max_grad_norm=None, train__early_stopping_patience=2, train__log_every_steps=100,
        train__eval_every_steps=3,
    )  # fmt: skip
    record, evaluations = run_json(output), eval_lines(output)
    assert record["steps"] == record["best_step"] + 6 == evaluations[-1]["step"] < 200
    assert record["exit_reason"] == "completed"
    assert "early stopping: loss has not improved in 2 evaluations" in capsys.readouterr().err
    assert [line["step"] for line in log_lines(output)] == [record["steps"]], "none goes unlogged"


@pytest.fixture
def wikisql(tmp_path: Path) -> Path:
    """Write data for a generating task: three rows for training and evaluation."""
    data = tmp_path / "data"
    for name in ("train", "dev"):
        write_rows(data / f"{name}.jsonl", ROWS)
        write_rows(data / f"{name}.tables.jsonl", [TABLE])
    return data


def test_generation_at_the_end_only(wikisql: Path, trained: Trained) -> None:
    """The final evaluation uses the best weights and is logged with their step."""
    output = trained(
        "wikisql", task__max_new_tokens=3, task__max_length=256, train__learning_rate=2.0,
        train__epochs=8, train__lr_scheduler="constant", train__max_grad_norm=None,
    )  # fmt: skip
    *during, final = eval_lines(output)
    assert all(line["eval"].keys() == {"loss", "perplexity"} for line in during)
    assert final["eval"].keys() == {"loss", "perplexity", "lf_accuracy"}
    record = run_json(output)
    assert final == {"step": record["best_step"], "eval": record["metrics"]}
    losses = [line["eval"]["loss"] for line in during]
    assert final["eval"]["loss"] == min(losses) < losses[-1]


@pytest.mark.parametrize(("when", "names"), [("always", 1), ("never", 0)])
def test_generation_always_or_never(when: str, names: int, wikisql: Path, trained: Trained) -> None:
    output = trained(
        "wikisql", task__max_new_tokens=3, task__max_length=256, task__eval_generate=when
    )
    evaluations = eval_lines(output)
    assert [line["step"] for line in evaluations] == [1, 2], "none is repeated at the end"
    assert all(("lf_accuracy" in line["eval"]) == names for line in evaluations)
    assert run_json(output)["metrics"] in [line["eval"] for line in evaluations]


@pytest.mark.parametrize(
    ("metric", "when", "parts"),
    [
        ("lf_accuracy", "end", ('= "lf_accuracy": ', "task.eval_generate: always")),
        ("bleu", "always", ('= "bleu": ', "allowed: null, lf_accuracy, loss, perplexity")),
    ],
)
def test_a_metric_that_generation_would_give(
    metric: str, when: str, parts: tuple[str, ...], wikisql: Path, tiny_llama: Path,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    recipe = write_recipe_file(
        tmp_path, tiny_llama, "wikisql", train__metric_for_best_model=metric,
        task__eval_generate=when,
    )  # fmt: skip
    line = refused(capsys, recipe)
    for part in parts:
        assert part in line


# What is refused


@pytest.mark.parametrize(
    ("task", "changes", "parts"),
    [
        ("completion", {"train__metric_for_best_model": "accuracy"},
         ('metric_for_best_model = "accuracy"', "loss, perplexity")),
        ("glue/sst2", {"train__metric_for_best_model": "f1"}, ('= "f1": ', "accuracy, loss")),
        ("glue/sst2", {"task__max_length": 257},
         ("task.max_length = 257", "256")),
        ("completion", {"train__optimizer": "adamw_8bit"}, ("adamw_8bit", "bitsandbytes")),
        ("completion", {"train__trackers": ["wandb"]}, ("'wandb' is not installed",)),
        ("completion", {"adapter__target_modules": ["nothing"]}, ("nothing", "q_proj")),
        ("completion", {"train__warmup_steps": 9},
         ("train.warmup_steps = 9: longer than the run of 8 steps", "allowed: 0 to 8")),
    ],
    ids=lambda value: "",
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    task: str, changes: dict[str, Any], parts: tuple[str, ...], tiny_llama: Path, tiny_bert: Path,
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if task == "completion" and changes.keys() & {"train__optimizer", "train__trackers"}:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    model = tiny_llama if task == "completion" else tiny_bert
    line = refused(capsys, write_recipe_file(tmp_path, model, task, **changes))
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("key", "value"),
    [("early_stopping_patience", 2), ("metric_for_best_model", "loss"), ("eval_every_steps", 3)],
)
def test_no_validation_split(
    key: str, value: object, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe_file(tmp_path, tiny_llama, "completion", **{f"train__{key}": value})
    (tmp_path / "data" / "validation.jsonl").unlink()
    line = refused(capsys, recipe)
    assert f"train.{key} = {json.dumps(value)}: the task has no validation split" in line


@pytest.mark.parametrize(
    ("task", "file", "row", "parts"),
    [
        ("completion", "train", {"prompt": "a", "completion": ""}, ("train.jsonl, row 4",)),
        ("completion", "validation", {"prompt": "a", "completion": 3},
         ("validation.jsonl, row 4",)),
        ("glue/sst2", "train", {"sentence": "a", "label": 2}, ("train.jsonl, row 4", "label = 2")),
        ("glue/sst2", "validation", {"sentence": "a", "label": -1},
         ("validation.jsonl, row 4", "label = -1")),
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_row_is_named(
    task: str, file: str, row: dict[str, Any], parts: tuple[str, ...], tiny_llama: Path,
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = tiny_llama if task == "completion" else tiny_bert
    recipe = write_recipe_file(tmp_path, model, task)
    data = tmp_path / "data" / f"{file}.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    write_rows(data, [*rows[:3], row, *rows[4:]])
    line = refused(capsys, recipe)
    for part in parts:
        assert part in line


def test_a_row_without_anything_to_train_on(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every label of a row is masked, as all turns are the user's."""
    turn = {"role": "user", "content": "hello"}
    answer = {"role": "assistant", "content": "hi"}
    write_rows(
        tmp_path / "data" / "train.jsonl", [{"messages": [turn, answer]}, {"messages": [turn]}]
    )
    line = refused(capsys, write_recipe_file(tmp_path, tiny_llama, "chat"))
    assert "train.jsonl, row 2: " in line


@pytest.mark.parametrize("content", ["", '{"prompt": "a"}\n'])
def test_an_empty_split_and_a_missing_column(
    content: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe_file(tmp_path, tiny_llama, "completion")
    (tmp_path / "data" / "train.jsonl").write_text(content)
    line = refused(capsys, recipe)
    assert "train.jsonl" in line
    assert ("empty" if not content else "completion") in line


def test_an_output_dir_that_is_a_file(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe_file(tmp_path, tiny_llama, "completion")
    (tmp_path / "run").write_text("mine")
    assert "a file with that name exists" in refused(capsys, recipe)


# What fails on the way


def assert_failed(output: Path, capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    (line,) = [x for x in err.splitlines() if x.startswith("error: ")]
    record = run_json(output)
    assert record["exit_reason"] == "failed"
    assert line == f"error: {record['message']}"
    assert not (output / "adapter").exists()
    for file in (output / "checkpoints").rglob("*.safetensors"):
        for name, value in load_file(file).items():
            assert value.isfinite().all(), (file, name)
    return line


def test_a_loss_that_is_no_longer_finite(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two good steps, then the third step's rate makes everything after it overflow."""
    output = trained(code=1, train__save_every_steps=1, **ABSURD)
    line = assert_failed(output, capsys)
    saved = checkpoint_names(output)
    assert "step " in line
    assert "last good checkpoint: " in line
    assert (saved[-1] in line) if saved else ("none was written yet" in line)
    assert "train.learning_rate (1e+20) too high" in line or "lower train.learning_rate" in line


def test_no_checkpoint_yet(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    output = trained(code=1, train__log_every_steps=100, **ABSURD)
    line = assert_failed(output, capsys)
    assert "last good checkpoint: none was written yet" in line
    assert not (output / "checkpoints").exists()


def test_weights_that_overflow_in_the_last_step(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    """The step's loss is finite, but the weights after it are not."""
    output = trained(code=1, **ABSURD | {"train__learning_rate": 1e39, "train__optimizer": "sgd"},
                     **STEPS | {"train__max_steps": 1})  # fmt: skip
    assert "is not finite after this step" in assert_failed(output, capsys)


def test_an_evaluation_that_is_not_finite(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    output = trained(
        "glue/sst2", code=1, train__eval_every_steps=1, **ABSURD | {"train__learning_rate": 1e37}
    )
    line = assert_failed(output, capsys)
    assert "error: step 1: " in line
    assert "last good checkpoint: none was written yet" in line


def test_a_failed_run_may_be_begun_again(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is no checkpoint to keep."""
    trained(code=1, train__log_every_steps=100, **ABSURD)
    output = trained()
    assert run_json(output)["exit_reason"] == "completed"
    assert run_json(output)["message"] is None


def test_python_raises_what_the_command_line_prints(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, tiny_llama, **ABSURD)
    with pytest.raises(lorakit.errors.TrainingError, match="last good checkpoint"):
        lorakit.train(recipe)
    (tmp_path / "data" / "validation.jsonl").unlink()
    recipe = recipe_for(tmp_path, tiny_llama, train__eval_every_steps=1)
    with pytest.raises(lorakit.errors.UserError, match="has no validation split"):
        lorakit.train(recipe)
