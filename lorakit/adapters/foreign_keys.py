"""Keys of ``adapter_config.json`` that a newer PEFT, or another tool, wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakit.adapters.json_types import ADALORA_TYPES, CONFIG_TYPES, LORA_TYPES
from lorakit.adapters.peft_config import DEFAULTS
from lorakit.errors import AdapterError, shown

#: Those of PEFT that are read elsewhere, or that say nothing of what an adapter computes.
_READ = {
    "beta1", "beta2", "deltaT", "inference_mode", "kasa_config", "lora_ga_config",
    "monteclora_config", "orth_reg_weight", "peft_type", "peft_version", "runtime_config",
    "target_r", "tfinal", "tinit", "total_step", "use_bdlora", "velora_config",
}  # fmt: skip
_KNOWN = {*DEFAULTS, *CONFIG_TYPES, *LORA_TYPES, *ADALORA_TYPES, *_READ}
_TIED = ("lora_embedding_", "lm_head.", "embed_tokens.", "wte.")


def unknown_keys_note(config: Mapping[str, Any], where: str) -> str | None:
    """A line that names the keys of no known meaning; one whose value is null, false or empty
    turns nothing on and is left out. None where there is nothing to say."""
    unknown = {key: value for key, value in config.items() if key not in _KNOWN and value}
    if not unknown:
        return None
    listed = ", ".join(f"{key} = {shown(value, 40)}" for key, value in sorted(unknown.items())[:8])
    more = ", ..." if len(unknown) > 8 else ""
    return f"{where}: unknown keys, which are ignored: {listed}{more}"


def check_tied(config: Mapping[str, Any], names: Mapping[str, Any], where: str) -> None:
    """Raise AdapterError for ``ensure_weight_tying`` where it does something: PEFT then adapts
    tied layers that the file does not name."""
    if config.get("ensure_weight_tying") and any(mark in name for name in names for mark in _TIED):
        raise AdapterError(
            f"{where}: ensure_weight_tying = true: not supported for an adapter of embeddings or "
            "of the output layer; allowed: false"
        )
