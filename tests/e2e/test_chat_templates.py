"""Real chat templates on the command line: what is trained, and what is reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lorakit.cli.main import run
from tests.tasks.wikisql_files import write_lines

RECIPE = """\
model: {name_or_path: model, dtype: float32}
adapter: {r: 2, target_modules: [q, v]}
task: {name: chat, path: data, max_length: 256}
train: {output_dir: run, max_steps: 2, per_device_batch_size: 2}
"""
#: A space between the question and the answer, and no header.
SPACED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
#: An empty block before the last answer, which no prompt and no earlier turn has.
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n"
    "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETS_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' or messages[-1].role != 'assistant' %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}Answer: {{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}"
    "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(*texts: str, system: str | None = None) -> dict[str, Any]:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    head = [{"role": "system", "content": system}] if system else []
    return {"messages": [*head, *turns]}


@pytest.fixture(scope="module")
def base(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny random model with a real tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
        pad_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.random.set_rng_state(state)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(smollm2 / name, folder / name)
    return folder


@pytest.fixture
def prepared(base: Path, in_tmp: Path) -> Any:
    """Write model, data and recipe."""

    def write(template: str, *rows: dict[str, Any]) -> str:
        shutil.copytree(base, "model")
        Path("model/chat_template.jinja").write_text(template)
        Path("data").mkdir()
        write_lines(Path("data/train.jsonl"), list(rows))
        Path("recipe.yaml").write_text(RECIPE)
        return "recipe.yaml"

    return write


def lorakit(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> Any:
    """Run a command and return stdout and stderr."""
    found = run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert found == code, err
    assert "Traceback" not in err
    return out, err


def trained(capsys: pytest.CaptureFixture[str], recipe: str) -> tuple[list[list[str]], str]:
    """Return the trained parts of each training row and the messages; assert that each row's prompt
    is that of ``encode_chat_prompt``."""
    out, err = lorakit(capsys, "preview", recipe, "--json", "--count", 99)
    tokenizer = AutoTokenizer.from_pretrained("model")
    rows = []
    for row in json.loads(out)["examples"]:
        parts: list[list[int]] = []
        for before, on, token in zip(
            [False, *row["trained"]], row["trained"], row["ids"], strict=False
        ):
            if on and not before:
                parts.append([])
            if on:
                parts[-1].append(token)
        rows.append([tokenizer.decode(part) for part in parts])
    return rows, err


def test_a_space_before_the_answer(prepared: Any, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = prepared(SPACED, chat("Colour of 1?", "Amber"), chat("Of 2?", "Teal", "3?", "Rust"))
    rows, _ = trained(capsys, recipe)
    assert rows == [[" Amber<|im_end|>"], [" Teal<|im_end|>", " Rust<|im_end|>"]]
    out, err = lorakit(capsys, "preview", recipe, "--count", 1)
    assert "[INST] Colour of 1? [/INST]⟦ Amber<|im_end|>⟧" in out
    assert "warning" not in err


def test_a_prompt_that_training_renders_otherwise(
    prepared: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = prepared(THINKS, chat("1?", "One"), chat("2?", "Two", "3?", "Three"))
    rows, err = trained(capsys, recipe)
    empty = "<think>\n\n</think>\n\n"
    assert rows == [[f"{empty}{text}<|im_end|>"] for text in ("One", "Two", "Three")]
    assert "train: 1 of 2 chats became 2 training rows" in err
    out, _ = lorakit(capsys, "preview", recipe)
    assert "data/train.jsonl, row 2, training row 2 of 2: " in out
    assert "rows                   2\ntraining rows          3\n" in out
    _, err = lorakit(capsys, "train", recipe, "--dry-run")
    assert "train: 1 of 2 chats became 2 training rows" in err
    _, err = lorakit(capsys, "eval", recipe, "--base", "--split", "train", "--json")
    assert "train: 1 of 2 chats became 2 training rows" in err


def test_reasoning_is_trained_where_the_template_writes_it(
    prepared: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    row = chat("Is 51 prime?", "No, it is 3 times 17.")
    row["messages"][-1]["reasoning_content"] = "51 = 3 * 17"
    rows, err = trained(capsys, prepared(THINKS, row))
    assert rows == [["<think>\n51 = 3 * 17\n</think>\n\nNo, it is 3 times 17.<|im_end|>"]]
    assert "ignores" not in err
    Path("model/chat_template.jinja").write_text(MARKED)
    said = "train: the chat template ignores these keys of messages: 'reasoning_content' (1)"
    for arguments in (
        ("preview", "recipe.yaml"),
        ("train", "recipe.yaml", "--dry-run"),
        ("eval", "recipe.yaml", "--base", "--split", "train"),
    ):
        assert lorakit(capsys, *arguments)[1].count(said) == 1


def test_a_message_that_only_the_prompt_has(
    prepared: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = prepared(FORGETS_SYSTEM, chat("1?", "One", system="Be brief."), chat("2?", "Two"))
    out, err = lorakit(capsys, "preview", recipe)
    text = "<|im_start|>system⏎\nBe brief.<|im_end|>⏎\n<|im_start|>user⏎\n1?<|im_end|>⏎\n"
    assert f"{text}<|im_start|>assistant⏎\n⟦One<|im_end|>⟧" in out
    said = "train: in 1 of 2 chats the chat template renders the messages before an answer"
    assert err.count(said) == 1
    assert said in lorakit(capsys, "train", recipe, "--dry-run")[1]


@pytest.mark.parametrize("command", ["preview", "train"])
def test_a_message_that_is_nowhere(
    command: str, prepared: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    template = THINKS.replace("in messages", "in messages if m.role != 'system'")
    recipe = prepared(template, chat("1?", "One"), chat("2?", "Two", system="Be brief."))
    _, err = lorakit(capsys, command, recipe, code=2)
    assert "data/train.jsonl, row 2: message 1: the chat template omits this" in err
    assert not Path("run").exists()


def test_marks_of_the_template(prepared: Any, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = prepared(MARKED, chat("1?", "One", "2?", "Two"))
    rows, err = trained(capsys, recipe)
    assert rows == [["Answer: One<|im_end|>\n", "Answer: Two<|im_end|>\n"]]
    assert "warning" not in err


def test_a_template_that_refuses(prepared: Any, capsys: pytest.CaptureFixture[str]) -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system message, please') }}"
        "{% endif %}" + THINKS
    )
    recipe = prepared(template, chat("1?", "One"), chat("2?", "Two", system="Be brief."))
    for command in ("preview", "train"):
        _, err = lorakit(capsys, command, recipe, code=2)
        assert "data/train.jsonl, row 2: the chat template rejects the messages: No system" in err


def test_train_warns_of_a_template_without_an_end(
    prepared: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    endless = THINKS.replace("{{ m.content }}<|im_end|>", "{{ m.content }}")
    recipe = prepared(endless, chat("1?", "One"), chat("2?", "Two"))
    warning = "2 of 2 rows do not end in a trained EOS: they do not teach the model to stop"
    for arguments in (("preview", recipe), ("train", recipe, "--dry-run")):
        assert warning in lorakit(capsys, *arguments)[1]
    Path("model/chat_template.jinja").write_text(THINKS)
    for arguments in (("preview", recipe), ("train", recipe, "--dry-run")):
        assert "warning" not in lorakit(capsys, *arguments)[1]


def test_one_word_answers_behind_a_space_are_learnt(
    prepared: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"whale": "Ravel", "shark": "Ochre", "eagle": "Quartz", "lizard": "Magnet"}
    recipe = prepared(SPACED, *(chat(f"Sort: {animal}", word) for animal, word in words.items()))
    shutil.copyfile("data/train.jsonl", "data/validation.jsonl")
    text = Path(recipe).read_text().replace("{r: 2, target_modules: [q, v]}", "{method: full}")
    Path(recipe).write_text(text)
    settings = {
        "task.eval_generate": "end", "task.max_new_tokens": 16, "train.max_steps": 40,
        "train.per_device_batch_size": 4, "train.learning_rate": 0.006,
        "train.lr_scheduler": "constant", "train.eval_every_steps": 40, "train.save_every_steps": 40,
    }  # fmt: skip
    chosen = [f"--set={key}={value}" for key, value in settings.items()]
    lorakit(capsys, "train", recipe, *chosen)
    assert json.loads(Path("run/run.json").read_text())["metrics"]["exact_match"] == 1.0


def test_generate_takes_the_prompt_of_training(
    prepared: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = prepared(FORGETS_SYSTEM, chat("1?", "One", system="Be brief."))
    (row,) = json.loads(lorakit(capsys, "preview", recipe, "--json")[0])["examples"]
    tokenizer = AutoTokenizer.from_pretrained("model")
    messages = chat("1?", "One", system="Be brief.")["messages"][:-1]
    write_lines(Path("in.jsonl"), [{"messages": messages, "id": 7}])
    out, err = lorakit(capsys, "generate", "model", "--input", "in.jsonl", "--max-new-tokens", 1)
    prompt = json.loads(out)["prompt"]
    assert prompt == tokenizer.decode(row["ids"][: row["trained"].index(True)])
    assert "--input in.jsonl: unused keys: 'id' (1)" in err


def test_generate_names_what_the_template_leaves_out(
    prepared: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared(THINKS.replace("in messages", "in messages if m.role != 'system'"))
    tools = [{"type": "function", "function": {"name": "tide", "parameters": {}}}]
    asked = [{"role": "user", "content": "1?", "name": "Ada"}]
    write_lines(Path("in.jsonl"), [{"messages": asked, "tools": tools}])
    _, err = lorakit(capsys, "generate", "model", "--input", "in.jsonl", "--max-new-tokens", 1)
    assert "the chat template ignores these keys: 'name' (1), 'tools' (1)" in err
    write_lines(Path("in.jsonl"), [{"messages": [{"role": "system", "content": "x"}, *asked]}])
    _, err = lorakit(capsys, "generate", "model", "--input", "in.jsonl", code=2)
    assert "in.jsonl:1: message 1: the chat template omits this system" in err
    write_lines(Path("in.jsonl"), [{"messages": asked, "prompt": "1?"}])
    _, err = lorakit(capsys, "generate", "model", "--input", "in.jsonl", code=2)
    assert "in.jsonl:1: 'prompt' and 'messages' are mutually exclusive" in err
