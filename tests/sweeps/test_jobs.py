"""Which members train together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit.api import load_sweep
from lorakit.errors import UserError
from lorakit.sweeps.jobs import make_jobs

RECIPE = """\
model: {name_or_path: some/model}
adapter: {r: 8, target_modules: [q, v]}
task: {name: glue/rte}
train: {output_dir: run}
"""


def parts(
    *settings: dict[str, Any], joint: Any = "auto", most: int | None = None
) -> list[tuple[tuple[int, ...], str | None]]:
    Path("recipe.yaml").write_text(RECIPE)
    members = [{"set": own} for own in settings]
    keys = {"recipe": "recipe.yaml", "output_dir": "out", "joint": joint, "max_joint": most}
    sweep = load_sweep({**keys, "members": members})
    return [(job.members, job.reason) for job in make_jobs(sweep.members, sweep.section)]


R = [{"adapter.r": r} for r in range(1, 6)]


def test_members_of_one_base_train_together(in_tmp: Path) -> None:
    assert parts(*R) == [((0, 1, 2, 3, 4), None)]
    assert parts(R[0]) == [((0,), "no other member can join")]
    assert parts(*R[:2], joint=False) == [((0,), "joint is false"), ((1,), "joint is false")]


def test_at_most_so_many_train_together(in_tmp: Path) -> None:
    assert parts(*R, most=2) == [((0, 1), None), ((2, 3), None), ((4,), "max_joint is 2")]
    assert parts(*R[:4], most=3) == [((0, 1), None), ((2, 3), None)]


def test_as_many_as_the_memory_holds_train_together(tiny_bert: Path, in_tmp: Path) -> None:
    small, large = (
        {"model.name_or_path": str(tiny_bert), **own}
        for own in ({}, {"train.per_device_batch_size": 10**9})
    )
    targets = {"adapter.target_modules": ["no_such_module"]}
    assert parts(*({**small, **r} for r in R), {**small, **targets}) == [((0, 1, 2, 3, 4, 5), None)]
    assert parts(*({**large, **r} for r in R[:2])) == [
        ((0,), "only 1 fits in memory"), ((1,), "only 1 fits in memory")
    ]  # fmt: skip


def test_others_train_alone_or_among_themselves(in_tmp: Path) -> None:
    other = [{"model.name_or_path": "another/model", "train.seed": seed} for seed in (1, 2)]
    full = {"adapter.method": "full"}
    assert parts(R[0], other[0], full, R[1], other[1]) == [
        ((0, 3), None),
        ((1, 4), None),
        ((2,), "adapter.method = full trains the base"),
    ]
    ((_, reason), *_) = parts(other[0], R[0], R[1])
    assert reason == "no other member can join"
    *_, (_, reason) = parts(R[0], R[1], other[0])
    assert reason == 'model.name_or_path differs: "some/model" and "another/model"'


def test_all_must_join(in_tmp: Path) -> None:
    assert parts(*R, joint=True) == [((0, 1, 2, 3, 4), None)]
    with pytest.raises(UserError) as caught:
        parts(R[0], {"adapter.method": "full"}, joint=True)
    assert str(caught.value) == (
        "joint = true: member method=full: adapter.method = full trains the base; allowed: auto, false"
    )
