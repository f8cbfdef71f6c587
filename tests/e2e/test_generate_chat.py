"""The chat of ``lorakit generate``: commands and system prompts."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorakit
from lorakit.cli.main import run
from tests.e2e.evaluations import write_adapter
from tests.tasks.wikisql_files import write_lines
from tests.training.runs import recipe_for, write_rows

Chat = Callable[..., tuple[str, str]]


@pytest.fixture
def chat(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[str, str]]:
    """Return ``chat(lines, *arguments)``, which returns stdout and stderr."""

    def start(lines: str, *arguments: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        options = ["--chat", "--max-new-tokens", "4"]
        assert run(["generate", *map(str, arguments), *options]) == 0
        return capsys.readouterr()

    return start


@pytest.fixture(scope="module")
def answer(tiny_llama: Path) -> Callable[[str], str]:
    """Return what the base generates after a prompt."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)

    def generate(text: str) -> str:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False,
                pad_token_id=1,
            )  # fmt: skip
        return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    return generate


def row(system: str | None) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages}


def adapter_for(folder: Path, model: Path, prompts: list[str | None]) -> Path:
    write_rows(folder / "data" / "train.jsonl", [row(prompt) for prompt in prompts])
    write_rows(folder / "data" / "validation.jsonl", [row(prompts[0])])
    recipe = recipe_for(folder, model, "chat", train__epochs=1, train__learning_rate=1e-9)
    return lorakit.train(recipe).adapter_dir


def test_the_system_prompt_stays_through_reset(
    tiny_llama: Path, chat: Chat, answer: Callable[[str], str]
) -> None:
    out, err = chat(
        "hi\n/help\n/reset\nhi\n/exit\nnever read\n", tiny_llama, "--system", "Be brief."
    )
    wanted = answer("<system>Be brief.</s><user>hi</s><assistant>")
    assert out == f"{wanted}\n{wanted}\n"
    for command in ("/reset", "/help", "/exit"):
        assert command in err


def test_a_prompt_is_the_only_message(
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    answer: Callable[[str], str],
) -> None:
    adapter = adapter_for(tmp_path, tiny_llama, ["Be kind."] * 4)
    capsys.readouterr()
    start = ["generate", str(tiny_llama), "--adapter", str(adapter), "--max-new-tokens", "4"]
    assert run([*start, "--chat", "--prompt", "/exit"]) == 0
    out, err = capsys.readouterr()
    assert out == answer("<system>Be kind.</s><user>/exit</s><assistant>") + "\n"
    assert "--chat" not in err
    assert run([*start, "--chat", "--prompt", "hi", "--system", "Be brief."]) == 0
    out, _ = capsys.readouterr()
    assert out == answer("<system>Be brief.</s><user>hi</s><assistant>") + "\n"
    assert run([*start, "--prompt", "hi"]) == 0
    out, err = capsys.readouterr()
    assert out == answer("hi") + "\n"
    assert "the adapter was trained on chats: with --chat, the prompt becomes a message" in err


def test_an_empty_answer_is_said(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.eos_token_id] = 1.0
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.fill_(1.0)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for options in (["--chat", "--prompt", "hi"], ["--prompt", "hi"]):
        assert run(["generate", str(tmp_path / "model"), *options]) == 0
        out, err = capsys.readouterr()
        assert out == "\n"
        lines = err.splitlines()
        assert "empty answer: the model generated an end-of-sequence token first" in lines
        hint = "hint: the model has a chat template; with --chat, the prompt becomes a message"
        assert (hint in lines) == ("--chat" not in options)


def test_a_long_chat_keeps_its_system_prompt(
    tiny_llama: Path, chat: Chat, answer: Callable[[str], str]
) -> None:
    lines = f"{'x' * 100}\n{'y' * 150}\n"
    out, err = chat(lines, tiny_llama, "--system", "Be brief.")
    assert "dropped its first 2 messages" in err
    wanted = answer(f"<system>Be brief.</s><user>{'y' * 150}</s><assistant>")
    assert out.endswith(f"\n{wanted}\n")


