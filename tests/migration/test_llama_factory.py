from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.api import convert_recipe
from lorakit.errors import UserError
from lorakit.recipe.load import load_recipe

SFT = """\
model_name_or_path: org/base
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: all
dataset: pairs
template: llama3
cutoff_len: 1024
max_samples: 1000
output_dir: saves/x
logging_steps: 10
save_steps: 500
report_to: [wandb, swanlab]
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
val_size: 0.1
eval_strategy: steps
eval_steps: 250
quantization_bit: 4
flash_attn: fa2
"""
INFO = {
    "pairs": {"file_name": "pairs.json"},
    "chats": {"hf_hub_url": "org/chats", "subset": "en", "split": "sft", "formatting": "sharegpt"},
    "openai": {
        "file_name": "o.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "turns"},
        "tags": {"role_tag": "role", "content_tag": "content"},
    },
    "renamed": {"file_name": "r.json", "columns": {"prompt": "question", "response": "output"}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    (tmp_path / "examples").mkdir()
    return tmp_path


def converted(text: str, folder: Path) -> dict[str, Any]:
    file = folder / "examples" / "theirs.yaml"
    file.write_text(text)
    found = convert_recipe(file)
    (folder / "recipe.yaml").write_text(found.text)
    load_recipe(folder / "recipe.yaml")
    return found.recipe


def test_a_file_of_supervised_training(folder: Path) -> None:
    assert converted(SFT, folder) == {
        "model": {
            "name_or_path": "org/base",
            "chat_template": "llama-3",
            "trust_remote_code": True,
            "dtype": "bfloat16",
            "base_precision": "nf4",
            "attn_implementation": "flash_attention_2",
        },
        "adapter": {
            "method": "lora",
            "r": 16,
            "lora_alpha": 32,
            "target_modules": ["all-linear"],
        },
        "task": {
            "name": "chat",
            "path": "data/pairs.json",
            "format": "alpaca",
            "limit_train": 1000,
            "validation_share": 0.1,
            "max_length": 1024,
        },
        "train": {
            "output_dir": "saves/x",
            "epochs": 3.0,
            "per_device_batch_size": 1,
            "gradient_accumulation_steps": 8,
            "learning_rate": 1e-4,
            "lr_scheduler": "cosine",
            "warmup_ratio": 0.1,
            "trackers": ["wandb"],
            "gradient_checkpointing": True,
            "log_every_steps": 10,
            "save_every_steps": 500,
            "eval_every_steps": 250,
        },
    }


MINIMAL = "model_name_or_path: m\nstage: sft\noutput_dir: out\ndataset: pairs\n"


def test_the_defaults_are_written(folder: Path) -> None:
    found = converted(MINIMAL, folder)
    assert found["adapter"] == {
        "method": "lora",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["all-linear"],
    }
    assert found["train"] == {
        "output_dir": "out",
        "epochs": 3.0,
        "per_device_batch_size": 8,
        "learning_rate": 5e-5,
        "lr_scheduler": "linear",
        "warmup_ratio": 0.0,
        "gradient_checkpointing": True,
    }


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("chats", {"path": {"path": "org/chats", "name": "en", "split": "sft"}, "format": "sharegpt"}),
        ("openai", {"path": "data/o.jsonl", "format": "messages", "messages_column": "turns"}),
        ("pairs, chats", {"path": ["data/pairs.json", {"path": "org/chats", "name": "en", "split": "sft"}]}),
        ("missing", {"path": "data/missing.json"}),
        ("pairs,pairs\ninterleave_probs: 0.25,0.75", {"path": [
            {"path": "data/pairs.json", "weight": 0.25}, {"path": "data/pairs.json", "weight": 0.75}]}),
        ("pairs\neval_dataset: openai", {"path": {"train": "data/pairs.json", "validation": "data/o.jsonl"}}),
        ("pairs\nmask_history: true", {"train_on": "last"}),
        ("pairs\nneat_packing: true", {"packing": True}),
    ],
)  # fmt: skip
def test_data_sets(dataset: str, expected: dict[str, Any], folder: Path) -> None:
    task = converted(MINIMAL.replace("pairs", dataset), folder)["task"]
    assert task.items() >= expected.items()


@pytest.mark.parametrize(
    ("keys", "lost"),
    [
        ("dataset: missing", "dataset: \"missing\": not found in data/dataset_info.json"),
        ("dataset: renamed", 'renamed.columns: {"prompt": "question"}: rename the columns'),
        ("dataset: pairs,chats\nmax_samples: 9", "max_samples: 9: rows of each dataset"),
        ("dataset: pairs\nval_size: 100", "val_size: 100: a number of rows"),
        ("dataset: pairs\nquantization_bit: 8", "quantization_bit: 8: see model.base_precision"),
        ("dataset: pairs\noptim: muon", 'optim: "muon": see train.optimizer'),
        ("dataset: pairs\neval_steps: 0.1", "eval_steps: 0.1: a share of the run"),
    ],
)  # fmt: skip
def test_what_is_lost(keys: str, lost: str, folder: Path) -> None:
    file = folder / "theirs.yaml"
    file.write_text(MINIMAL.replace("dataset: pairs", keys))
    assert any(text.startswith(lost) for text in convert_recipe(file).unsupported)


def test_pretraining_packs(folder: Path) -> None:
    task = converted(MINIMAL.replace("sft", "pt"), folder)["task"]
    assert (task["name"], task["packing"]) == ("text", True)


def test_full_fine_tuning(folder: Path) -> None:
    assert converted(MINIMAL + "finetuning_type: full\n", folder)["adapter"] == {"method": "full"}


def test_the_files_of_version_1(folder: Path) -> None:
    text = (
        "model: org/base\npeft_config: {name: lora, r: 4, target_modules: all}\nmax_steps: 5\n"
        "train_dataset: d.jsonl\nmicro_batch_size: 2\ncutoff_len: 64\noutput_dir: out\n"
        "quant_config: {name: bnb, quantization_bit: 4}\nlearning_rate: 1e-4\n"
    )
    found = converted(text, folder)
    assert found["model"] == {"name_or_path": "org/base", "base_precision": "nf4"}
    assert found["adapter"]["r"] == 4
    assert (found["train"]["max_steps"], found["train"]["per_device_batch_size"]) == (5, 2)
    assert found["task"]["path"] == "d.jsonl"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("stage: sft", "stage: dpo", 'stage = "dpo": lorakit trains on examples'),
        ("stage: sft", "stage: sft\nfinetuning_type: oft", 'finetuning_type = "oft": no method'),
        ("dataset: pairs\n", "", "dataset: required key is missing"),
    ],
)
def test_what_cannot_be_converted(old: str, new: str, message: str, folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        converted(MINIMAL.replace(old, new), folder)
    assert message in str(caught.value)


def test_an_unreadable_list_of_data_sets(folder: Path) -> None:
    (folder / "data" / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset_info\.json: cannot be read as JSON"):
        converted(MINIMAL, folder)
