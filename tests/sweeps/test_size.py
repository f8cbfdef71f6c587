"""Trained parameters without training, and the rank for a budget of them."""

from __future__ import annotations

from pathlib import Path

import pytest

import lorakit
from lorakit.api import plan_sweep
from lorakit.errors import UserError
from lorakit.sweeps.size import nearest_rank
from tests.sweeps.files import write_sweep
from tests.training.runs import recipe_for, tree

METHODS = ("lora", "dora", "moslora", "lora_plus", "adalora", "intrinsic", "full")


@pytest.mark.parametrize("task", ["glue/sst2", "completion"])
def test_a_plan_counts_what_a_run_trains(
    task: str, still_bert: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    model = tiny_llama if task == "completion" else still_bert
    members = [{"name": name, "set": {"adapter.method": name}} for name in METHODS]
    members.append({"name": "pissa", "set": {"adapter.init": "pissa"}})
    if task == "completion":
        members.append({"name": "saved", "set": {"adapter.modules_to_save": ["norm"]}})
    file = write_sweep(tmp_path, model, task, members=members)
    before = tree(tmp_path)
    plan = plan_sweep(file)
    assert tree(tmp_path) == before
    result = lorakit.sweep(file)
    assert [(member.name, member.trainable_parameters) for member in plan.members] == [
        (member.name, member.trainable_parameters) for member in result.members
    ]


def test_a_plan_counts_what_starts_from_an_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    earlier = lorakit.train(recipe_for(tmp_path / "earlier", tiny_llama, "completion"))
    members = [{"name": "more", "set": {"adapter.init_from": str(earlier.adapter_dir)}}]
    file = write_sweep(tmp_path, tiny_llama, members=members)
    (planned,) = plan_sweep(file).members
    assert planned.error is None
    (trained,) = lorakit.sweep(file).members
    assert trained.status == "completed"
    assert planned.trainable_parameters == trained.trainable_parameters


def test_the_nearest_rank() -> None:
    assert [nearest_rank(budget, lambda r: 10 * r) for budget in (1, 14, 15, 16, 1000, 10**9)] == [
        1, 1, 1, 2, 100, 2**16
    ]  # fmt: skip
    assert nearest_rank(100, lambda r: 7) == 1


def test_a_budget_chooses_ranks(still_bert: Path, tmp_path: Path) -> None:
    members = [
        {"name": "q", "set": {"adapter.target_modules": ["q"]}},
        {"name": "qkvo", "set": {"adapter.target_modules": ["q", "k", "v", "o"]}},
        {"name": "ada", "set": {"adapter.method": "adalora", "adapter.target_modules": ["q"]}},
    ]
    file = write_sweep(
        tmp_path, still_bert, "glue/sst2", members=members, trainable_parameters=1100
    )
    notes: list[str] = []
    plan = plan_sweep(file, say=notes.append)
    # Each matrix has 64 parameters for each rank, in 2 layers, and the head has 66.
    assert [member.set for member in plan.members] == [
        {"adapter.target_modules": ["q"], "adapter.r": 8},
        {"adapter.target_modules": ["q", "k", "v", "o"], "adapter.r": 2},
        {"adapter.method": "adalora", "adapter.target_modules": ["q"], "adapter.target_r": 8},
    ]
    assert [member.trainable_parameters for member in plan.members[:2]] == [1090, 1090]
    assert notes[0] == "q: adapter.r = 8: 1,090 parameters for a budget of 1,100"
    result = lorakit.sweep(file)
    assert [member.status for member in result.members[:2]] == ["completed"] * 2
    recipe = lorakit.load_recipe(tmp_path / "out" / "members" / "qkvo" / "recipe.yaml")
    assert recipe.flat()["adapter.r"] == 2


@pytest.mark.parametrize(
    ("method", "budget", "message"),
    [
        # Each matrix of 32 x 32 has 64 parameters for each rank, in 2 layers, and the head has 66.
        ("lora", 193, "few parameters; allowed: 194 to 4162, with adapter.r from 1 to 32"),
        ("lora", 10**9, "many parameters; allowed: 194 to 4162, with adapter.r from 1 to 32"),
        (
            "adalora",
            10**9,
            "many parameters; allowed: 196 to 2796, with adapter.target_r from 1 to 21",
        ),
    ],
)
def test_a_budget_out_of_reach(
    method: str, budget: int, message: str, still_bert: Path, tmp_path: Path
) -> None:
    file = write_sweep(
        tmp_path, still_bert, "glue/sst2", trainable_parameters=budget,
        members=[{"name": "q", "set": {"adapter.method": method, "adapter.target_modules": ["q"]}}],
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        plan_sweep(file)
    assert str(caught.value) == (
        f"{file}, line 1: trainable_parameters = {budget}: member q cannot train that {message}"
    )


def test_a_method_without_a_rank(still_bert: Path, tmp_path: Path) -> None:
    file = write_sweep(
        tmp_path, still_bert, "glue/sst2", trainable_parameters=1000,
        members=[{"name": "b", "set": {"adapter.method": "bitfit"}}],
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        plan_sweep(file)
    assert str(caught.value) == (
        f'{file}, line 1: trainable_parameters: member b: adapter.method = "bitfit" has no rank to '
        "choose; allowed: null, or methods with the key r or target_r"
    )


def test_a_plan_tells_which_member_would_fail(tiny_llama: Path, tmp_path: Path) -> None:
    grid = {"adapter.target_modules": [["q"], ["nothing"]]}
    plan = plan_sweep(write_sweep(tmp_path, tiny_llama, grid=grid))
    good, bad = plan.members
    assert (good.trainable_parameters, good.error) == (512, None)
    assert bad.trainable_parameters is None
    assert bad.error is not None and "nothing" in bad.error
