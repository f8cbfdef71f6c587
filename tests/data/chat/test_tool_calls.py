from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lorakit.data.chat.tool_calls import render_calls

ARGUMENTS = {"city": "Zürich", "days": [1, 2], "metric": True, "zone": None}
TEXT = '{"city": "Zürich", "days": [1, 2], "metric": true, "zone": null}'
PLAIN = {"role": "user", "content": "hi"}


def renderer(source: str) -> Callable[[Sequence[Any]], str]:
    template = ImmutableSandboxedEnvironment().from_string(source)
    return lambda messages: template.render(messages=messages)


def rendered(form: str, *messages: Any) -> str:
    loop = "{% for m in messages %}{% for c in m.tool_calls or [] %}" + form
    render = renderer(loop + "{% endfor %}{% endfor %}")
    return render_calls(render, messages, text_of=str)


@pytest.mark.parametrize(
    "form",
    [
        "{{ c.function.arguments }}",
        "{{ '' + c.function.arguments }}",
        "{{ c.function.arguments | trim }}",
        "{% if c.function.arguments is mapping %}" + TEXT + "{% else %}wrong{% endif %}",
    ],
)
@pytest.mark.parametrize("arguments", [ARGUMENTS, TEXT])
def test_the_form_that_the_template_expects(form: str, arguments: Any) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    assert rendered(form, PLAIN, {"role": "assistant", "tool_calls": [call]}, PLAIN) == TEXT
    assert call["function"] == {"name": "f", "arguments": arguments}


def test_calls_without_function() -> None:
    message = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": ARGUMENTS}]}
    assert rendered("{{ c.arguments }}", message) == TEXT


@pytest.mark.parametrize("arguments", ["{", "[1]", "", None, 3])
def test_what_is_no_object_stays(arguments: Any) -> None:
    message = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}
    assert rendered("{{ c.arguments }}", message) == str(arguments)
    assert rendered("{{ c.name }}", {"role": "assistant", "tool_calls": [{"name": "f"}]}) == "f"


def test_a_mapping_that_is_walked_stays_one() -> None:
    form = "{% for key in c.function.arguments %}{{ key }} {% endfor %}"
    call = {"function": {"name": "f", "arguments": ARGUMENTS}}
    message = {"role": "assistant", "tool_calls": [call]}
    assert rendered(form, message) == "city days metric zone "


def test_what_is_raised_is_of_the_mapping() -> None:
    def render(messages: Sequence[Any]) -> str:
        arguments = messages[0]["tool_calls"][0]["function"]["arguments"]
        raise ValueError(type(arguments).__name__)

    call = {"function": {"name": "f", "arguments": ARGUMENTS}}
    with pytest.raises(ValueError, match="dict"):
        render_calls(render, [{"role": "assistant", "tool_calls": [call]}], str)


def test_a_chat_without_arguments_is_rendered_once() -> None:
    seen: list[Any] = []

    def render(messages: Sequence[Any]) -> str:
        seen.append(messages)
        return "{}"

    call = {"function": {"name": "f", "arguments": {}}}
    for messages in ([PLAIN], [{"role": "assistant", "tool_calls": []}]):
        assert render_calls(render, messages, str) == "{}"
    assert len(seen) == 2
    render_calls(render, [{"role": "assistant", "tool_calls": [call]}], str)
    assert len(seen) == 3
