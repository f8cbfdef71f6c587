from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit.api import convert_recipe
from lorakit.errors import UserError
from lorakit.recipe.load import load_recipe

QLORA = """\
base_model: org/base
load_in_4bit: yes
adapter: qlora
lora_r: 32
lora_alpha: 64
lora_dropout: 0.05
lora_target_linear: true
datasets:
  - {path: org/rows, type: alpaca, split: "train[:500]"}
val_set_size: 0.05
sequence_len: 4096
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 2
optimizer: paged_adamw_8bit
lr_scheduler: constant_with_warmup
learning_rate: 2e-4
bf16: auto
tf32: false
gradient_checkpointing: true
activation_offloading: false
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
wandb_project: mine
wandb_watch:
special_tokens: {pad_token: "<pad>", eos_token: "<end>"}
seed: 7
output_dir: runs/out
"""


def converted(text: str, tmp_path: Path) -> dict[str, Any]:
    """The sections of the recipe; the recipe itself is loaded and checked."""
    file = tmp_path / "theirs.yml"
    file.write_text(text)
    found = convert_recipe(file)
    ours = tmp_path / "recipe.yaml"
    ours.write_text(found.text)
    recipe = load_recipe(ours)
    assert recipe.train.output_dir
    return found.recipe


def test_a_qlora_file(tmp_path: Path) -> None:
    found = converted(QLORA, tmp_path)
    assert found["model"] == {
        "name_or_path": "org/base",
        "base_precision": "nf4",
        "dtype": "bfloat16",
        "attn_implementation": "flash_attention_2",
    }
    assert found["adapter"] == {
        "method": "lora",
        "r": 32,
        "lora_alpha": 64,
        "target_modules": ["all-linear"],
        "lora_dropout": 0.05,
    }
    assert found["task"] == {
        "name": "completion",
        "format": "alpaca",
        "path": {"path": "org/rows", "split": "train"},
        "limit_train": 500,
        "validation_share": 0.05,
        "max_length": 4096,
        "packing": True,
    }
    assert found["train"] == {
        "output_dir": "runs/out",
        "epochs": 2,
        "per_device_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "learning_rate": 2e-4,
        "lr_scheduler": "constant",
        "warmup_steps": 10,
        "optimizer": "adamw_8bit",
        "gradient_checkpointing": True,
        "trackers": ["wandb"],
        "seed": 7,
    }


def test_what_is_lost_changed_and_not_needed_is_said(tmp_path: Path) -> None:
    (tmp_path / "theirs.yml").write_text(QLORA)
    found = convert_recipe(tmp_path / "theirs.yml")
    assert [text.partition(":")[0] for text in found.unsupported] == [
        "special_tokens.eos_token",
        "wandb_project",
        "evals_per_epoch",
    ]
    assert found.ignored == ("special_tokens.pad_token", "tf32")
    assert (
        'optimizer: "paged_adamw_8bit": adamw_8bit: its state stays in GPU memory, where it is not '
        "paged out"
    ) in found.changed
    assert any("2 x 4 = 8 packed bins of 4096 tokens" in text for text in found.changed)
    for text in (*found.unsupported, *found.changed):
        assert f"#   {text}\n" in found.text


MINIMAL = "base_model: m\nlearning_rate: 1e-4\noutput_dir: out\n"
ROWS = "datasets: [{path: a.jsonl, type: completion}]\n"


def test_the_defaults_of_axolotl_are_written(tmp_path: Path) -> None:
    found = converted(MINIMAL + ROWS + "adapter: lora\nlora_target_modules: [q_proj]\n", tmp_path)
    assert (found["adapter"]["r"], found["adapter"]["lora_alpha"]) == (8, 8)
    assert found["task"]["max_length"] == 512
    expected = {
        "epochs": 1.0,
        "per_device_batch_size": 1,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.03,
    }
    assert found["train"].items() >= expected.items()


