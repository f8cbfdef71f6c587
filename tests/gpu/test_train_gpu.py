"""What only a GPU shows: steps that do not wait for the device, half precision, memory."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit
from lorakit.training.clock import Clock, StepWindow
from lorakit.training.divergence import AsyncScalars, nonfinite_weight
from lorakit.training.record import peak_memory_bytes
from tests.training.engines import built

pytestmark = pytest.mark.gpu

WORDS = [
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    lines = [
        {"prompt": " ".join(WORDS[: i % 9 + 1]), "completion": " " + " ".join(WORDS[i % 5 : 9])}
        for i in range(64)
    ]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "validation.jsonl").write_text(file.read_text())
    return tmp_path


LORA = "{r: 4, target_modules: [q, v], lora_dropout: 0.1}"
INTRINSIC = "{method: intrinsic, d: 64, target_modules: [q, v]}"


def recipe(
    model: Path, rows: Path, adapter: str = LORA, **changes: Any
) -> lorakit.recipe.sections.Recipe:
    text = f"""
model: {{name_or_path: {model}, dtype: bfloat16}}
adapter: {adapter}
task: {{name: completion, path: {rows}, max_length: 64}}
train: {{output_dir: {rows / "run"}, epochs: 2, learning_rate: 1.0e-2, log_every_steps: 2}}
"""
    file = rows / "recipe.yaml"
    file.write_text(text)
    return lorakit.load_recipe(file, changes)


def encoder_recipe(model: Path, folder: Path) -> lorakit.recipe.sections.Recipe:
    lines = [{"sentence": " ".join(WORDS[: i % 9 + 1]), "label": i % 2} for i in range(64)]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "validation.jsonl").unlink(missing_ok=True)
    file = folder / "encoder.yaml"
    file.write_text(
        f"""
model: {{name_or_path: {model}}}
adapter: {{r: 4, target_modules: [q, v]}}
task: {{name: glue/sst2, path: {folder}, max_length: 64}}
train: {{output_dir: {folder / "encoder"}, epochs: 2}}
"""
    )
    return lorakit.load_recipe(file)


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_a_step_never_waits_for_the_device(
    tiny_llama: Path, tiny_bert: Path, rows: Path, kind: str
) -> None:
    wanted = recipe(tiny_llama, rows) if kind == "causal" else encoder_recipe(tiny_bert, rows)
    run = built(wanted)
    run.take_steps()  # whose gradients are checked, which waits
    scalars = AsyncScalars(run.engine.value_names)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(1, 4):
            loaded = run.loader.take(number)
            result = run.engine.step(loaded.micro_batches)
            run.loader.prefetch(number + 1)
            scalars.add(result)
        scalars.stage({"step": 4})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(scalars.arrived(wait=True)[0].losses) == 3


def test_the_speed_is_that_of_the_device() -> None:
    """The host launches steps long before they run."""
    window = StepWindow(Clock(), torch.device("cuda"))
    for _ in range(2):
        began = time.perf_counter()
        window.tokens += 10
        torch.cuda._sleep(200_000_000)  # clock cycles: about 0.1 s
        assert time.perf_counter() - began < 0.05
        speed = window.end()
        torch.cuda.synchronize()
        assert speed() == pytest.approx(10 / (time.perf_counter() - began), rel=0.2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_precision_learns(tiny_llama: Path, rows: Path, dtype: str) -> None:
    run = lorakit.train(recipe(tiny_llama, rows, **{"model.dtype": dtype}))
    lines = [json.loads(x) for x in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.05
    assert lines[0]["peak_memory_bytes"] > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"train.gradient_checkpointing": True},
        {"train.compile": True},
        {"train.gradient_checkpointing": "offload"},
        {"train.gradient_checkpointing": "offload", "train.compile": True},
    ],
)
def test_options_that_change_no_number_much(
    tiny_llama: Path, rows: Path, changes: dict[str, Any]
) -> None:
    plain = lorakit.train(recipe(tiny_llama, rows, **{"adapter.lora_dropout": 0.0}))
    other = lorakit.train(
        recipe(
            tiny_llama,
            rows,
            **{"adapter.lora_dropout": 0.0, "train.output_dir": str(rows / "other"), **changes},
        )
    )
    assert other.metrics["loss"] == pytest.approx(plain.metrics["loss"], abs=0.05)


@pytest.mark.parametrize("compile_layers", ["auto", False])
def test_eval_has_the_metrics_that_training_has_reported(
    tiny_llama: Path, rows: Path, compile_layers: bool | str
) -> None:
    wanted = recipe(tiny_llama, rows, **{"train.compile": compile_layers})
    run = lorakit.train(wanted)
    assert lorakit.evaluate(wanted, base=True) != run.metrics
    assert lorakit.evaluate(wanted) == run.metrics


@pytest.mark.parametrize("adapter", [LORA, INTRINSIC])
def test_each_evaluation_measures_the_current_weights(
    tiny_llama: Path, rows: Path, adapter: str
) -> None:
    """Those that a replayed step has changed, too."""
    losses = []
    for compile_layers in ("auto", False):
        folder = rows / f"run-{compile_layers}"
        changes = {"train.compile": compile_layers, "train.output_dir": str(folder)}
        changes |= {"train.eval_every_steps": 2, "train.learning_rate": 5e-2}
        lorakit.train(recipe(tiny_llama, rows, adapter, **changes))
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        losses.append([line["eval"]["loss"] for line in lines if "loss" in line.get("eval", {})])
    assert losses[0] == pytest.approx(losses[1], abs=5e-3)
    assert losses[0][0] - losses[0][-1] > 2e-2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", [0, 70_000, -1])
def test_nonfinite_weights_are_found(dtype: torch.dtype, bad: float, place: int) -> None:
    """In any part of a weight that several blocks of threads read."""
    weights = {name: torch.ones(300, 301, dtype=dtype, device="cuda") for name in "abc"}
    assert nonfinite_weight(weights) is None
    weights["b"].view(-1)[place] = bad
    assert nonfinite_weight(weights) == "b"


def test_the_peak_is_that_of_the_allocator() -> None:
    tensor = torch.empty(2**20, device="cuda")
    assert peak_memory_bytes(tensor.device) == torch.cuda.max_memory_allocated() >= 2**22
