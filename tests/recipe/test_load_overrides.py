from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit.recipe.load import Overrides, apply_overrides
from lorakit.recipe.yaml_source import YamlFile


def source() -> YamlFile:
    data: dict[str, Any] = {"train": {"seed": 1, "epochs": 3}, "task": {"path": "x"}}
    lines = {("train",): 1, ("train", "seed"): 2, ("train", "epochs"): 3, ("task", "path"): 4}
    return YamlFile("r.yaml", data, dict(lines))


@pytest.mark.parametrize(
    ("overrides", "path", "value"),
    [
        (["train.seed=7"], ("train", "seed"), 7),
        (["train.learning_rate = 2e-4"], ("train", "learning_rate"), 2e-4),
        (["train.output_dir=a=b"], ("train", "output_dir"), "a=b"),
        (["train.epochs=null"], ("train", "epochs"), None),
        (["train.epochs="], ("train", "epochs"), None),
        (["adapter.target_modules=[q, k]"], ("adapter", "target_modules"), ["q", "k"]),
        (["task.path={train: a}"], ("task", "path"), {"train": "a"}),
        (["train.seed=1", "train.seed=2"], ("train", "seed"), 2),
        ({"train.seed": 7}, ("train", "seed"), 7),
        ({"train.output_dir": Path("a/b")}, ("train", "output_dir"), "a/b"),
        ({"adapter.target_modules": ("q",)}, ("adapter", "target_modules"), ["q"]),
        ({"train.output_dir": "[x"}, ("train", "output_dir"), "[x"),
    ],
)
def test_values(overrides: Overrides, path: tuple[str, str], value: object) -> None:
    changed = source()
    assert apply_overrides(changed, overrides) == []
    assert changed.data[path[0]][path[1]] == value
    assert path in changed.overridden
    assert path not in changed.lines


def test_everything_after_the_second_dot_is_one_key() -> None:
    changed = source()
    assert apply_overrides(changed, ["adapter.rank_pattern.layers.0.q_proj=4"]) == []
    assert changed.data["adapter"] == {"rank_pattern": {"layers.0.q_proj": 4}}


def test_a_whole_section() -> None:
    changed = source()
    assert apply_overrides(changed, {"train": {"seed": 3}}) == []
    assert changed.data["train"] == {"seed": 3}
    assert ("train", "seed") not in changed.lines


@pytest.mark.parametrize(
    ("override", "key", "message"),
    [
        ("train.seed", "", "'train.seed' has no '='"),
        ("=1", "", "empty key"),
        ("train.=1", "train.", "empty key"),
        ("train.seed=[1", "train.seed", "not valid YAML"),
        ("train.seed=!!int 1", "train.seed", "tag"),
        ("train.seed={a: 1, a: 2}", "train.seed", "duplicate key 'a'"),
        ("task.path.train=x", "task.path.train", "task.path has no keys"),
    ],
)
def test_faults(override: str, key: str, message: str) -> None:
    changed = source()
    (fault,) = apply_overrides(changed, [override])
    problem = fault.locate(changed)
    assert (problem.file, problem.line, problem.key) == ("--set", None, key)
    assert message in problem.message
    assert changed.data == source().data
