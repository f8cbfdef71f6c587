from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml

from lorakit.methods.lora import LoraConfig
from lorakit.recipe.export import recipe_text, write_recipe
from lorakit.recipe.load import load_recipe
from lorakit.recipe.sections import ModelSection, Recipe, TrainSection
from lorakit.tasks.completion import CompletionConfig

AWKWARD = [
    "no", "yes", "null", "~", "2e-4", "1.0", "007", "0x1F", "1_000", "true", ".nan", "-", "- a",
    " lead", "trail ", "a: b", "a #b", "'", '"', "\\", "{x}", "[x]", "*a", "&a", "!a", "%a", "@a",
    "`a`", "|", ">", "?", "<<", "=", "2026-01-01", "12:30", "é", "日本", "😀", "\u0085", "\u2028",
    "\ufeff", "a\nb\n", "\ttab", "\r", "\x07", "${HOME}", "$${X}", "$$${X}", "${", "$",
    "long " * 60, "re:.*\\.q_proj$",
]  # fmt: skip


def recipe(text: str = "x", number: float = 2e-4, steps: int | None = None) -> Recipe:
    return Recipe(
        model=ModelSection(name_or_path=text),
        adapter=LoraConfig(target_modules=[text, "v"], rank_pattern={text: 3}, layers=[0, 2]),
        task=CompletionConfig(path={"train": text}, prompt_column=text),
        train=TrainSection(
            output_dir="run", learning_rate=number, adam_epsilon=number, max_steps=steps
        ),
    )


def assert_survives(original: Recipe, path: Path) -> None:
    write_recipe(original, path)
    assert load_recipe(path) == original
    assert yaml.safe_load(path.read_bytes()) is not None, "other readers must read it too"


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_texts(text: str, tmp_path: Path) -> None:
    assert_survives(recipe(text), tmp_path / "r.yaml")


@pytest.mark.parametrize("number", [1e-8, 5e-324, 1.7e308, 0.1, 1 / 3, 1e16, 123456789.0, 1e22, 3])
def test_numbers(number: float, tmp_path: Path) -> None:
    assert_survives(recipe(number=number), tmp_path / "r.yaml")


def test_random_recipes(tmp_path: Path) -> None:
    chance = random.Random(0)
    alphabet = "ab019.e-+:#'\"\\{}[]$ \n\t\u00e9\u2028!&*%@`|>,?~_\x00\x7f\x9f\U0001f600"
    for _ in range(60):
        text = "".join(chance.choices(alphabet, k=chance.randint(1, 12)))
        number = 10 ** chance.uniform(-300, 300)
        assert_survives(recipe(text, number, chance.choice([None, 7])), tmp_path / "r.yaml")


def test_keys_are_written_in_order(tmp_path: Path) -> None:
    write_recipe(recipe(), tmp_path / "r.yaml")
    written = yaml.safe_load((tmp_path / "r.yaml").read_text(encoding="utf-8"))
    assert list(written) == ["model", "adapter", "task", "train"]
    assert list(written["adapter"]) == [
        "method", "init_from", "r", "lora_alpha", "lora_dropout", "target_modules",
        "target_parameters", "layers", "rank_pattern", "alpha_pattern", "modules_to_save", "bias",
        "use_rslora", "init",
    ]  # fmt: skip
    assert set(written["train"]) == set(TrainSection.model_fields)
    assert (written["train"]["epochs"], written["train"]["max_steps"]) == (3.0, None)


def test_writing_twice_is_the_same(tmp_path: Path) -> None:
    write_recipe(recipe(), tmp_path / "a.yaml")
    assert recipe_text(load_recipe(tmp_path / "a.yaml")) == (tmp_path / "a.yaml").read_text("utf-8")


def test_no_temporary_file_is_left(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("old")
    write_recipe(recipe(), tmp_path / "r.yaml")
    assert [file.name for file in tmp_path.iterdir()] == ["r.yaml"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_recipe(recipe(), tmp_path / "folder")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "r.yaml"]