def test_the_chat_uses_the_system_prompt_of_the_training_data(
    tiny_llama: Path, tmp_path: Path, chat: Chat, answer: Callable[[str], str]
) -> None:
    adapter = adapter_for(tmp_path, tiny_llama, ["Be kind."] * 4)
    sidecar = json.loads((adapter / "lorakit.json").read_text())
    assert sidecar["system_prompts"] == ["Be kind."]
    wanted = answer("<system>Be kind.</s><user>hi</s><assistant>")
    for arguments in ([adapter], [tiny_llama, "--adapter", adapter]):
        out, err = chat("hi\n", *arguments)
        assert out == f"{wanted}\n"
        assert 'using the system prompt of the training data: "Be kind."; --system sets' in err
    out, err = chat("hi\n", adapter, "--system", "Be brief.")
    assert out == f"{answer('<system>Be brief.</s><user>hi</s><assistant>')}\n"
    assert '--system differs from the one of the training data: "Be kind."' in err
    out, err = chat("hi\n", adapter, "--system", "")
    assert out == f"{answer('<user>hi</s><assistant>')}\n"
    assert "--system differs" in err
    _, err = chat("hi\n", adapter, "--system", "Be kind.")
    assert "training data" not in err


@pytest.mark.parametrize(
    ("prompts", "stored", "without", "given"),
    [
        ([None, None], [""], None, "--system: the training data has no system prompt"),
        (
            ["Be kind.", None, "Be kind."],
            ["Be kind.", ""],
            'the training data has several system prompts, such as "Be kind."; --system sets one',
            '--system differs from the ones of the training data: "Be kind."',
        ),
    ],
)
def test_training_data_without_one_system_prompt(
    tiny_llama: Path,
    tmp_path: Path,
    chat: Chat,
    answer: Callable[[str], str],
    prompts: list[str | None],
    stored: list[str],
    without: str | None,
    given: str,
) -> None:
    adapter = adapter_for(tmp_path, tiny_llama, prompts)
    assert json.loads((adapter / "lorakit.json").read_text())["system_prompts"] == stored
    out, err = chat("hi\n", adapter)
    assert out == f"{answer('<user>hi</s><assistant>')}\n"
    assert without in err if without else "system prompt" not in err
    _, err = chat("hi\n", adapter, "--system", "Be brief.")
    assert given in err


def test_an_adapter_of_unknown_training(tiny_llama: Path, tmp_path: Path, chat: Chat) -> None:
    write_adapter(tiny_llama, tmp_path / "adapter", "causal")
    for options in ([], ["--system", "Be brief."]):
        _, err = chat("hi\n", tiny_llama, "--adapter", tmp_path / "adapter", *options)
        assert "training data" not in err


def test_the_system_prompt_of_a_file_of_chats(
    tiny_llama: Path,
    tmp_path: Path,
    answer: Callable[[str], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write_lines(
        tmp_path / "in.jsonl",
        [{"messages": row(system)["messages"][:-1]} for system in (None, "Be kind.")],
    )
    command = ["generate", str(tiny_llama), "--input", str(file), "--system", "Be brief."]
    assert run([*command, "--max-new-tokens", "4"]) == 0
    found = [json.loads(line)["generated"] for line in capsys.readouterr().out.splitlines()]
    assert found == [
        answer(f"<system>{system}</s><user>hi</s><assistant>")
        for system in ("Be brief.", "Be kind.")
    ]
    write_lines(file, [{"prompt": "hi"}])
    assert run(command) == 2
    assert f'{file}:1: "prompt" has no system message; allowed with --system' in (
        capsys.readouterr().err
    )
    assert run(["generate", str(tiny_llama), "--prompt", "a", "--system", "b"]) == 2
    assert "--system: requires --chat, or --input with messages" in capsys.readouterr().err
