from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.errors import Problem, RecipeError, UserError
from lorakit.recipe.load import Overrides, load_recipe

Write = Callable[[str], Path]

GOOD = """\
model:
  name_or_path: some/model
  dtype: float32
adapter:
  method: lora
  r: 4
  target_modules: [q, k]
task:
  name: completion
  path: data.jsonl
train:
  output_dir: runs/x
  learning_rate: 2e-4
"""


def problems(path: Path, overrides: Overrides | None = None) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return list(caught.value.problems)


def only(path: Path, overrides: Overrides | None = None) -> Problem:
    (problem,) = problems(path, overrides)
    return problem


def test_types_and_defaults(write: Write) -> None:
    recipe = load_recipe(write(GOOD))
    assert type(recipe.adapter).__name__ == "LoraConfig"
    assert recipe.adapter.model_dump()["r"] == 4
    assert recipe.train.learning_rate == 2e-4
    assert (recipe.train.epochs, recipe.train.max_steps) == (3.0, None)
    assert (recipe.train.warmup_ratio, recipe.train.warmup_steps) == (0.06, None)
    assert recipe.train.seed == 42


def test_the_other_key_of_a_pair_stays_null(write: Write) -> None:
    train = load_recipe(write(GOOD), ["train.max_steps=5", "train.warmup_steps=0"]).train
    assert (train.epochs, train.max_steps) == (None, 5)
    assert (train.warmup_ratio, train.warmup_steps) == (None, 0)


def test_a_string_becomes_a_list(write: Write) -> None:
    recipe = load_recipe(write(GOOD), {"adapter.target_modules": "all-linear"})
    assert recipe.adapter.target_modules == ["all-linear"]


def test_an_empty_section_has_defaults(write: Write) -> None:
    text = GOOD.replace("  method: lora\n  r: 4\n  target_modules: [q, k]\n", "")
    recipe = load_recipe(write(text))
    assert (recipe.adapter.method, recipe.adapter.target_modules) == ("lora", ["q", "v"])


