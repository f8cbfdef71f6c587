"""The code of a model card runs as it stands."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit
from lorakit.cli.main import run
from tests.e2e.evaluations import write_adapter
from tests.families import save_classifier
from tests.training.runs import recipe_for, write_rows
from tests.training.tagged import tagged_recipe, write_word_pieces

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CHATS = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
PAIRS = [{"sentence1": "a b", "sentence2": "c", "label": i % 2} for i in range(8)]


def code_blocks(adapter: Path, language: str) -> list[str]:
    card = (adapter / "README.md").read_text(encoding="utf-8")
    return [body for found, body in _FENCE.findall(card) if found == language]


def run_python(code: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    exec(code, found)
    return found


def run_commands(adapter: Path) -> None:
    for body in code_blocks(adapter, "bash"):
        for line in body.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "lorakit"
            assert run(arguments) == 0, line


def trained(folder: Path, model: Path, task: str, **changes: Any) -> Path:
    recipe = recipe_for(folder, model, task, train__epochs=1, **changes)
    return lorakit.train(recipe).adapter_dir


def make_distinct(adapter: Path) -> None:
    """Give the head random values, so that a wrong head would be noticed."""
    file = adapter / "adapter_model.safetensors"
    tensors, generator = load_file(file), torch.Generator().manual_seed(0)
    for name, value in tensors.items():
        if ".lora_" not in name:
            tensors[name] = torch.randn(value.shape, generator=generator)
    save_file(tensors, file)


@pytest.mark.parametrize("task", ["glue/sst2", "glue/mrpc", "regression"])
def test_a_classifiers_card(
    task: str, tiny_bert: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The paths are relative, as in the recipe."""
    changes: dict[str, Any] = {"train__output_dir": "run"}
    if task == "glue/mrpc":
        write_rows(in_tmp / "data" / "train.jsonl", PAIRS)
        write_rows(in_tmp / "data" / "validation.jsonl", PAIRS)
    if task == "regression":
        task = "classification"
        changes |= {"task__regression": True, "task__text_column": "sentence"}
    adapter = trained(in_tmp, tiny_bert, task, **changes)
    make_distinct(adapter)
    pair = task == "glue/mrpc"
    text = ("A text to classify.", "And its second text.") if pair else "A text to classify."
    (wanted,) = lorakit.predict(adapter, [text])
    peft, ours = code_blocks(adapter, "python")
    capsys.readouterr()
    model = run_python(peft)["model"]
    printed = capsys.readouterr().out
    if "label" in wanted:
        assert printed == f"{wanted['label']}\n"
        assert dict(model.config.id2label) == dict(enumerate(wanted["scores"]))
    else:
        assert json.loads(printed) == pytest.approx([wanted["score"]], abs=1e-5)
    found = run_python(ours)
    assert eval(capsys.readouterr().out) == [wanted]
    assert dict(found["model"].config.id2label) == dict(model.config.id2label)
    assert found["tokenizer"]("a").input_ids
    run_commands(adapter)
    assert json.loads(capsys.readouterr().out) == wanted


def test_the_card_of_a_classifier_of_several_labels(
    tiny_bert: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "a b", "label": ["x", "y"][: i % 3]} for i in range(8)]
    for name in ("train", "validation"):
        write_rows(in_tmp / "data" / f"{name}.jsonl", rows)
    adapter = trained(
        in_tmp, tiny_bert, "classification", train__output_dir="run", task__multi_label=True
    )
    make_distinct(adapter)
    (wanted,) = lorakit.predict(adapter, ["A text to classify."])
    peft, ours = code_blocks(adapter, "python")
    capsys.readouterr()
    model = run_python(peft)["model"]
    assert eval(capsys.readouterr().out) == wanted["labels"]
    assert model.config.problem_type == "multi_label_classification"
    run_python(ours)
    assert eval(capsys.readouterr().out) == [wanted]


def test_the_card_of_a_classifier_of_words(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tagged_recipe(in_tmp, write_word_pieces(in_tmp / "base"), train__max_steps=1)
    adapter = lorakit.train(recipe).adapter_dir
    make_distinct(adapter)
    assert "pipeline_tag: token-classification" in (adapter / "README.md").read_text()
    (wanted,) = lorakit.predict(adapter, ["A text to classify."])
    peft, ours = code_blocks(adapter, "python")
    capsys.readouterr()
    found = run_python(peft)
    tags = eval(capsys.readouterr().out)
    assert len(tags) == len(found["tokenizer"]("A text to classify.").input_ids)
    model, _ = lorakit.load_with_tokenizer(adapter)
    ids = found["tokenizer"]("A text to classify.", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, found["model"](input_ids=ids).logits)
    run_python(ours)
    assert eval(capsys.readouterr().out) == [wanted]
    run_commands(adapter)
    assert json.loads(capsys.readouterr().out) == wanted


@pytest.mark.parametrize("task", ["completion", "chat"])
def test_a_causal_models_card(
    task: str,
    tiny_llama: Path,
    in_tmp: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if task == "chat":
        write_rows(in_tmp / "data" / "train.jsonl", CHATS * 4)
        write_rows(in_tmp / "data" / "validation.jsonl", CHATS)
    adapter = trained(in_tmp, tiny_llama, task, train__output_dir="run")
    peft, ours = code_blocks(adapter, "python")
    logits = []
    for code in (peft, ours):
        found = run_python(code)
        ids = found["tokenizer"]("a text", return_tensors="pt").input_ids
        with torch.no_grad():
            logits.append(found["model"](input_ids=ids).logits)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr("sys.stdin", None)
    capsys.readouterr()
    run_commands(adapter)
    out = capsys.readouterr().out
    assert out if task == "completion" else not out


def test_a_card_with_a_new_head_and_a_name_that_needs_quotes(
    tiny_bert: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base is a classifier of three other labels."""
    base = save_classifier(in_tmp / "a 'base'", tiny_bert, ["x", "y", "z"])
    output = "it's a run"
    adapter = trained(
        in_tmp,
        base,
        "glue/sst2",
        model__new_head=True,
        train__output_dir=output,
        task__max_length=32,
    )
    for code in code_blocks(adapter, "python"):
        assert dict(run_python(code)["model"].config.id2label) == {0: "negative", 1: "positive"}
    capsys.readouterr()
    run_commands(adapter)
    assert set(json.loads(capsys.readouterr().out)["scores"]) == {"negative", "positive"}


def test_a_converted_and_an_untrained_adapter(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tiny_bert, tmp_path / "adapter", "encoder", ["a", "b"])
    lorakit.convert(tmp_path / "adapter", tmp_path / "lora", "lora")
    wanted = lorakit.predict(tmp_path / "adapter", ["A text to classify."])
    capsys.readouterr()
    for adapter in (tmp_path / "adapter", tmp_path / "lora"):
        peft, ours = code_blocks(adapter, "python")
        run_python(peft)
        assert capsys.readouterr().out == f"{wanted[0]['label']}\n"
        run_python(ours)
        assert eval(capsys.readouterr().out)[0]["label"] == wanted[0]["label"]
