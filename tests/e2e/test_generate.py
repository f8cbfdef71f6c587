from __future__ import annotations

import io
import json
import os
import pty
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lorakit.cli.main import run
from lorakit.errors import printable
from tests.e2e.evaluations import write_adapter
from tests.tasks.wikisql_files import write_lines


def wanted(model: Any, tokenizer: Any, text: str, tokens: int) -> str:
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, pad_token_id=1, eos_token_id=tokenizer.eos_token_id
    )
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.fixture(scope="module")
def reference(tiny_llama: Path) -> tuple[Any, Any]:
    return (
        AutoModelForCausalLM.from_pretrained(tiny_llama),
        AutoTokenizer.from_pretrained(tiny_llama),
    )


def piped(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def generated(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code = run(["generate", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(["generate", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


def test_prompt_is_continued(
    tiny_llama: Path, reference: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = generated(capsys, tiny_llama, "--prompt", "to be", "--max-new-tokens", 12)
    assert out == wanted(*reference, "to be", 12) + "\n"
    adapted = ["--prompt", "to be", "--max-new-tokens", 12, "--dtype", "bfloat16"]
    assert generated(capsys, tiny_llama, *adapted)


def test_piped_stdin_is_the_prompt(
    tiny_llama: Path,
    reference: tuple[Any, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    piped(monkeypatch, "or not\n")
    out = generated(capsys, tiny_llama, "--max-new-tokens", 8)
    assert out == wanted(*reference, "or not", 8) + "\n"
    piped(monkeypatch, "")
    assert "stdin is empty" in refused(capsys, tiny_llama)


def test_adapter_changes_the_text_and_base_dtype_is_its_own(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tiny_llama, tmp_path / "adapter", "causal", scale=3.0)
    bare = generated(capsys, tiny_llama, "--prompt", "to be", "--max-new-tokens", 24)
    with_adapter = ["--adapter", tmp_path / "adapter", "--prompt", "to be", "--max-new-tokens", 24]
    adapted = generated(capsys, tiny_llama, *with_adapter)
    assert adapted != bare
    assert generated(capsys, tiny_llama, *with_adapter) == adapted


def test_seed_makes_sampling_reproducible(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def draw(seed: int) -> str:
        options = ["--temperature", "1.5", "--top-p", "0.9", "--max-new-tokens", 16]
        return generated(capsys, tiny_llama, "--prompt", "to be", "--seed", seed, *options)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_beam_search(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--num-beams", 3, "--length-penalty", 0.8, "--no-repeat-ngram-size", 2]
    options += ["--max-new-tokens", 12, "--stop", "!!", "--stop", "\n"]
    command = ["generate", tiny_llama, "--prompt", "to be", *options]
    assert run([str(part) for part in command]) == 0
    out, err = capsys.readouterr()
    assert "answers are printed when the search is complete" in err
    file = write_lines(tmp_path / "in.jsonl", [{"prompt": "to be"}, {"prompt": "or not to be"}])
    lines = generated(capsys, tiny_llama, "--input", file, *options).splitlines()
    assert json.loads(lines[0])["generated"] + "\n" == out


def test_stop_sequences(
    tiny_llama: Path, reference: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = wanted(*reference, "to be", 12)
    mark = whole[4:6]
    options = ["--prompt", "to be", "--max-new-tokens", 12, "--stop", mark]
    assert generated(capsys, tiny_llama, *options) == whole[: whole.index(mark, 1)] + "\n"


def test_file_of_prompts_and_chats(
    tiny_llama: Path,
    reference: tuple[Any, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    rows = [{"prompt": "a longer prompt, this"}, chat, {"prompt": "é"}, {"prompt": "b"}]
    file = write_lines(tmp_path / "in.jsonl", rows)
    texts = [row.get("prompt", "<user>hi</s><assistant>") for row in rows]
    lines = [{"prompt": text, "generated": wanted(*reference, text, 6)} for text in texts]
    out = generated(capsys, tiny_llama, "--input", file, "--max-new-tokens", 6)
    assert [json.loads(line) for line in out.splitlines()] == lines
    to_file = ["--output", tmp_path / "out.jsonl", "--max-new-tokens", 6]
    assert generated(capsys, tiny_llama, "--input", file, *to_file) == ""
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_chat_history_and_clear(
    tiny_llama: Path,
    reference: tuple[Any, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    piped(monkeypatch, "hi\n\nagain\n/clear\nagain\n/exit\nnever read\n")
    out = generated(capsys, tiny_llama, "--chat", "--max-new-tokens", 5)
    first = wanted(*reference, "<user>hi</s><assistant>", 5)
    second = wanted(*reference, f"<user>hi</s><assistant>{first}</s><user>again</s><assistant>", 5)
    fresh = wanted(*reference, "<user>again</s><assistant>", 5)
    assert out == f"{first}\n{second}\n{fresh}\n"


def test_a_long_chat_drops_its_first_messages(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    piped(monkeypatch, f"{'x' * 100}\n{'y' * 100}\nlast\n")
    assert run(["generate", str(tiny_llama), "--chat", "--max-new-tokens", "40"]) == 0
    assert "dropped its first 2 messages" in capsys.readouterr().err
    piped(monkeypatch, f"{'x' * 300}\n")
    assert "window of 256 tokens" in refused(capsys, tiny_llama, "--chat")


def test_the_default_length_fits_the_window(
    tiny_llama: Path,
    reference: tuple[Any, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = ["to be", "x" * 250]
    lengths = [len(reference[1](text, add_special_tokens=False).input_ids) for text in prompts]
    assert lengths == [5, 250]
    for text, length in zip(prompts, lengths, strict=True):
        assert run(["generate", str(tiny_llama), "--prompt", text]) == 0
        out, err = capsys.readouterr()
        assert out == wanted(*reference, text, 256 - length) + "\n"
        assert f"max_new_tokens reduced from 256 to {256 - length}" in err
    write_lines(tmp_path / "in.jsonl", [{"prompt": text} for text in prompts])
    assert run(["generate", str(tiny_llama), "--input", str(tmp_path / "in.jsonl")]) == 0
    out, err = capsys.readouterr()
    rows = [json.loads(line)["generated"] for line in out.splitlines()]
    assert rows == [wanted(*reference, t, 256 - n) for t, n in zip(prompts, lengths, strict=True)]
    assert "max_new_tokens reduced from 256 for 2 of 2 prompts" in err
    piped(monkeypatch, f"{'x' * 100}\n{'y' * 150}\n")
    assert run(["generate", str(tiny_llama), "--chat"]) == 0
    assert "dropped its first 2 messages" in capsys.readouterr().err


def test_a_requested_length_is_not_reduced(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, tiny_llama, "--prompt", "to be", "--max-new-tokens", 256)
    assert "max_new_tokens = 256 exceed the model's window of 256 tokens" in said
    assert "allowed: max_new_tokens of at most 251" in said
    assert generated(capsys, tiny_llama, "--prompt", "to be", "--max-new-tokens", 251)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--input", "f"], "--prompt and --input are mutually exclusive"),
        (["--chat", "--input", "f"], "--chat and --input are mutually exclusive"),
        (["--prompt", "a", "--output", "f"], "requires --input"),
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "a\udc80"], "invalid UTF-8 text at character 2"),
        (["--prompt", "a", "--seed", str(2**32)], "--seed"),
        (["--prompt", "x" * 300], "window of 256 tokens"),
        (["--prompt", "a", "--top-p", "0"], "--top-p 0.0: out of range; allowed"),
        (["--prompt", "a", "--top-p", "0.5"], "--top-p 0.5: requires --temperature above 0"),
        (["--prompt", "a", "--num-beams", "0"], "--num-beams"),
        (["--prompt", "a", "--num-beams", "2", "--temperature", "1"], "are mutually exclusive"),
        (["--prompt", "a", "--length-penalty", "2"], "requires --num-beams above 1"),
        (["--num-beams", "2", "--length-penalty", "inf"], "allowed: -10 to 10"),
        (["--prompt", "a", "--stop", ""], "--stop '': empty; allowed"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature nan"),
        (
            ["--prompt", "a", "--temperature", "-1"],
            "--temperature -1.0: out of range; allowed: >= 0",
        ),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["--prompt", "a", "--dtype", "int8"], "--dtype = int8: allowed: float32"),
        (["--prompt", "a", "--adapter", "none"], "none: no such adapter directory"),
        (["--input", "none.jsonl"], "none.jsonl: no such file"),
    ],
)
def test_invalid_options(
    tiny_llama: Path,
    capsys: pytest.CaptureFixture[str],
    in_tmp: Path,
    arguments: list[str],
    message: str,
) -> None:
    assert message in refused(capsys, tiny_llama, *arguments)
    assert not list(in_tmp.iterdir())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ('{"text": "a"}', 'allowed: {"prompt": TEXT}'),
        ('{"prompt": 1}', 'allowed: {"prompt": TEXT}'),
        ('{"prompt": ""}', "the prompt is empty"),
        ('{"messages": []}', "allowed"),
        ('{"messages": [{"role": "user"}]}', "allowed"),
        ("[]", "allowed"),
        ("[" * 100_000, "not JSON"),
        ('{"prompt": "\\ud800"}', "invalid UTF-8 text"),
    ],
)
def test_invalid_lines(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{line}\n', encoding="utf-8")
    output = tmp_path / "out.jsonl"
    error = refused(capsys, tiny_llama, "--input", file, "--output", output)
    assert f"{file}:2: " in error
    assert message in error
    assert not output.exists()


def test_encoders_and_classifier_adapters_are_rejected(
    tiny_llama: Path, tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "not a causal language model" in refused(capsys, tiny_bert, "--prompt", "a")
    write_adapter(tiny_bert, tmp_path / "adapter", "encoder", ["a", "b"])
    options = ["--adapter", tmp_path / "adapter", "--prompt", "a"]
    error = refused(capsys, tiny_llama, *options)
    assert "the adapter of a classifier cannot generate text; hint: use lorakit predict" in error


def test_byte_order_mark(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "a"}\n', encoding="utf-8-sig")
    out = generated(capsys, tiny_llama, "--input", file, "--max-new-tokens", 2)
    assert json.loads(out)["prompt"] == "a"


def test_closed_stdin(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert "stdin is empty" in refused(capsys, tiny_llama)
    assert generated(capsys, tiny_llama, "--chat") == ""


def test_stdin_that_is_not_utf8(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8"))
    assert "stdin: not UTF-8" in refused(capsys, tiny_llama)


def test_generated_text_does_not_control_a_terminal(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file gets the text as it is."""
    reader, terminal = pty.openpty()
    with os.fdopen(terminal, "w", encoding="utf-8") as stdout, (tmp_path / "out").open("w") as file:
        for stream in (stdout, file):
            monkeypatch.setattr(sys, "stdout", stream)
            options = ["--max-new-tokens", "60", "--temperature", "9", "--seed", "4"]
            assert run(["generate", str(tiny_llama), "--prompt", "a", *options]) == 0
        monkeypatch.undo()
    raw = (tmp_path / "out").read_bytes().decode().rstrip("\n")
    assert any(not c.isprintable() for c in raw)
    shown = os.read(reader, 10_000).decode().replace("\r\n", "\n").rstrip("\n")
    assert shown == printable(raw)
    assert "\x1b" not in shown
