"""Deterministic runs on a GPU: two of them, and one that is killed and resumed twice, end alike."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from tests.training.runs import WORDS, adapter_bytes, log_lines, write_recipe_file, write_rows

pytestmark = pytest.mark.gpu

REPO = Path(__file__).resolve().parents[2]
#: Attention adds up the gradients of several blocks of keys, in any order if it may.
SIZES = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
         "num_attention_heads": 8, "max_position_embeddings": 512}  # fmt: skip
DROPOUT = {"r": 4, "target_modules": ["q", "v"], "lora_dropout": 0.1}
ADALORA = {"method": "adalora", "init_r": 8, "target_r": 4, "tinit": 4, "tfinal": 8, "deltaT": 2}
EAGER = {"train__compile": False}
#: The adapter, and changes of the recipe. By default, small models run as CUDA graphs.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "graphs": (DROPOUT, {}),
    "graphs, adalora": (ADALORA, {}),
    "graphs, float32": (DROPOUT, {"model__dtype": "float32"}),
    "eager": (DROPOUT, EAGER),
    "eager, dora": ({"method": "dora", "r": 4}, EAGER),
    "embeddings": ({"r": 4, "target_modules": ["q", "embed_tokens"]}, {}),
    "packed": (DROPOUT, {"task__packing": True, "train__per_device_batch_size": 2}),
    "checkpointed": (DROPOUT, {"train__gradient_checkpointing": True}),
    "nf4": (DROPOUT, {"model__base_precision": "nf4", "train__optimizer": "adamw_8bit"}),
    "encoder": (DROPOUT, {"task__name": "glue/sst2"}),
}


@pytest.fixture(scope="module")
def models(tiny_llama: Path, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ``completion`` and a random ``sst2`` model."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.save_pretrained(folder / "completion")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=4, **SIZES, **ids)
    LlamaForCausalLM(config).save_pretrained(folder / "completion")
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.save_pretrained(folder / "sst2")
    BertModel(BertConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(folder / "sst2")
    return folder


def write(folder: Path, models: Path, adapter: dict[str, Any], changes: dict[str, Any]) -> Path:
    """A recipe of 60 steps on rows of 40 to 450 tokens."""
    text, encoder = " ".join(WORDS * 10), "task__name" in changes
    causal = [
        {"prompt": text[: 20 + i * 7 % 200], "completion": " " + text[: 20 + i * 13 % 220]}
        for i in range(64)
    ]
    classes = [{"sentence": text[: 40 + i * 13 % 400], "label": i % 2} for i in range(64)]
    for name, count in (("train", 64), ("validation", 8)):
        write_rows(folder / "data" / f"{name}.jsonl", (classes if encoder else causal)[:count])
    settings: dict[str, Any] = {
        "model__dtype": "bfloat16", "task__max_length": 500, "train__deterministic": True,
        "train__epochs": None, "train__max_steps": 60, "train__save_every_steps": 4,
    }  # fmt: skip
    model = models / ("sst2" if encoder else "completion")
    file = write_recipe_file(folder, model, "completion", **(settings | changes))
    values = json.loads(file.read_text())
    values["adapter"] = adapter
    if encoder:
        del values["task"]["eval_generate"]
    file.write_text(json.dumps(values))
    return file


def train(
    recipe: Path, run: Path, *options: str, killed_at: int | None = None, after: float = 0
) -> str:
    """Run ``lorakit train`` in a process of its own, and kill it some seconds after a checkpoint;
    return what it said."""
    arguments = ["train", str(recipe), "--output-dir", str(run), *options]
    with subprocess.Popen(
        [sys.executable, "-m", "lorakit", *arguments], cwd=REPO, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        if killed_at is not None:
            while not (run / "checkpoints" / f"step-{killed_at}").exists():
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.002)
            time.sleep(after)
            process.kill()
        _, said = process.communicate(timeout=240)
    assert process.returncode == (-9 if killed_at else 0), said
    return said


@pytest.mark.parametrize("variant", VARIANTS)
def test_runs_end_with_the_same_bytes(variant: str, models: Path, tmp_path: Path) -> None:
    if variant == "nf4":
        pytest.importorskip("bitsandbytes")
    recipe = write(tmp_path, models, *VARIANTS[variant])
    one, other, resumed = (tmp_path / name for name in ("one", "other", "resumed"))
    said = train(recipe, one)
    assert "kernels are deterministic (train.deterministic: true)" in said
    assert "CUDA graphs" in said or not variant.startswith("graphs")
    train(recipe, other)
    assert [line["loss"] for line in log_lines(one)] == [line["loss"] for line in log_lines(other)]
    assert adapter_bytes(one) == adapter_bytes(other)
    train(recipe, resumed, killed_at=8)
    after = random.Random(variant).uniform(0, 0.3)
    train(recipe, resumed, "--resume", "auto", killed_at=24, after=after)
    train(recipe, resumed, "--resume", "auto")
    assert adapter_bytes(one) == adapter_bytes(resumed)
