from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lorakit import registry
from lorakit.data.sources import Split
from lorakit.evaluation.prompts import answer_contents

HEADER = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}ANSWER{% else %}"
    "{{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    ("answer", "written", "content"),
    [
        ("{{ m.content }}</s>", "So: Blue", "So: Blue"),
        (" {{ m.content }} </s>", " Blue ", " Blue "),
        ("So: {{ m.content }}</s>", "So: Blue", "Blue"),
        ("So: {{ m.content }}</s>", " Blue", " Blue"),
        ("<think>\n\n</think>\n\n{{ m.content }}</s>", "<think>\n\n</think>\n\nBlue", "Blue"),
        ("<think>\n\n</think>\n\n{{ m.content }}</s>", "<think>\nHm.\n</think>\n\nBlue",
         "<think>\nHm.\n</think>\n\nBlue"),
        ("<s>So: {{ m.content }} (end)</s>", "So: Blue (end)", "Blue"),
        ("<s>So: {{ m.content }} (end)</s>", "So: Blue (en", "Blue (en"),
    ],
)  # fmt: skip
def test_fixed_text_of_the_template_is_removed_from_answers(
    answer: str, written: str, content: str, tiny_llama: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = HEADER.replace("ANSWER", answer)
    task: Any = registry.task("chat")
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Blue"}]
    split = Split("validation", [{"messages": messages}] * 2, "rows", "0")
    assert answer_contents(task, task.Config(), split, tokenizer, [1], [written]) == [content]


@pytest.mark.parametrize(
    ("answer", "content", "written", "compared"),
    [
        ("{{ m.content | upper }}</s>", "Blue", "BLUE", "Blue"),
        ("{{ m.content | upper }}</s>", "Blue", "BLUES", "BLUES"),
        ("So: {{ m.content | title }}</s>", "dark blue", "So: Dark Blue", "dark blue"),
        ("So: {{ m.content | title }}</s>", "dark blue", "So: Dark", "Dark"),
        ("<s> {{ m.content | e }} (end)</s>", "a < b", "a &lt; b (end)", "a < b"),
        ("{{ m.content | replace('lue', '') }}</s>", "Blue", " B", "Blue"),
        ("{% generation %}{{ m.content | lower }}</s>{% endgeneration %}", "Blue", "blue", "Blue"),
    ],
)
def test_a_rendered_turn_becomes_its_content(
    answer: str, content: str, written: str, compared: str, tiny_llama: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = HEADER.replace("ANSWER", answer)
    task: Any = registry.task("chat")
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]
    split = Split("validation", [{"messages": messages}], "rows", "0")
    assert answer_contents(task, task.Config(), split, tokenizer, [0], [written]) == [compared]
