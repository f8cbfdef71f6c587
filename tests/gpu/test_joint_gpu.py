"""Joint training on a GPU: passes and updates are replayed, and members equal single runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit
from lorakit.recipe.sections import Recipe
from lorakit.training.joint import members_that_fit, train_joint
from lorakit.training.joint.parts import LEAST_ROWS
from lorakit.training.session import RunResult
from tests.training.joint_runs import members, train_alone, weights
from tests.training.runs import completion_rows, eval_lines, log_lines, write_rows

pytestmark = pytest.mark.gpu

LORA = [{"adapter__r": r, "train__seed": seed} for r in (2, 4) for seed in (1, 2)]
ADALORA = {
    "adapter": {
        "method": "adalora", "target_modules": ["q", "v"], "init_r": 4, "target_r": 2, "tinit": 2,
        "tfinal": 4, "deltaT": 2,
    }
}  # fmt: skip
DORA = {"adapter": {"method": "dora", "target_modules": ["q", "v"], "r": 4}}
CASES: dict[str, list[dict[str, Any]]] = {
    "lora": LORA,
    "mixed": [{}, ADALORA, {"adapter__r": 2, "train__per_device_batch_size": 4}, DORA],
    "accumulation": [{"train__gradient_accumulation_steps": 2}, {"train__seed": 3}],
    "sgd": [{"train__optimizer": "sgd", "train__learning_rate": 0.1}, {}],
}


def trained(recipes: list[Recipe], **options: Any) -> tuple[list[RunResult], list[str]]:
    said: list[str] = []
    results = train_joint(recipes, None, said.append, lambda index, result: None, **options)
    found = []
    for result in results:
        assert isinstance(result, RunResult), result
        found.append(result)
    return found, said


def assert_close(result: RunResult, alone: Path, tolerance: float) -> None:
    for ours, theirs in zip(log_lines(result.output_dir), log_lines(alone), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=tolerance)
    for ours, theirs in zip(eval_lines(result.output_dir), eval_lines(alone), strict=True):
        assert ours["eval"]["loss"] == pytest.approx(theirs["eval"]["loss"], abs=tolerance)
    for name, value in weights(result.output_dir).items():
        torch.testing.assert_close(value, weights(alone)[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("task", ["completion", "glue/sst2"])
def test_members_equal_single_runs(
    tiny_llama: Path, still_bert: Path, tmp_path: Path, task: str, case: str
) -> None:
    model = tiny_llama if task == "completion" else still_bert
    recipes = members(tmp_path, model, task, CASES[case], train__epochs=4)
    results, said = trained(recipes)
    assert not [line for line in said if "not replayed" in line]
    for recipe, result in zip(recipes, results, strict=True):
        assert_close(result, train_alone(recipe), 1e-4)


@pytest.mark.parametrize("task", ["completion", "glue/sst2"])
def test_half_precision_is_close_to_single_runs(
    tiny_llama: Path, still_bert: Path, tmp_path: Path, task: str
) -> None:
    model = tiny_llama if task == "completion" else still_bert
    recipes = members(tmp_path, model, task, LORA, train__epochs=4, model__dtype="bfloat16")
    for recipe, result in zip(recipes, trained(recipes)[0], strict=True):
        alone = train_alone(recipe)
        for ours, theirs in zip(log_lines(result.output_dir), log_lines(alone), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-2)


def test_packed_members_in_half_precision_equal_single_runs(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Documents of all members are in one sequence of varlen_attn."""
    changes = [{"train__seed": 1}, {"train__per_device_batch_size": 2}, {"task__max_length": 96}]
    common = {"task__packing": True, "model__dtype": "bfloat16"}
    recipes = members(tmp_path, tiny_llama, "completion", changes, **common)
    for recipe, result in zip(recipes, trained(recipes)[0], strict=True):
        alone = train_alone(recipe)
        for ours, theirs in zip(log_lines(result.output_dir), log_lines(alone), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-2)


