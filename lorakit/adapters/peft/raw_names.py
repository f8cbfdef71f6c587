"""Tensor names of adapters that were saved from ``state_dict()`` instead of by PEFT.

They include the adapter's name (``lora_A.default.weight``), names of wrappers, and all weights of
the base; without PEFT's model class they lack its prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from lorakit.adapters.peft.schema import PREFIX
from lorakit.errors import AdapterError

#: What torch.compile, FSDP and activation checkpointing insert into names.
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
#: A factor or a fully trained module, the adapter's name, and the rest.
_NAMED = re.compile(
    r"(?P<start>.*\.)(?P<part>lora_(?:A|B|E|embedding_A|embedding_B|magnitude_vector)"
    r"|modules_to_save|trainable_tokens_delta)\.(?!weight$|bias$)(?P<adapter>[^.]+)(?P<end>\..+)?"
)


def peft_names(stored: Iterable[str], biases: bool) -> dict[str, str]:
    """Stored name -> the name that PEFT would have saved, for every tensor of the adapter.

    ``biases``: whether the adapter trains the base's biases. Names that are PEFT's already are not
    changed. Raises AdapterError if the file has several adapters.
    """
    bare = {name: _WRAPPERS.sub("", name) for name in stored}
    found = {name: match for name, own in bare.items() if (match := _NAMED.fullmatch(own))}
    if all(match["part"] == "modules_to_save" for match in found.values()):
        return bare  # PEFT itself writes such names, with bias: all
    adapters = sorted({match["adapter"] for match in found.values()})
    if len(adapters) > 1:
        raise AdapterError(
            f"contains several adapters ({', '.join(adapters)}); allowed: one; hint: save each "
            "with PEFT's save_pretrained"
        )
    names = {name: _without_adapter(match) for name, match in found.items()}
    if biases:
        names = {name: own for name, own in bare.items() if own.endswith(".bias")} | names
    return {name: own if own.startswith(PREFIX) else PREFIX + own for name, own in names.items()}


def _without_adapter(match: re.Match[str]) -> str:
    start, part, end = match["start"], match["part"], match["end"] or ""
    if part == "modules_to_save":
        return start + end.removeprefix(".")
    # PEFT stores the magnitudes, a module of its own, as a plain tensor.
    return start + part + ("" if part == "lora_magnitude_vector" else end)
