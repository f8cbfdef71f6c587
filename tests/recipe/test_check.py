from __future__ import annotations

import pytest
from pydantic import ValidationError

from lorakit.errors import Problem, RecipeError
from lorakit.methods.lora import LoraConfig
from lorakit.recipe.check import METRIC_NAMES, check_recipe, check_sections
from lorakit.recipe.sections import AdapterSection, ModelSection, Recipe, TaskSection, TrainSection
from lorakit.tasks.completion import CompletionConfig


def recipe(
    model: dict[str, object] | None = None,
    adapter: dict[str, object] | None = None,
    task: dict[str, object] | None = None,
    train: dict[str, object] | None = None,
) -> Recipe:
    return Recipe(
        model=ModelSection.model_validate({"name_or_path": "m", **(model or {})}),
        adapter=LoraConfig.model_validate(adapter or {}),
        task=CompletionConfig.model_validate(task or {}),
        train=TrainSection.model_validate({"output_dir": "runs/x", **(train or {})}),
    )


def only(bad: Recipe) -> Problem:
    with pytest.raises(RecipeError) as caught:
        check_recipe(bad)
    (problem,) = caught.value.problems
    return problem


def test_a_recipe_built_in_python_has_the_defaults_filled() -> None:
    built = recipe()
    check_recipe(built)
    assert (built.train.epochs, built.train.warmup_ratio) == (3.0, 0.06)
    assert recipe(train={"max_steps": 3}).train.epochs is None


@pytest.mark.parametrize("pair", [("epochs", "max_steps"), ("warmup_ratio", "warmup_steps")])
def test_pairs(pair: tuple[str, str]) -> None:
    values = {pair[0]: 0.5, pair[1]: 1}
    problem = only(recipe(train=dict(values)))
    assert problem.key == f"train.{pair[1]}"
    assert pair[0] in problem.message


def test_float16_needs_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    half = recipe(model={"dtype": "float16"})
    monkeypatch.setattr("lorakit.recipe.check.has_accelerator", lambda: True)
    check_recipe(half)
    monkeypatch.setattr("lorakit.recipe.check.has_accelerator", lambda: False)
    problem = only(half)
    assert (problem.key, problem.allowed) == ("model.dtype", "bfloat16, float32")
    check_recipe(recipe(model={"dtype": "bfloat16"}))


@pytest.mark.parametrize("layers", [None, [0, 3], "0-5,11"])
def test_layers(layers: object) -> None:
    check_recipe(recipe(adapter={"layers": layers}))


@pytest.mark.parametrize("layers", ["5-2", "all", "1,,2"])
def test_bad_layers(layers: str) -> None:
    problem = only(recipe(adapter={"layers": layers}))
    assert (problem.key, problem.value) == ("adapter.layers", layers)


@pytest.mark.parametrize("key", ["target_modules", "target_parameters"])
@pytest.mark.parametrize("target", ["re:(", "re:", "re:[z-a]", "re:a{99999999999}"])
def test_bad_regular_expressions(target: str, key: str) -> None:
    problem = only(recipe(adapter={key: ["q", target]}))
    assert problem.key == f"adapter.{key}[1]"
    assert "regular expression" in problem.message


def test_a_good_regular_expression() -> None:
    check_recipe(recipe(adapter={"target_modules": [r"re:.*layers\.(0|1)\.q_proj$"]}))


def test_packing() -> None:
    packed = recipe(task={"packing": True})
    check_recipe(packed)
    (fault,) = check_sections(None, None, packed.task, None, "encoder")
    assert fault.message == "an encoder task cannot pack rows"


def test_metric_names() -> None:
    for name in METRIC_NAMES:
        check_recipe(recipe(train={"metric_for_best_model": name}))
    problem = only(recipe(train={"metric_for_best_model": "acuracy"}))
    assert "did you mean 'accuracy'?" in problem.message


def test_warmup_longer_than_the_run() -> None:
    check_recipe(recipe(train={"max_steps": 10, "warmup_steps": 10}))
    problem = only(recipe(train={"max_steps": 10, "warmup_steps": 11}))
    assert (problem.key, problem.value) == ("train.warmup_steps", 11)
    assert (problem.message, problem.allowed) == (
        "more than train.max_steps = 10",
        "0 to 10",
    )


def test_method_and_task_must_fit_their_config() -> None:
    bad = Recipe(
        model=ModelSection(name_or_path="m"),
        adapter=AdapterSection(method="lora"),
        task=TaskSection(name="nothing"),
        train=TrainSection(output_dir="x"),
    )
    with pytest.raises(RecipeError) as caught:
        check_recipe(bad)
    assert [problem.key for problem in caught.value.problems] == ["task.name", "adapter"]


def test_sections_are_immutable() -> None:
    with pytest.raises(ValidationError):
        recipe().train.seed = 3  # type: ignore[misc]


def test_streaming_requires_max_steps() -> None:
    streaming = {"streaming": True}
    check_recipe(recipe(task=streaming, train={"max_steps": 10}))
    for train in ({}, {"epochs": 2.0}):
        problem = only(recipe(task=streaming, train=dict(train)))
        assert (problem.key, problem.allowed) == (
            "train.max_steps",
            "a number of steps, instead of epochs",
        )
    budget = {"max_steps": 10, "max_tokens_per_batch": 4096}
    assert only(recipe(task=streaming, train=dict(budget))).key == "train.max_tokens_per_batch"
    check_recipe(recipe(task={**streaming, "packing": True}, train=dict(budget)))


def test_a_deterministic_run_is_not_compiled() -> None:
    problem = only(recipe(train={"deterministic": True, "compile": True}))
    assert (problem.key, problem.value, problem.allowed) == ("train.compile", True, "auto, false")
    for choice in ("auto", False):
        check_recipe(recipe(train={"deterministic": True, "compile": choice}))
    check_recipe(recipe(train={"compile": True}))


AUTO = {"per_device_batch_size": "auto", "rows_per_step": 32}


@pytest.mark.parametrize(
    ("train", "task", "key", "message"),
    [
        ({"rows_per_step": 32}, {}, "rows_per_step", "only allowed with"),
        (
            {**AUTO, "gradient_accumulation_steps": 2},
            {},
            "gradient_accumulation_steps",
            "it follows from train.rows_per_step",
        ),
        ({**AUTO, "max_tokens_per_batch": 4096}, {}, "max_tokens_per_batch", "cannot be set"),
        (
            {**AUTO, "gradient_checkpointing": "offload"},
            {},
            "per_device_batch_size",
            "gradient_checkpointing: offload",
        ),
        (
            {**AUTO, "max_steps": 3},
            {"streaming": True},
            "per_device_batch_size",
            "the longest rows are unknown",
        ),
    ],
)
def test_an_automatic_batch_size(
    train: dict[str, object], task: dict[str, object], key: str, message: str
) -> None:
    problem = only(recipe(train=train, task=task))
    assert problem.key == f"train.{key}"
    assert message in problem.message


def test_what_an_automatic_batch_size_needs() -> None:
    check_recipe(recipe(train=AUTO, task={"packing": True}))
    assert recipe(train=AUTO).eval_batch_size == 8
    assert recipe(train={**AUTO, "per_device_eval_batch_size": 3}).eval_batch_size == 3