def test_dropout_trains(tiny_bert: Path, tmp_path: Path) -> None:
    """On a GPU all members draw from one generator: only the distribution is the same."""
    changes = [{"adapter__lora_dropout": p, "train__epochs": 8} for p in (0.0, 0.1, 0.5)]
    results, said = trained(members(tmp_path, tiny_bert, "glue/sst2", changes))
    assert not [line for line in said if "not replayed" in line]
    for result in results:
        losses = [line["loss"] for line in log_lines(result.output_dir)]
        assert min(losses[-4:]) < losses[0]


def test_members_with_the_same_batches_share_passes(still_bert: Path, tmp_path: Path) -> None:
    changes = [{"adapter__r": r, "train__seed": seed} for seed in (1, 2) for r in (1, 4)]
    common = {"train__per_device_batch_size": LEAST_ROWS // 2, "train__epochs": 4}
    recipes = members(tmp_path, still_bert, "glue/sst2", changes, **common)
    for recipe, result in zip(recipes, trained(recipes)[0], strict=True):
        assert_close(result, train_alone(recipe), 1e-4)


def test_members_that_end_leave_the_others(tiny_llama: Path, tmp_path: Path) -> None:
    """What was captured refers to memory of members that have ended, and is captured again."""
    steps = (4, 20, 12)
    changes = [{"train__epochs": None, "train__max_steps": count} for count in steps]
    recipes = members(tmp_path, tiny_llama, "completion", changes)
    for recipe, result in zip(recipes, trained(recipes)[0], strict=True):
        assert_close(result, train_alone(recipe), 1e-4)


def test_members_resume(tiny_llama: Path, tmp_path: Path) -> None:
    recipes = members(tmp_path, tiny_llama, "completion", LORA, train__save_every_steps=3)
    stopped: list[int] = []

    def stop_at(index: int, step: int, metrics: dict[str, float] | None) -> bool:
        if metrics is not None and step == 4:
            stopped.append(index)
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        trained(recipes, stop_at=stop_at)
    results = train_joint(recipes, "auto", lambda text: None, lambda index, result: None)
    for recipe, result in zip(recipes, results, strict=True):
        assert isinstance(result, RunResult), result
        assert_close(result, train_alone(recipe), 1e-4)


def peak_bytes(recipes: list[Recipe]) -> tuple[int, int]:
    """The most memory that training them together allocates, and takes from the device."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trained(recipes)
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def test_a_step_that_does_not_fit_is_split(tiny_llama: Path, tmp_path: Path) -> None:
    """The members of a pass are halved until it fits: two do, and all of them do not, even if the
    allocator wasted nothing."""
    changes = [{"train__learning_rate": 1e-3 * (1 + index)} for index in range(8)]
    common = {"train__compile": False, "train__per_device_batch_size": 128}
    for name in ("limited", "few", "all"):
        write_rows(tmp_path / name / "data/train.jsonl", completion_rows(256))
        write_rows(tmp_path / name / "data/validation.jsonl", completion_rows(8))
    recipes, few, all_of_them = (
        members(tmp_path / name, tiny_llama, "completion", changes[:count], **common)
        for name, count in (("limited", 8), ("few", 2), ("all", 8))
    )
    least, most = peak_bytes(few)[1], peak_bytes(all_of_them)[0]
    assert most > least + 128 * 2**20, "blocks of the allocator have up to 20 MiB"
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((least + most) / 2 / total)
    try:
        results, said = trained(recipes)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("out of memory: training " in line for line in said)
    for recipe, result in zip(recipes, results, strict=True):
        assert_close(result, train_alone(recipe), 1e-4)


def test_members_are_counted_by_the_memory_of_the_device(tiny_llama: Path, tmp_path: Path) -> None:
    recipes = members(tmp_path, tiny_llama, "completion", LORA)
    assert members_that_fit(recipes, torch.device("cuda")) == len(recipes)
    assert lorakit.train(recipes[0]).steps