def test_environment_variables(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_TEST_R", "16")
    monkeypatch.delenv("LORAKIT_TEST_UNSET", raising=False)
    path = write(GOOD.replace("r: 4", "r: ${LORAKIT_TEST_R}"))
    assert load_recipe(path).adapter.model_dump()["r"] == 16
    problem = only(write(GOOD.replace("r: 4", "r: ${LORAKIT_TEST_UNSET}")))
    assert (problem.line, problem.key) == (6, "adapter.r")
    assert "LORAKIT_TEST_UNSET is not set" in problem.message


def test_overrides_apply_before_validation(write: Write) -> None:
    bad = write(GOOD.replace("r: 4", "r: four"))
    assert load_recipe(bad, ["adapter.r=2"]).adapter.model_dump()["r"] == 2
    problem = only(write(GOOD), ["adapter.r=four"])
    assert (
        str(problem)
        == '--set: adapter.r = "four": wrong type (a string); allowed: an integer > 0 and <= 65536'
    )


def test_all_problems_are_listed_in_file_order(write: Write) -> None:
    text = (
        GOOD.replace("float32", "float64")
        .replace("r: 4", "r: 0\n  r: 3")
        .replace("name: completion", "name: completions\n  max_length: '8'")
        .replace("learning_rate: 2e-4", "lerning_rate: 1\n  epochs: 1\n  max_steps: 2\n  seed: -1")
    )
    found = problems(write(text), ["model.revison=x"])
    assert [problem.line for problem in found] == [3, 6, 7, 10, 11, 15, 17, 18, None]
    assert all(problem.file for problem in found)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "dtype: float32",
            "dtype: float23",
            "r, line 3: model.dtype = \"float23\": unknown value (did you mean 'float32'?); "
            "allowed: float32, bfloat16, float16",
        ),
        (
            "r: 4",
            "r: 0",
            "r, line 6: adapter.r = 0: out of range; allowed: an integer > 0 and <= 65536",
        ),
        (
            "r: 4",
            "r: 4.5",
            "r, line 6: adapter.r = 4.5: wrong type (a float); allowed: an integer > 0 and <= 65536",
        ),
        (
            "r: 4",
            "r: true",
            "r, line 6: adapter.r = true: wrong type (true or false); allowed: an integer > 0 and <= 65536",
        ),
        (
            "r: 4",
            "r:",
            "r, line 6: adapter.r = null: wrong type (null); allowed: an integer > 0 and <= 65536",
        ),
        (
            "r: 4",
            "r: '4'",
            'r, line 6: adapter.r = "4": a quoted value is a string; remove the quotes; '
            "allowed: an integer > 0 and <= 65536",
        ),
        (
            "[q, k]",
            "[q, 3]",
            "r, line 7: adapter.target_modules[1] = 3: wrong type (an integer); allowed: a non-empty string",
        ),
        (
            "[q, k]",
            "[]",
            "r, line 7: adapter.target_modules = []: must not be empty; "
            "allowed: a non-empty list of strings or a non-empty string",
        ),
        (
            "path: data.jsonl",
            "path: 3",
            "r, line 10: task.path = 3: wrong type (an integer); allowed: a non-empty string or a "
            "mapping with path, name, split, weight or a non-empty list of strings or a mapping of "
            "names to strings or lists of strings or null",
        ),
        (
            "learning_rate: 2e-4",
            "learning_rate: .nan",
            "r, line 13: train.learning_rate = NaN: not a finite number; allowed: a number > 0",
        ),
        (
            "learning_rate: 2e-4",
            "learning_rate: 1e999",
            "r, line 13: train.learning_rate = Infinity: not a finite number; allowed: a number > 0",
        ),
        (
            "learning_rate: 2e-4",
            "compile: yes",
            'r, line 13: train.compile = "yes": unknown value; allowed: auto or true or false',
        ),
        (
            "learning_rate: 2e-4",
            "warmup_ratio: 1",
            "r, line 13: train.warmup_ratio = 1: out of range; allowed: a number >= 0 and < 1 or null",
        ),
        (
            "  output_dir: runs/x\n",
            "",
            "r, line 11: train.output_dir: required key is missing; allowed: a non-empty string",
        ),
        (
            "path: data.jsonl",
            "path: {train: 3}",
            'r, line 10: task.path = {"train": 3}: contains an invalid value; allowed: '
            "a non-empty string or a mapping with path, name, split, weight or a non-empty list of "
            "strings or a mapping of names to strings or "
            "lists of strings or null",
        ),
        (
            "path: data.jsonl",
            "path: {}",
            "r, line 10: task.path = {}: must not be empty; allowed: a non-empty string or a "
            "mapping with path, name, split, weight or a non-empty list of strings or a mapping of names to strings or lists of strings or null",
        ),
    ],
)
def test_messages(write: Write, old: str, new: str, expected: str) -> None:
    path = write(GOOD.replace(old, new))
    assert str(only(path)) == expected.replace("r,", f"{path},", 1)


@pytest.mark.parametrize(
    ("section", "key", "hint"),
    [
        ("train", "lerning_rate", "did you mean 'learning_rate'?"),
        ("train", "lr", "did you mean 'learning_rate'?"),
        ("train", "Learning-Rate", "did you mean 'learning_rate'?"),
        ("adapter", "rank", "did you mean 'r'?"),
        ("adapter", "learning_rate", "it belongs under train"),
        ("adapter", "lr", "did you mean 'learning_rate'? it belongs under train"),
        ("train", "r", "it belongs under adapter"),
        ("train", "dtype", "it belongs under model"),
        ("model", "max_length", "it belongs under task"),
        ("task", "regression", "it is a key of the task"),
    ],
)
def test_unknown_keys(write: Write, section: str, key: str, hint: str) -> None:
    problem = only(write(GOOD), {f"{section}.{key}": 1})
    assert problem.key == f"{section}.{key}"
    assert problem.message.startswith("unknown key (")
    assert hint in problem.message
    assert problem.allowed is None


def test_a_key_without_suggestion_lists_the_known_keys(write: Write) -> None:
    problem = only(write(GOOD), ["model.zzz=1"])
    assert problem.message == "unknown key"
    assert "name_or_path" in (problem.allowed or "")


