"""Chat templates of our own for base models without one, and those in files of users."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lorakit.errors import UserError, shown
from lorakit.recipe.vocabulary import CHAT_TEMPLATES

_FOLDER = Path(__file__).parent / "templates"
#: The tokens of built-in templates that are not written as plain text.
_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
#: What a special token looks like in a user's template.
_SPECIAL = re.compile(r"<\|[^\s|<>{}'\"]{1,60}\|>")


@dataclass(frozen=True)
class TemplateSource:
    """A chat template, and the special tokens that it needs."""

    source: str
    tokens: tuple[str, ...] = ()


def find_template(name: str) -> TemplateSource:
    """Return the built-in template ``name``, or that in the file ``name``, which needs the special
    tokens of the form ``<|name|>`` that it contains. Raises UserError for a file that cannot be
    read."""
    if name in CHAT_TEMPLATES:
        source = (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
        return TemplateSource(source, _TOKENS.get(name, ()))
    try:
        source = Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"model.chat_template = {shown(name)}: cannot be read: {error}") from error
    return TemplateSource(source, tuple(dict.fromkeys(_SPECIAL.findall(source))))
