"""Joint training: each member ends as it would alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.joint_runs import assert_equal_to_single_runs, members
from tests.training.runs import WORDS, write_rows

ADALORA = {
    "adapter": {
        "method": "adalora", "target_modules": ["q", "v"], "init_r": 4, "target_r": 2, "tinit": 1,
        "tfinal": 3, "deltaT": 1,
    }
}  # fmt: skip


def adapter(method: str, **keys: Any) -> dict[str, Any]:
    return {"adapter": {"method": method, "target_modules": ["q", "v"], **keys}}


METHODS: dict[str, list[dict[str, Any]]] = {
    "ranks": [{"adapter__r": r} for r in (1, 4, 4, 2)],
    "targets": [{"adapter__target_modules": t} for t in (["q"], ["q", "v"], ["o", "down_proj"])],
    "rates": [{"train__learning_rate": rate} for rate in (1e-3, 1e-2)],
    "seeds": [{"train__seed": seed} for seed in (1, 2, 3)],
    "schedules": [
        {"train__lr_scheduler": "cosine", "train__warmup_ratio": 0.2},
        {"train__lr_scheduler": "constant", "train__epochs": 1, "train__weight_decay": 0.1},
        {"train__max_grad_norm": 0.1, "train__optimizer": "sgd", "train__learning_rate": 1.0},
    ],
    "lora_plus": [adapter("lora_plus"), adapter("lora_plus", loraplus_lr_ratio="auto")],
    "adalora": [ADALORA, {**ADALORA, "train__seed": 3}],
    "dora": [adapter("dora"), adapter("dora", r=2)],
    "others": [
        adapter("lora", init="pissa"),
        adapter("moslora"),
        adapter("lora", bias="lora_only"),
    ],
    "mixed": [adapter("lora", r=3), adapter("dora"), ADALORA, adapter("lora_plus")],
    "dropout": [adapter("lora", lora_dropout=p) for p in (0.0, 0.1, 0.3)],
    "dropout in dora": [adapter("dora", lora_dropout=0.1), adapter("moslora", lora_dropout=0.2)],
    "accumulation": [
        {"train__gradient_accumulation_steps": 2, "train__per_device_batch_size": 4},
        {"train__gradient_accumulation_steps": 3, "train__per_device_batch_size": 2},
        {},
    ],
    "token budgets": [
        {"train__max_tokens_per_batch": 400, "train__per_device_batch_size": None},
        {"train__max_tokens_per_batch": 600, "train__per_device_batch_size": None},
    ],
    "modules_to_save": [
        {"adapter__modules_to_save": ["lm_head"]},
        {"adapter__modules_to_save": ["input_layernorm"]},
        {},
    ],
    "embeddings": [{"adapter__target_modules": ["embed_tokens", "q"]}, {}],
    "output layer": [{"adapter__target_modules": ["q", "lm_head"]}, {}],
    "output layer with dropout": [
        {"adapter__target_modules": ["q", "lm_head"], "adapter__lora_dropout": 0.3},
        {"adapter__target_modules": ["lm_head"]},
    ],
}


@pytest.mark.parametrize("kind", METHODS)
def test_members_equal_single_runs(tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    assert_equal_to_single_runs(members(tmp_path, tiny_llama, "completion", METHODS[kind]))


def test_packed_members_equal_single_runs(tiny_llama: Path, tmp_path: Path) -> None:
    changes = [{"train__seed": 1}, {"train__per_device_batch_size": 2}, {"task__max_length": 96}]
    assert_equal_to_single_runs(
        members(tmp_path, tiny_llama, "completion", changes, task__packing=True)
    )


def test_encoders_with_dropout_equal_single_runs(tiny_bert: Path, tmp_path: Path) -> None:
    """BERT's own dropout, in attention too, and that of the adapter; each member has a head."""
    changes: list[dict[str, Any]] = [
        {"train__seed": 1},
        {"train__seed": 2, "adapter__lora_dropout": 0.2},
        {"train__per_device_batch_size": 5, "adapter__target_modules": ["q", "intermediate.dense"]},
        {"train__group_by_length": False, **ADALORA},
    ]
    assert_equal_to_single_runs(members(tmp_path, tiny_bert, "glue/sst2", changes))


def test_encoders_with_other_adapters_equal_single_runs(tiny_bert: Path, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        adapter("dora", lora_dropout=0.1),
        {"model__attn_implementation": "eager", "train__seed": 4},
    ]
    for own in changes:
        own["model__attn_implementation"] = "eager"
    assert_equal_to_single_runs(members(tmp_path, tiny_bert, "glue/sst2", changes))


def test_members_with_one_seed_have_heads_of_their_own(still_bert: Path, tmp_path: Path) -> None:
    changes = [{"train__seed": seed, "train__learning_rate": seed / 100} for seed in (1, 2)]
    again = [{**change, "adapter__r": 2} for change in changes]
    assert_equal_to_single_runs(members(tmp_path, still_bert, "glue/sst2", changes + again))


def test_heads_may_have_several_numbers_of_classes(still_bert: Path, tmp_path: Path) -> None:
    recipes = []
    for classes in (2, 3):
        folder = tmp_path / str(classes)
        rows = [{"text": WORDS[i % 9], "label": f"class {i % classes}"} for i in range(24)]
        for split in ("train", "validation"):
            write_rows(folder / "data" / f"{split}.jsonl", rows)
        [recipe] = members(folder, still_bert, "classification", [{}])
        recipes.append(recipe)
    assert_equal_to_single_runs(recipes)


def test_members_evaluate_together_or_alone(tiny_llama: Path, tmp_path: Path) -> None:
    """At the same steps and at others, with the same batches and with others."""
    changes = [
        {"train__eval_every_steps": 2},
        {"train__eval_every_steps": 2, "train__seed": 2},
        {"train__eval_every_steps": 3, "adapter__r": 2},
        {"train__eval_every_steps": 2, "train__per_device_eval_batch_size": 3},
        {"train__eval_every_steps": 2, "task__limit_eval": 5},
    ]
    assert_equal_to_single_runs(members(tmp_path, tiny_llama, "completion", changes))


def test_generated_text_is_that_of_single_runs(tiny_llama: Path, tmp_path: Path) -> None:
    changes = [
        {"task__eval_generate": "always"},
        {"task__eval_generate": "end", "train__seed": 2},
    ]
    assert_equal_to_single_runs(
        members(tmp_path, tiny_llama, "completion", changes, task__max_new_tokens=4)
    )
