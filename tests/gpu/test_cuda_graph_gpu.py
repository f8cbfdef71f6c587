"""CUDA graphs: the same numbers as the eager engine, few captures, and no failure of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorakit
from lorakit.training.engine.cuda_graph import CudaGraphEngine
from tests.training.engines import Built, built

pytestmark = pytest.mark.gpu

WORDS = [
    f"{word} {number}" for word in ("red", "green", "blue") for number in ("one", "two", "six")
]
LORA = "r: 4, target_modules: [q, v], lora_dropout: 0.1"
ADALORA = "method: adalora, init_r: 6, target_r: 3, tinit: 2, tfinal: 4, deltaT: 2"


def recipe(model: Path, folder: Path, kind: str, adapter: str, **changes: Any) -> Any:
    encoder = kind == "encoder"
    lines: list[dict[str, Any]] = []
    for i in range(80):
        text = " ".join(WORDS[: i % 9 + 1])
        answer = {"label": "ab"[i % 2], "text": text}
        lines.append(answer if encoder else {"prompt": text, "completion": " " + WORDS[i % 5]})
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = "classification" if encoder else "completion"
    file = folder / "recipe.yaml"
    file.write_text(f"""
model: {{name_or_path: {model}, dtype: float32, new_head: {str(encoder).lower()}}}
adapter: {{{adapter}}}
task: {{name: {task}, path: {{train: {data}}}, max_length: 64}}
train: {{output_dir: {folder / "run"}, epochs: 2, learning_rate: 1.0e-2,
  per_device_batch_size: 4, gradient_accumulation_steps: 2}}
""")
    return lorakit.load_recipe(file, changes)


def results(run: Built, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    losses = [float(result.loss) for result in run.take_steps(steps)]
    return losses, {name: w.clone() for name, w in run.engine.weights.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", [LORA, ADALORA])
@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_graphs_give_the_numbers_of_the_eager_engine(
    tiny_llama: Path, tiny_bert: Path, tmp_path: Path, kind: str, adapter: str, dtype: str
) -> None:
    model = tiny_llama if kind == "causal" else tiny_bert
    wanted = recipe(model, tmp_path, kind, adapter, **{"model.dtype": dtype})
    run = built(wanted)
    assert isinstance(run.engine, CudaGraphEngine)
    losses, weights = results(run, 15)
    assert run.engine.captured_shapes
    eager_losses, eager_weights = results(built(wanted, engine="eager"), 15)
    assert losses == pytest.approx(eager_losses, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, eager_weights[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "is_used"),
    [
        ({}, False),
        ({"train.compile": False}, False),
        ({"train.kernels": "torch"}, True),
        ({"train.gradient_checkpointing": True}, True),
        ({"train.compile": True}, True),
    ],
)
def test_attention_of_short_rows_does_not_start_cudnn(
    tiny_llama: Path, tmp_path: Path, changes: dict[str, Any], is_used: bool
) -> None:
    run = built(recipe(tiny_llama, tmp_path, "causal", LORA, **changes))
    seen = set()
    embeddings = run.engine.objective.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda *_: seen.add(torch.backends.cuda.cudnn_sdp_enabled()))
    run.take_steps(1)
    assert seen == {is_used}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_passes_of_compiled_layers_are_replayed(
    tiny_llama: Path, tmp_path: Path, dtype: str
) -> None:
    changes = {"model.dtype": dtype, "train.compile": True}
    wanted = recipe(tiny_llama, tmp_path, "causal", "r: 4, target_modules: [q, v, o]", **changes)
    rows = [{"prompt": "red", "completion": f" {i:03d} {i * i:04d}"} for i in range(80)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = built(wanted)
    assert isinstance(run.engine, CudaGraphEngine)
    losses, weights = results(run, 15)
    assert len(run.engine.captured_shapes) == 1
    assert not any("disabled" in line for line in run.said)
    torch._dynamo.reset()
    eager_losses, eager_weights = results(built(wanted, engine="compiled_layers"), 15)
    assert losses == pytest.approx(eager_losses, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, eager_weights[name], rtol=1e-3, atol=1e-4)


def test_each_shape_is_captured_once(tiny_llama: Path, tmp_path: Path) -> None:
    run = built(recipe(tiny_llama, tmp_path, "causal", LORA))
    assert isinstance(run.engine, CudaGraphEngine)
    run.take_steps(10)
    first = run.engine.captured_shapes
    run.take_steps(10)
    assert len(run.engine.captured_shapes) == len(first) or len(first) < 8
    shapes = [json.dumps(shape) for shape in run.engine.captured_shapes]
    assert len(set(shapes)) == len(shapes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", [LORA, ADALORA])
def test_a_resumed_run_ends_with_the_same_bytes(
    tiny_llama: Path, tmp_path: Path, adapter: str, dtype: str
) -> None:
    settings = {"model.dtype": dtype, "train.save_total_limit": None, "train.save_every_steps": 1}
    whole = recipe(tiny_llama, tmp_path, "causal", adapter, **settings)
    run = lorakit.train(whole)
    expected = (run.adapter_dir / "adapter_model.safetensors").read_bytes()
    for step in (10, 3):
        shutil.rmtree(run.adapter_dir)
        lorakit.train(whole, resume=str(run.output_dir / "checkpoints" / f"step-{step}"))
        assert (run.adapter_dir / "adapter_model.safetensors").read_bytes() == expected


def test_a_pass_that_cannot_be_captured_runs_eagerly(tiny_llama: Path, tmp_path: Path) -> None:
    run = built(recipe(tiny_llama, tmp_path, "causal", LORA))

    def waits(_module: object, _inputs: object, output: Any) -> None:
        float(output.last_hidden_state.sum())

    run.objective.parts.decoder.register_forward_hook(waits)
    losses, _ = results(run, 6)
    assert any("CUDA graphs are disabled" in line for line in run.said)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    eager = built(recipe(tiny_llama, tmp_path, "causal", LORA), engine="eager")
    assert losses == pytest.approx(results(eager, 6)[0], rel=1e-5)
