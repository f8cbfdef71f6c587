"""What of a prompt's messages the chat template leaves out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lorakit.data.chat.template import ChatTemplate, Message, Tools
from lorakit.data.chat.traces import Traces
from lorakit.data.chat.turns import Turn


def ignored_in_prompt(messages: Sequence[Message], tools: Tools, tokenizer: Any) -> Counter[str]:
    """The keys, and ``tools``, that have no effect on the prompt, each with its count.

    Raises DataError for a message of which the prompt has nothing.
    """
    template = ChatTemplate(tokenizer)
    prompt = template.render(messages, tools, generation_prompt=True).text
    answer = Turn(len(messages), prompt, "", ())
    traces = Traces(template)
    asked = [*messages, {"role": "assistant"}]
    without_content = traces.check(asked, tools, [answer])
    return traces.ignored(asked, tools, [answer]) + Counter(content=without_content)