def test_without_an_adapter_all_parameters_are_trained(tmp_path: Path) -> None:
    found = converted(MINIMAL + ROWS + "lora_r: 8\nload_in_4bit: true\n", tmp_path)
    assert found["adapter"] == {"method": "full"}
    assert "base_precision" not in found["model"]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("peft_use_dora: true", {"method": "dora"}),
        ("loraplus_lr_ratio: 8", {"method": "lora_plus", "loraplus_lr_ratio": 8}),
        ("peft_use_rslora: true", {"use_rslora": True}),
        ("peft_init_lora_weights: pissa", {"init": "pissa"}),
        (
            "lora_target_modules: 'layers.[0-9]+.q_proj'",
            {"target_modules": ["re:layers.[0-9]+.q_proj"]},
        ),
        ("lora_modules_to_save: [lm_head]", {"modules_to_save": ["lm_head"]}),
        ("lora_model_dir: earlier", {"init_from": "earlier"}),
        ("peft_layers_to_transform: [1, 2]", {"layers": [1, 2]}),
    ],
)
def test_adapters(keys: str, expected: dict[str, Any], tmp_path: Path) -> None:
    found = converted(MINIMAL + ROWS + f"adapter: lora\n{keys}\n", tmp_path)
    assert found["adapter"].items() >= expected.items()


@pytest.mark.parametrize(
    ("datasets", "task"),
    [
        ("[{path: a.jsonl, type: completion, field: body}]",
         {"name": "text", "text_column": "body", "path": "a.jsonl"}),
        ("[{path: org/chats, name: en, type: chat_template, split: sft}]",
         {"name": "chat", "format": "messages", "path": {"path": "org/chats", "name": "en", "split": "sft"}}),
        ("[{path: a.jsonl, type: chat_template, field_messages: conversations, message_property_mappings: {role: from, content: value}}]",
         {"name": "chat", "format": "sharegpt", "path": "a.jsonl"}),
        ("[{path: a.jsonl, type: chat_template, field_messages: turns}]",
         {"name": "chat", "format": "messages", "messages_column": "turns", "path": "a.jsonl"}),
        ("[{path: a.jsonl, type: sharegpt}]", {"name": "chat", "format": "sharegpt", "path": "a.jsonl"}),
        ("[{path: json, data_files: [a.jsonl, b.jsonl], type: alpaca}]",
         {"name": "completion", "format": "alpaca", "path": ["a.jsonl", "b.jsonl"]}),
        ("[{path: a.jsonl, type: alpaca}, {path: org/b, type: alpaca}]",
         {"name": "completion", "format": "alpaca", "path": ["a.jsonl", {"path": "org/b", "split": "train"}]}),
        ("[{path: a.jsonl, type: {field_instruction: q, field_output: a, format: 'Q: {instruction} A:'}}]",
         {"name": "completion", "template": "Q: {q} A:", "completion_template": "{a}", "path": "a.jsonl"}),
        ("[{path: a.jsonl, type: input_output}]", {"name": "auto", "path": "a.jsonl"}),
    ],
)  # fmt: skip
def test_data_sets(datasets: str, task: dict[str, Any], tmp_path: Path) -> None:
    found = converted(f"{MINIMAL}adapter: lora\ndatasets: {datasets}\n", tmp_path)
    assert found["task"] == {**task, "max_length": 512}


def test_test_data_is_validation_data(tmp_path: Path) -> None:
    text = MINIMAL + ROWS + "test_datasets: [{path: b.jsonl, type: completion}]\n"
    path = converted(text, tmp_path)["task"]["path"]
    assert path == {"train": "a.jsonl", "validation": "b.jsonl"}


def test_pretraining_streams(tmp_path: Path) -> None:
    text = (
        MINIMAL
        + "pretraining_dataset: [{path: org/c, name: en, text_column: body}]\nmax_steps: 9\n"
    )
    task = converted(text, tmp_path)["task"]
    assert (task["name"], task["text_column"], task["streaming"]) == ("text", "body", True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("rl: dpo\n", 'theirs.yml: rl = "dpo": lorakit trains on examples'),
        ("reward_model: true\n", "theirs.yml: reward_model = true: lorakit trains on examples"),
        ("adapter: ia3\n" + ROWS, 'theirs.yml: adapter = "ia3": no method of lorakit corresponds'),
        ("", "theirs.yml: datasets: a dataset is required"),
        ("datasets: [3]\n", "theirs.yml: datasets: 3; allowed: a mapping"),
        ("learning_rate_: 3\nlora_r: -2\nadapter: lora\n" + ROWS, "theirs.yml, converted: adapter.r = -2: out of range"),
        ("base_model: n\n", "theirs.yml, line 4: duplicate key 'base_model'"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted(keys: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        converted(MINIMAL + keys, tmp_path)
    assert message in str(caught.value)


def test_float16_converts_on_a_machine_without_gpu(tmp_path: Path) -> None:
    (tmp_path / "theirs.yml").write_text(MINIMAL + ROWS + "fp16: true\n")
    assert convert_recipe(tmp_path / "theirs.yml").recipe["model"]["dtype"] == "float16"
