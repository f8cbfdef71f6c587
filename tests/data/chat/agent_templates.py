"""Templates with tools and reasoning in the styles of Qwen 3, Llama 3.1, Mistral, Gemma and gpt-oss."""

from __future__ import annotations

import json
from typing import Any

from tests.data.chat.templates import Message, Style

#: Reasoning behind the last question only, from its key or the content; results of tools are the
#: user's.
_QWEN3 = """\
{%- set first = messages[0].content if messages[0].role == 'system' else '' %}
{%- if tools %}
{{- '<|im_start|>system\n' ~ (first ~ '\n\n' if first else '') ~ '# Tools\n<tools>\n' }}
{%- for tool in tools %}{{ tool | tojson ~ '\n' }}{% endfor %}{{ '</tools><|im_end|>\n' }}
{%- elif first %}{{ '<|im_start|>system\n' ~ first ~ '<|im_end|>\n' }}
{%- endif %}
{%- set asked = namespace(last=0) %}
{%- for m in messages if m.role == 'user' %}{% set asked.last = loop.length %}{% endfor %}
{%- set question = namespace(number=0) %}
{%- for m in messages %}
{%- set text = m.content or '' %}
{%- if m.role == 'user' %}
{%- set question.number = question.number + 1 %}
{{- '<|im_start|>user\n' ~ text ~ '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}
{%- set thought = m.reasoning_content or '' %}
{%- if not thought and '</think>' in text %}
{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set text = text.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if question.number == asked.last and (loop.last or thought) %}
{{- '<think>\n' ~ thought.strip('\n') ~ '\n</think>\n\n' ~ text.lstrip('\n') }}
{%- else %}{{ text }}
{%- endif %}
{%- for call in m.tool_calls or [] %}
{{- '\n' if text or not loop.first }}
{{- '<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
{{- call.function.arguments | tojson ~ '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user' if messages[loop.index0 - 1].role != 'tool' }}
{{- '\n<tool_response>\n' ~ text ~ '\n</tool_response>' }}
{{- '<|im_end|>\n' if loop.last or messages[loop.index0 + 1].role != 'tool' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
#: The tools are in the first question; a turn is one call or a text.
_LLAMA31 = """\
{{- bos_token }}
{%- set system = messages[0].content | trim if messages[0].role == 'system' else '' %}
{%- set messages = messages[1:] if messages[0].role == 'system' else messages %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{{- ('Environment: ipython\n' if tools else '') ~ system ~ '<|eot_id|>' }}
{%- for m in messages %}
{%- set role = 'ipython' if m.role == 'tool' else m.role %}
{{- '<|start_header_id|>' ~ role ~ '<|end_header_id|>\n\n' }}
{%- if tools and loop.first %}
{{- 'Functions:\n\n' }}{% for tool in tools %}{{ tool | tojson ~ '\n\n' }}{% endfor %}
{%- endif %}
{%- if m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('only one call at once') }}{% endif %}
{{- '{"name": "' ~ m.tool_calls[0].function.name ~ '", "parameters": ' }}
{{- m.tool_calls[0].function.arguments | tojson ~ '}' }}
{%- elif m.role == 'tool' %}{{ m.content | tojson }}
{%- else %}{{ m.content | trim }}
{%- endif %}
{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
#: The tools are before the last question; reasoning is kept in all turns.
_MISTRAL = """\
{{- bos_token }}
{%- set asked = namespace(last=0) %}
{%- for m in messages if m.role == 'user' %}{% set asked.last = loop.length %}{% endfor %}
{%- set question = namespace(number=0) %}
{%- for m in messages %}
{%- if m.role == 'system' %}{{ '[SYSTEM_PROMPT]' ~ m.content ~ '[/SYSTEM_PROMPT]' }}
{%- elif m.role == 'user' %}
{%- set question.number = question.number + 1 %}
{%- if tools and question.number == asked.last %}
{{- '[AVAILABLE_TOOLS]' ~ tools | tojson ~ '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{{- '[INST]' ~ m.content ~ '[/INST]' }}
{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' ~ m.content ~ '[/TOOL_RESULTS]' }}
{%- elif m.role == 'assistant' %}
{%- if m.reasoning_content %}{{ '[THINK]' ~ m.reasoning_content ~ '[/THINK]' }}{% endif %}
{{- m.content or '' }}
{%- for call in m.tool_calls or [] %}
{{- '[TOOL_CALLS]' ~ call.function.name ~ '[ARGS]' ~ call.function.arguments | tojson }}
{%- endfor %}
{{- eos_token }}
{%- else %}{{ raise_exception('unknown role ' ~ m.role) }}
{%- endif %}
{%- endfor %}"""
#: The system message is part of the first question, and roles must alternate.
_GEMMA = """\
{{- bos_token }}
{%- set system = messages[0].content ~ '\n\n' if messages[0].role == 'system' else '' %}
{%- set messages = messages[1:] if messages[0].role == 'system' else messages %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}
{%- endif %}
{{- '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' }}
{{- (system if loop.first else '') ~ m.content | trim ~ '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
#: Channels; the analysis is kept before a call, and in an answer that nothing follows.
_GPT_OSS = """\
{{- '<|start|>system<|message|>Reasoning: medium<|end|>' }}
{%- set has_system = messages[0].role in ['system', 'developer'] %}
{%- if has_system or tools %}
{{- '<|start|>developer<|message|>' }}
{%- if has_system %}{{ '# Instructions\n\n' ~ messages[0].content ~ '\n\n' }}{% endif %}
{%- for tool in tools or [] %}{{ tool | tojson ~ '\n' }}{% endfor %}
{{- '<|end|>' }}
{%- endif %}
{%- set called = namespace(name='') %}
{%- for m in (messages[1:] if has_system else messages) %}
{%- if m.role == 'assistant' %}
{%- set thought = m.thinking or (m.content if m.tool_calls) or '' %}
{%- if thought and (m.tool_calls or (loop.last and not add_generation_prompt)) %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' ~ thought ~ '<|end|>' }}
{%- endif %}
{%- if m.tool_calls %}
{%- set called.name = 'functions.' ~ m.tool_calls[0].function.name %}
{{- '<|start|>assistant to=' ~ called.name ~ '<|channel|>commentary json<|message|>' }}
{{- m.tool_calls[0].function.arguments | tojson ~ '<|call|>' }}
{%- else %}
{{- '<|start|>assistant<|channel|>final<|message|>' ~ m.content }}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
{%- endif %}
{%- elif m.role == 'tool' %}
{{- '<|start|>' ~ called.name ~ ' to=assistant<|channel|>commentary<|message|>' }}
{{- m.content | tojson ~ '<|end|>' }}
{%- else %}{{ '<|start|>' ~ m.role ~ '<|message|>' ~ m.content ~ '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""


def _content(message: Message) -> str:
    return str(message.get("content") or "")


def _calls(message: Message) -> list[tuple[str, str]]:
    functions = [call["function"] for call in message.get("tool_calls", ())]
    return [(found["name"], json.dumps(found["arguments"])) for found in functions]


def _qwen3(message: Message) -> str:
    thought, text = str(message.get("reasoning_content", "")), _content(message)
    if not thought and "</think>" in text:
        before, _, text = text.rpartition("</think>")
        thought, text = before.rpartition("<think>")[2].strip("\n"), text.lstrip("\n")
    calls = [f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
             for name, arguments in _calls(message)]  # fmt: skip
    said = [text.lstrip("\n"), *calls] if text else calls
    return f"<think>\n{thought}\n</think>\n\n" + "\n".join(said) + "<|im_end|>"


def _llama31(message: Message) -> str:
    for name, arguments in _calls(message):
        return f'{{"name": "{name}", "parameters": {arguments}}}<|eot_id|>'
    return _content(message).strip() + "<|eot_id|>"


def _mistral(message: Message) -> str:
    thought = message.get("reasoning_content", "")
    calls = [f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in _calls(message)]
    begin = f"[THINK]{thought}[/THINK]" if thought else ""
    return begin + _content(message) + "".join(calls) + "<|im_end|>"


def _gpt_oss(message: Message) -> str:
    calls, thought = _calls(message), message.get("reasoning_content", "")
    thought = thought or (_content(message) if calls else "")
    begin = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else ""
    for name, arguments in calls:
        head = f" to=functions.{name}<|channel|>commentary json<|message|>"
        return f"{begin}{head}{arguments}<|call|>"
    return f"{begin}<|channel|>final<|message|>{_content(message)}<|return|>"


def _tokens(*names: str) -> tuple[str, ...]:
    return tuple(f"[{end}{name}]" for name in names for end in ("", "/"))


AGENT_STYLES: dict[str, Style] = {
    "qwen3-like": Style(
        _QWEN3, _qwen3, ("<think>", "</think>", "<tool_call>", "</tool_call>"),
        tools=True, reasoning=True, splits=True,
    ),
    "llama3.1-like": Style(
        _LLAMA31, _llama31, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), tools=True
    ),
    "mistral-like": Style(
        _MISTRAL, _mistral,
        (*_tokens("INST", "THINK", "TOOL_RESULTS", "AVAILABLE_TOOLS", "SYSTEM_PROMPT"),
         "[TOOL_CALLS]", "[ARGS]"),
        tools=True, reasoning=True,
    ),
    "gemma-like": Style(
        _GEMMA, lambda m: _content(m).strip() + "<end_of_turn>",
        ("<start_of_turn>", "<end_of_turn>"),
    ),
    "gpt-oss-like": Style(
        _GPT_OSS, _gpt_oss,
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>", "<|return|>"),
        tools=True, reasoning=True, splits=True,
    ),
}  # fmt: skip


def agent_chat(call: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Two questions, the first of which needs a tool; with reasoning in each turn."""
    return (
        {"role": "user", "content": "When is high tide?"},
        {"role": "assistant", "tool_calls": [call], "reasoning_content": "I look it up"},
        {"role": "tool", "tool_call_id": "c1", "name": "get_tide", "content": "14:05"},
        {"role": "assistant", "content": "At 14:05.", "reasoning_content": "日本 é, 14:05"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Sure", "reasoning_content": "Sure"},
    )
