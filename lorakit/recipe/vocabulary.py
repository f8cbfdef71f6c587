"""The keys of ``model`` that change the vocabulary: ``add_tokens`` and ``chat_template``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lorakit.errors import did_you_mean
from lorakit.recipe.diagnostics import Fault
from lorakit.recipe.sections import ModelSection

#: The templates of ``lorakit/data/chat/templates``.
CHAT_TEMPLATES = (
    "alpaca", "chatml", "gemma", "llama-2", "llama-3", "mistral", "vicuna", "zephyr",
)  # fmt: skip
_MAX_BYTES = 1_000_000


def vocabulary_faults(model: ModelSection, task_kind: str | None) -> Iterator[Fault]:
    """Yield the faults of both keys; a file with a chat template is read."""
    yield from _add_tokens(model)
    name, path = model.chat_template, ("model", "chat_template")
    if name is None:
        return
    if task_kind == "encoder":
        message = "the task has no chats"
        yield Fault(path, message, name, True, "null")
    elif name not in CHAT_TEMPLATES:
        allowed = f"{', '.join(CHAT_TEMPLATES)}, or a file with a Jinja template"
        if (problem := _problem_of_file(name)) is not None:
            yield Fault(path, problem, name, True, allowed)


def _add_tokens(model: ModelSection) -> Iterator[Fault]:
    allowed = "texts that differ, none of whitespace only"
    seen: set[str] = set()
    for index, token in enumerate(model.add_tokens):
        path = ("model", "add_tokens", index)
        if not token.strip():
            yield Fault(path, "only whitespace", token, True, allowed)
        elif token in seen:
            yield Fault(path, "listed twice", token, True, allowed)
        seen.add(token)


def _problem_of_file(name: str) -> str | None:
    from jinja2 import Environment, TemplateSyntaxError

    file = Path(name)
    try:
        if not file.is_file():
            return did_you_mean("no such template or file", name, CHAT_TEMPLATES)
        if file.stat().st_size > _MAX_BYTES:
            return "too large for a template"
        source = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"
    if not source.strip():
        return "an empty file"
    try:
        list(Environment().lex(source))  # its tags may be extensions, so it is not parsed
    except TemplateSyntaxError as error:
        return f"line {error.lineno} of the template: {error.message}"
    return None
