"""Chat templates of many styles, each with the text that the model must generate for a turn."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Style:
    """``answer`` returns the text that a generation must produce for a message, up to its end,
    after the generation prompt. ``special`` are tokens that the tokenizer needs. ``system``,
    ``tools`` and ``reasoning``: whether the template supports them. ``splits``: whether a chat of
    several turns becomes one row per turn."""

    template: str
    answer: Callable[[Message], str]
    special: tuple[str, ...] = ()
    system: bool = True
    tools: bool = False
    reasoning: bool = False
    splits: bool = False


def _content(message: Message) -> str:
    return str(message.get("content") or "")


def _calls(message: Message) -> str:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return "".join(
        f'\n<tool_call>\n{{"name": "{call["name"]}", "arguments": '
        f"{json.dumps(call['arguments'])}}}\n</tool_call>"
        for call in calls
    )


_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: The system message goes into the first question.
_LLAMA2 = """\
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
{%- set system = '<<SYS>>\n' ~ messages[0].content ~ '\n<</SYS>>\n\n' %}
{%- set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{{- bos_token ~ '[INST] ' ~ (system if loop.first else '') ~ m.content | trim ~ ' [/INST]' }}
{%- else %}
{{- ' ' ~ m.content | trim ~ ' ' ~ eos_token }}
{%- endif %}
{%- endfor %}"""
#: The system message goes into the last question.
_MISTRAL3 = """\
{{- bos_token }}
{%- set found = namespace(last=-1) %}
{%- for m in messages if m.role == 'user' %}{% set found.last = loop.length %}{% endfor %}
{%- set asked = namespace(count=0) %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- set asked.count = asked.count + 1 %}
{{- '[INST] ' }}
{%- if asked.count == found.last and messages[0].role == 'system' %}
{{- messages[0].content ~ '\n\n' }}
{%- endif %}
{{- m.content ~ '[/INST]' }}
{%- elif m.role == 'assistant' %}
{{- ' ' ~ m.content ~ eos_token }}
{%- endif %}
{%- endfor %}"""
_LLAMA3 = """\
{{- bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ m.content | trim ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
_GEMMA = """\
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- set role = 'model' if m.role == 'assistant' else m.role %}
{{- '<start_of_turn>' ~ role ~ '\n' ~ m.content | trim ~ '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
_VICUNA = """\
{%- for m in messages %}
{%- if m.role == 'system' %}{{ m.content ~ ' ' }}
{%- elif m.role == 'user' %}{{ 'USER: ' ~ m.content ~ ' ' }}
{%- else %}{{ 'ASSISTANT: ' ~ m.content ~ eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
_ZEPHYR = (
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ eos_token ~ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_PHI3 = (
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
_ALPACA = """\
{%- for m in messages %}
{%- if m.role == 'system' %}{{ m.content ~ '\n\n' }}
{%- elif m.role == 'user' %}{{ '### Instruction:\n' ~ m.content ~ '\n\n' }}
{%- else %}{{ '### Response:\n' ~ m.content ~ '\n\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"""
#: Reasoning only of the turns behind the last question, and an empty block in the last turn.
_QWEN3 = """\
{%- set found = namespace(last=0) %}
{%- for m in messages if m.role == 'user' %}{% set found.last = messages.index(m) %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set found.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
{{- '<|im_start|>' ~ m.role ~ '\n' }}
{%- set reasoning = m.reasoning_content or '' %}
{%- if m.role == 'assistant' and loop.index0 > found.last and (loop.last or reasoning) %}
{{- '<think>\n' ~ reasoning ~ '\n</think>\n\n' }}
{%- endif %}
{{- m.content ~ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
#: Without reasoning in earlier turns, which stands in the content, and without line breaks.
_DEEPSEEK = """\
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'system' %}{{ m.content }}
{%- elif m.role == 'user' %}{{ '<|User|>' ~ m.content }}
{%- else %}
{%- set text = m.content.split('</think>')[-1] if not loop.last else m.content %}
{{- '<|Assistant|>' ~ text ~ eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"""
_TOOLS = """\
{%- if tools %}
{{- '<|im_start|>tools\n' }}
{%- for tool in tools %}{{ tool | tojson ~ '\n' }}{% endfor %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' ~ m.content ~ '\n</tool_response><|im_end|>\n' }}
{%- else %}
{{- '<|im_start|>' ~ m.role ~ '\n' ~ (m.content or '') }}
{%- for call in m.tool_calls or [] %}
{{- '\n<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
{{- call.function.arguments | tojson ~ '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
_MARKED = """\
{%- for m in messages %}
{{- '<|im_start|>' ~ m.role ~ '\n' }}
{%- if m.role == 'assistant' %}
{%- generation %}{{ 'Answer: ' ~ m.content ~ '<|im_end|>\n' }}{% endgeneration %}
{%- else %}{{ m.content ~ '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
_TRAILING_SPACE = """\
{%- for m in messages %}
{{- {'user': 'Human', 'assistant': 'Assistant', 'system': 'System'}[m.role] ~ ': ' ~ m.content }}
{{- eos_token if m.role == 'assistant' else '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"""
_NO_HEADER = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
#: The end of a turn on a line of its own, and contents changed.
_SHOUTING = """\
{%- for m in messages %}
{{- '[' ~ m.role ~ ']\n' ~ m.content | trim | upper | e ~ '\n' ~ eos_token ~ '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"""
#: A system message is left out where the assistant spoke last.
_FORGETFUL = """\
{%- for m in messages %}
{%- if m.role != 'system' or messages[-1].role != 'assistant' %}
{{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
#: The prompt opens a block that the chat with the answer in it does not have.
_OPENS_THINKING = """\
{%- for m in messages %}
{{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"""
#: An empty block, in prompt and chat, where the question asks for it.
_NO_THINK = """\
{%- for m in messages %}
{{- '<|im_start|>' ~ m.role ~ '\n' }}
{%- if m.role == 'assistant' and '/no_think' in messages[loop.index0 - 1].content %}
{{- '<think>\n\n</think>\n\n' }}
{%- endif %}
{{- m.content ~ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if '/no_think' in messages[-1].content %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""
#: Reasoning that stands in the content is left out of every turn, the last one too.
_R1 = """\
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'system' %}{{ m.content }}
{%- elif m.role == 'user' %}{{ '<|User|>' ~ m.content }}
{%- else %}{{ '<|Assistant|>' ~ m.content.split('</think>')[-1] ~ eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"""
#: Each message has a number.
_NUMBERED = """\
{%- for m in messages %}
{{- '[' ~ loop.index ~ '] ' ~ m.role ~ ':\n' ~ m.content ~ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '[' ~ (messages | length + 1) ~ '] assistant:\n' }}{% endif %}"""

STYLES = {
    "chatml": Style(_CHATML, lambda m: _content(m) + "<|im_end|>"),
    "llama2": Style(_LLAMA2, lambda m: f" {_content(m).strip()} <|im_end|>"),
    "mistral3": Style(_MISTRAL3, lambda m: f" {_content(m)}<|im_end|>", splits=True),
    "llama3": Style(_LLAMA3, lambda m: _content(m).strip() + "<|eot_id|>",
                    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "gemma": Style(_GEMMA, lambda m: _content(m).strip() + "<end_of_turn>",
                   ("<start_of_turn>", "<end_of_turn>"), system=False),
    "vicuna": Style(_VICUNA, lambda m: f" {_content(m)}<|im_end|>"),
    "zephyr": Style(_ZEPHYR, lambda m: _content(m) + "<|im_end|>"),
    "phi3": Style(_PHI3, lambda m: _content(m) + "<|end|>",
                  ("<|end|>", "<|user|>", "<|assistant|>")),
    "alpaca": Style(_ALPACA, _content),
    "qwen3": Style(
        _QWEN3,
        lambda m: f"<think>\n{m.get('reasoning_content', '')}\n</think>\n\n{_content(m)}<|im_end|>",
        reasoning=True, splits=True,
    ),
    "deepseek": Style(_DEEPSEEK, lambda m: _content(m) + "<|im_end|>",
                      ("<|User|>", "<|Assistant|>")),
    "tools": Style(_TOOLS, lambda m: f"{_content(m)}{_calls(m)}<|im_end|>",
                   ("<tool_call>", "</tool_call>"), tools=True),
    "marked": Style(_MARKED, lambda m: f"Answer: {_content(m)}<|im_end|>\n"),
    "trailing_space": Style(_TRAILING_SPACE, lambda m: _content(m) + "<|im_end|>", splits=True),
    "no_header": Style(_NO_HEADER, lambda m: f"<assistant>{_content(m)}<|im_end|>"),
    "shouting": Style(_SHOUTING, lambda m: _shouted(_content(m)) + "\n<|im_end|>"),
    "forgetful": Style(_FORGETFUL, lambda m: _content(m) + "<|im_end|>"),
    "opens_thinking": Style(_OPENS_THINKING, lambda m: _content(m) + "<|im_end|>", splits=True),
    "no_think": Style(_NO_THINK, lambda m: _content(m) + "<|im_end|>"),
    "numbered": Style(_NUMBERED, lambda m: _content(m) + "<|im_end|>"),
    "r1": Style(_R1, lambda m: _content(m).split("</think>")[-1] + "<|im_end|>",
                ("<|User|>", "<|Assistant|>")),
}  # fmt: skip


def _shouted(text: str) -> str:
    from markupsafe import escape

    return str(escape(text.strip().upper()))
