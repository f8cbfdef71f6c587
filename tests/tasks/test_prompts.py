"""A prompt is, token for token, a prefix of the example that the model was trained on."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lorakit import registry
from lorakit.data.encode import encode_split
from lorakit.data.sources import Split
from lorakit.errors import DataError
from lorakit.evaluation.prompts import encode_prompts

CAUSAL = [name for name, task in registry.tasks().items() if task.kind == "causal"]
TURNS = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": "2+2? é 猫"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": " again "},
    {"role": "assistant", "content": "`4`, as before:\n- 4"},
]
ALPACA = {"instruction": "Add.", "input": "2 and 2", "output": "4\n"}
PAIRS = [
    {"prompt": "table: a\nQ: b?\nA:", "completion": " SELECT a"},
    {"prompt": "ends in a space ", "completion": "word"},
]
QA = [{"q": "2+2?", "a": 4}]
TEMPLATES = {"template": "Question: {q}\nAnswer:", "completion_template": " {a}"}

#: Task, its keys, rows; or rows of a real file.
CASES: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]] | str]] = {
    "messages": ("chat", {}, [{"messages": TURNS}, {"messages": TURNS[1:3]}]),
    "alpaca as a chat": ("chat", {}, [ALPACA, {**ALPACA, "input": None}]),
    "gsm8k": ("chat", {}, "instructions/gsm8k_train.jsonl.gz"),
    "self-instruct": ("chat", {}, "instructions/self_instruct_seed.jsonl.gz"),
    "pairs": ("completion", {}, PAIRS),
    "alpaca": ("completion", {}, [ALPACA, {**ALPACA, "input": None}]),
    "templates": ("completion", TEMPLATES, QA),
    "sql as pairs": ("completion", {}, "wikisql/mlx_lora_text"),
    "auto chat": ("auto", {}, [{"conversations": TURNS}]),
    "auto completion": ("auto", {}, PAIRS),
    "wikisql": ("wikisql", {}, "wikisql/mini/mini.jsonl"),
    "e2e": ("e2e_nlg", {}, "e2e_nlg"),
}


tokenizer_of = cache(AutoTokenizer.from_pretrained)


def test_every_causal_task_is_here() -> None:
    assert {name for name, _, _ in CASES.values()} | {"text"} == set(CAUSAL)
    text = registry.task("text")
    with pytest.raises(DataError, match="does not generate"):
        text.prompt({"text": "a"}, text.Config())


def check(task: Any, config: Any, split: Split, tokenizer: Any) -> None:
    encoded = encode_split(split, lambda row: task.example(row, config), tokenizer, 4096)
    prompts = encode_prompts(task, config, split, tokenizer, None)
    for row, prompt in zip(encoded, prompts, strict=True):
        assert list(row.input_ids[: len(prompt)]) == prompt
        rest = row.loss_mask[len(prompt) :]
        # All that follows is learnt, but for what a chat template puts behind the turn's end.
        assert rest[0]
        assert rest.sum() >= len(rest) - 1
        answered = tokenizer.decode(row.input_ids[len(prompt) :], skip_special_tokens=True)
        assert answered.strip()


@pytest.mark.parametrize("case", [case for case in CASES if not isinstance(CASES[case][2], str)])
@pytest.mark.parametrize("model", ["tiny_llama", "smollm2"])
def test_a_prompt_is_a_prefix_of_its_training_example(
    case: str, model: str, request: pytest.FixtureRequest
) -> None:
    name, keys, rows = CASES[case]
    task = registry.task(name)
    assert not isinstance(rows, str)
    tokenizer = tokenizer_of(request.getfixturevalue(model))
    for row in rows:
        check(
            task,
            task.Config(max_length=4096, **keys),
            Split("train", [row], "rows", "0"),
            tokenizer,
        )


@pytest.mark.parametrize("case", [case for case in CASES if isinstance(CASES[case][2], str)])
def test_prompts_of_real_rows(case: str, data_dir: Path, smollm2: Path) -> None:
    name, _, path = CASES[case]
    task = registry.task(name)
    source = data_dir / str(path)
    where: Any = {"train": str(source)} if source.is_file() else str(source)
    config = task.Config(path=where, limit_train=40, max_length=4096)
    split = task.load(config, "train")
    check(task, config, split, tokenizer_of(smollm2))