@pytest.mark.parametrize(
    ("section", "key", "value", "hint"),
    [
        ("adapter", "lora_r", 4, "use adapter.r: 4"),
        ("model", "load_in_4bit", True, "use model.base_precision: nf4"),
        ("train", "lora_alpha", 16, "it belongs under adapter"),
        ("task", "warmup_steps", 5, "it belongs under train"),
    ],
)
def test_keys_of_other_tools(
    write: Write, section: str, key: str, value: object, hint: str
) -> None:
    problem = only(write(GOOD), {f"{section}.{key}": value})
    assert (problem.message, problem.allowed) == (f"unknown key ({hint})", None)


def test_a_key_of_another_tool_at_the_top(write: Write) -> None:
    problem = only(write(GOOD + "num_epochs: 3\n"))
    assert problem.message == "unknown section; use train.epochs: 3"


@pytest.mark.parametrize(
    ("text", "tool"),
    [
        ("base_model: m\nmicro_batch_size: 2\n", "Axolotl"),
        ("model_name_or_path: m\nstage: sft\ncutoff_len: 9\n", "LLaMA-Factory"),
    ],
)
def test_a_file_of_another_tool_is_one_problem(write: Write, text: str, tool: str) -> None:
    problem = only(path := write(text))
    hint = f"hint: lorakit convert-recipe {path} --output recipe.yaml"
    assert problem.message == f"written for {tool}; {hint}"


@pytest.mark.parametrize(
    ("key", "hint"),
    [("trian", "did you mean 'train'?"), ("learning_rate", "it belongs under train"), ("zzz", "")],
)
def test_unknown_sections(write: Write, key: str, hint: str) -> None:
    problem = only(write(GOOD + f"{key}: {{}}\n"))
    assert problem.line == 14
    assert problem.message.startswith("unknown section")
    assert hint in problem.message
    assert problem.allowed == "model, adapter, task, train"


def test_a_misspelled_section_is_one_problem(write: Write) -> None:
    problem = only(write(GOOD.replace("train:", "trian:")))
    assert "did you mean 'train'?" in problem.message


def test_missing_sections(write: Write) -> None:
    found = problems(write("model: {name_or_path: m}\n"))
    assert [problem.key for problem in found] == ["adapter", "task", "train"]


@pytest.mark.parametrize("value", ["3", "[a]", "text"])
def test_a_section_is_a_mapping(write: Write, value: str) -> None:
    problem = only(write(GOOD), [f"adapter={value}"])
    assert (problem.key, problem.allowed) == ("adapter", "a mapping of keys")


def test_common_keys_are_checked_with_an_unknown_method(write: Write) -> None:
    text = GOOD.replace("method: lora", "method: loro\n  own_key: 1\n  layers: [-1]")
    found = problems(write(text))
    assert [problem.key for problem in found] == ["adapter.method", "adapter.layers"]
    assert "did you mean 'lora'?" in found[0].message
    assert "lora" in (found[0].allowed or "")


def test_common_keys_are_checked_with_an_unknown_task(write: Write) -> None:
    text = GOOD.replace("name: completion", "name: wikisqll\n  own_key: 1\n  limit_train: 0")
    found = problems(write(text))
    assert [problem.key for problem in found] == ["task.name", "task.limit_train"]
    assert "did you mean 'wikisql'?" in found[0].message


@pytest.mark.parametrize(("section", "key"), [("adapter", "method"), ("task", "name")])
@pytest.mark.parametrize("value", [3, None, "", ["lora"]])
def test_a_name_of_the_wrong_type(write: Write, section: str, key: str, value: object) -> None:
    assert only(write(GOOD), {f"{section}.{key}": value}).key == f"{section}.{key}"


def test_conflicts_are_reported_with_other_problems(write: Write) -> None:
    text = GOOD.replace(
        "2e-4", "-1\n  epochs: 1\n  max_steps: 2\n  warmup_ratio: 0\n  warmup_steps: 1"
    )
    keys = [problem.key for problem in problems(write(text))]
    assert keys == ["train.learning_rate", "train.max_steps", "train.warmup_steps"]


def test_a_sweep_file_is_named_as_such(write: Write) -> None:
    for text in ("recipe: r.yaml\ngrid: {adapter.r: [1, 2]}\n", "recipe: r.yaml\nmembers: []\n"):
        file = write(text)
        [problem] = problems(file)
        assert str(problem) == f"{file}: a sweep, not a recipe; hint: lorakit sweep {file}"


def test_a_recipe_error_is_a_user_error() -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("no/such/recipe.yaml")
    assert caught.value.exit_code == 2
