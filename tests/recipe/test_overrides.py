from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import RecipeError
from lorakit.recipe.load import load_recipe
from lorakit.recipe.overrides import Overrides, apply_overrides
from lorakit.recipe.yaml_source import YamlFile
from tests.recipe.conftest import Write


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


RECIPE = """
model: {name_or_path: base}
adapter:
task: {name: glue/sst2}
train:
  output_dir: run
  KEYS
"""


@pytest.mark.parametrize(
    ("keys", "override", "expected", "note"),
    [
        (
            "epochs: 2", "train.max_steps=10", {"max_steps": 10, "epochs": None},
            "--set train.max_steps = 10: replaces train.epochs = 2 of ",
        ),
        (
            "max_steps: 9", "train.epochs=0.5", {"max_steps": None, "epochs": 0.5},
            "--set train.epochs = 0.5: replaces train.max_steps = 9 of ",
        ),
        (
            "warmup_ratio: 0.1", "train.warmup_steps=3", {"warmup_steps": 3, "warmup_ratio": None},
            "--set train.warmup_steps = 3: replaces train.warmup_ratio = 0.1 of ",
        ),
        ("epochs: 2", "train.max_steps=null", {"max_steps": None, "epochs": 2.0}, None),
        ("seed: 3", "train.max_steps=10", {"max_steps": 10, "epochs": None}, None),
    ],
)  # fmt: skip
def test_an_override_replaces_the_key_that_it_excludes(
    keys: str, override: str, expected: dict[str, object], note: str | None, write: Write
) -> None:
    path, notes = write(RECIPE.replace("KEYS", keys)), []
    train = load_recipe(path, [override], say=notes.append).train
    assert {key: getattr(train, key) for key in expected} == expected
    assert notes == ([] if note is None else [f"{note}{path}"])


@pytest.mark.parametrize(
    ("keys", "overrides"),
    [
        ("{epochs: 2, max_steps: 9}", []),
        ("{}", ["train.epochs=2", "train.max_steps=9"]),
        ("{}", {"train": {"output_dir": "x", "epochs": 2, "max_steps": 9}}),
    ],
)
def test_two_keys_of_the_same_source_are_an_error(
    keys: str, overrides: Overrides, write: Write
) -> None:
    keys = keys.strip("{}").replace(", ", "\n  ")
    with pytest.raises(RecipeError, match=r"train\.max_steps = 9: cannot be set together with"):
        load_recipe(write(RECIPE.replace("KEYS", keys)), overrides)
