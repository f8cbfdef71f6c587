"""A run resumes only with the recipe and the data that it started with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import UserError
from lorakit.training.run import train
from lorakit.training.same_run import check_same_data
from tests.training.runs import adapter_bytes, recipe_for, write_rows


def test_other_tokens_of_the_same_data_are_refused(tmp_path: Path) -> None:
    """As produced by another chat template."""

    def data(tokens: int | None) -> dict[str, Any]:
        return {"train": {"source": "chats.jsonl", "fingerprint": "0", "tokens": tokens}}

    (tmp_path / "run.json").write_text(json.dumps({"data": data(1200)}))
    checkpoint = tmp_path / "checkpoints" / "step-3"
    check_same_data(data(1200), checkpoint, print)
    check_same_data(data(None), checkpoint, print)
    message = r"--resume: chats\.jsonl: .* has 1,201 tokens, but had 1,200 when the run started"
    with pytest.raises(UserError, match=message):
        check_same_data(data(1201), checkpoint, print)


def test_another_chat_template_of_as_many_tokens_is_refused(
    tiny_llama: Path, tmp_path: Path
) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write_rows(tmp_path / "data" / "train.jsonl", [{"messages": chat}] * 16)
    write_rows(tmp_path / "data" / "validation.jsonl", [{"messages": chat}] * 2)
    template = tmp_path / "own.jinja"
    source = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    template.write_text(source)
    keys = {"model__chat_template": str(template), "train__save_every_steps": 2}
    recipe = recipe_for(tmp_path, tiny_llama, "chat", **keys)
    train(recipe)
    whole = adapter_bytes(tmp_path / "run")
    checkpoint = str(tmp_path / "run" / "checkpoints" / "step-2")
    template.write_text(source.replace("[", "("))
    with pytest.raises(UserError, match="--resume: the chat template has changed since the run"):
        train(recipe, checkpoint)
    template.write_text(source)
    train(recipe, checkpoint)
    assert adapter_bytes(tmp_path / "run") == whole


def test_without_the_recipe_of_the_run_nothing_is_compared(
    tiny_llama: Path, tmp_path: Path
) -> None:
    train(recipe_for(tmp_path, tiny_llama, train__save_every_steps=4))
    (tmp_path / "run" / "checkpoints" / "step-4").rename(tmp_path / "step-4")
    notes: list[str] = []
    changes = {"train__output_dir": str(tmp_path / "other"), "train__learning_rate": 1e-3}
    train(recipe_for(tmp_path, tiny_llama, **changes), str(tmp_path / "step-4"), notes.append)
    assert any(line.startswith("warning: ") and "no recipe.yaml, so" in line for line in notes)


def test_a_default_that_was_fitted_to_the_model_is_the_same_recipe(
    tiny_bert: Path, tmp_path: Path
) -> None:
    """The recipe does not set the length; the run took the model's 256 positions."""
    recipe = recipe_for(tmp_path, tiny_bert, "glue/sst2", train__save_every_steps=4)
    task = type(recipe.task)(name="glue/sst2", path=recipe.task.path)
    recipe = recipe.model_copy(update={"task": task})
    train(recipe)
    assert "max_length: 256" in (tmp_path / "run" / "recipe.yaml").read_text()
    whole = adapter_bytes(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-4"
    train(recipe, str(checkpoint))
    assert adapter_bytes(tmp_path / "run") == whole
    other = recipe.model_copy(update={"task": task.model_copy(update={"max_length": 200})})
    with pytest.raises(UserError, match=r"task\.max_length: was 256, now 200"):
        train(other, str(checkpoint))
    written = tmp_path / "run" / "recipe.yaml"
    written.write_text(written.read_text().replace("max_length: 256", "max_length: 200"))
    with pytest.raises(UserError, match=r"task\.max_length: was 200, now 256"):
        train(recipe, str(checkpoint))
