from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from lorakit import registry
from lorakit.recipe.peers.counterpart import Counterpart
from lorakit.recipe.peers.hints import TOOLS, hint
from lorakit.recipe.peers.recognize import tool_of
from lorakit.recipe.sections import ModelSection, Section, TrainSection

ENTRIES = [(tool, name, found) for tool, keys in TOOLS.items() for name, found in keys.items()]


def sections(name: str) -> list[type[Section]]:
    """The classes that may stand for a section of a recipe."""
    owned: dict[str, list[type[Section]]] = {
        "model": [ModelSection],
        "train": [TrainSection],
        "adapter": [method.Config for method in registry.methods().values()],
        "task": [task.Config for task in registry.tasks().values()],
    }
    return owned[name]


def accepts(section: type[Section], key: str, value: object) -> bool:
    try:
        section.model_validate({key: value})
    except ValidationError as error:
        return all(detail["loc"][0] != key for detail in error.errors())
    return True


@pytest.mark.parametrize(
    ("tool", "name", "found"), ENTRIES, ids=[f"{t}-{n}" for t, n, _ in ENTRIES]
)
def test_every_counterpart_is_a_key_that_takes_the_values(
    tool: str, name: str, found: Counterpart
) -> None:
    assert found.key or found.note
    assert not (found.key and found.needless)
    if found.key is None:
        return
    section, _, key = found.key.partition(".")
    owners = [owner for owner in sections(section) if key in owner.model_fields]
    assert owners
    for value in found.values.values():
        assert any(accepts(owner, key, value) for owner in owners), value


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("load_in_4bit", True, "use model.base_precision: nf4"),
        ("load_in_4bit", False, "use model.base_precision: null"),
        (
            "load_in_8bit",
            True,
            "see model.base_precision; 8-bit integer bases are not supported; allowed: fp8, nf4",
        ),
        ("report_to", "wandb", 'use train.trackers: ["wandb"]'),
        ("report_to", "mlflow", "see train.trackers; allowed: tensorboard, wandb"),
        ("qlora", True, "use model.base_precision: nf4"),
        ("lora_target_modules", ["q_proj"], 'use adapter.target_modules: ["q_proj"]'),
        ("lora_r", 32, "use adapter.r: 32"),
        ("val_set_size", 0.1, "use task.validation_share: 0.1"),
        (
            "sequence_len",
            2048,
            "use task.max_length: 2048; longer rows are truncated; Axolotl drops them",
        ),
        ("cutoff_len", 1024, "use task.max_length: 1024"),
        ("micro_batch_size", 2, "use train.per_device_batch_size: 2"),
        ("per_device_train_batch_size", 2, "use train.per_device_batch_size: 2"),
        ("num_epochs", 3, "use train.epochs: 3"),
        ("num_train_epochs", 3.0, "use train.epochs: 3.0"),
        ("sample_packing", True, "use task.packing: true"),
        ("lr_scheduler_type", "constant_with_warmup", "use train.lr_scheduler: constant"),
        ("base_model", "org/m", "use model.name_or_path: org/m"),
        ("model_name_or_path", "org/m", "use model.name_or_path: org/m"),
        ("bf16", True, "use model.dtype: bfloat16"),
        ("fp16", True, "use model.dtype: float16"),
        ("fp16", False, "see model.dtype"),
        ("flash_attention", True, "use model.attn_implementation: flash_attention_2"),
        ("max_seq_length", 512, "use task.max_length: 512"),
        ("optim", "adamw_torch", "use train.optimizer: adamw"),
        ("tf32", True, "not needed; the base is in model.dtype, the adapter in float32"),
        (
            "resume_from_checkpoint",
            None,
            "lorakit train RECIPE --resume auto, or --resume DIR",
        ),
        ("nonsense", 1, None),
    ],
)
def test_hints(key: str, value: object, expected: str | None) -> None:
    assert hint(key, value) == expected


def test_one_is_not_true() -> None:
    assert not Counterpart("model.dtype", {True: "bfloat16"}, listed_only=True).translates(1)
    assert Counterpart("model.base_precision", {True: "nf4"}).value_of(1) == 1


@pytest.mark.parametrize(
    ("data", "tool"),
    [
        ({"base_model": "m", "datasets": []}, "Axolotl"),
        ({"model_name_or_path": "m", "stage": "sft"}, "LLaMA-Factory"),
        ({"model": "m", "peft_config": {"name": "lora"}}, "LLaMA-Factory"),
        ({"model_name_or_path": "m"}, None),
        ({"model": {"name_or_path": "m"}, "train": {}}, None),
    ],
)
def test_tools_are_recognized(data: dict[str, Any], tool: str | None) -> None:
    assert tool_of(data) == tool
