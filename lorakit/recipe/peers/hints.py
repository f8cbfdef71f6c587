"""Say what a key of another tool is in a recipe."""

from __future__ import annotations

from collections.abc import Mapping

from lorakit.errors import shown
from lorakit.recipe.peers.axolotl import AXOLOTL
from lorakit.recipe.peers.counterpart import Counterpart
from lorakit.recipe.peers.llama_factory import LLAMA_FACTORY
from lorakit.recipe.peers.trainer import PEFT, TRAINER, UNSLOTH

#: The maps of keys by the name of the tool, in the order in which a key is looked up.
TOOLS: dict[str, Mapping[str, Counterpart]] = {
    "PEFT": PEFT,
    "Transformers and TRL": TRAINER,
    "Axolotl": AXOLOTL,
    "LLaMA-Factory": LLAMA_FACTORY,
    "Unsloth": UNSLOTH,
}


def hint(key: str, value: object) -> str | None:
    """What to write in place of another tool's ``key``: ``use model.base_precision: nf4``; None if
    no other tool has the key."""
    found = next((keys[key] for keys in TOOLS.values() if key in keys), None)
    if found is None:
        return None
    if found.key is None:
        return f"not needed; {found.note}" if found.needless else found.note
    note = f"; {found.note}" if found.note else ""
    if not found.translates(value):
        return f"see {found.key}{note}"
    text = shown(found.value_of(value)).strip('"')
    return f"use {found.key}: {text}" + ("" if found.listed_only else note)
