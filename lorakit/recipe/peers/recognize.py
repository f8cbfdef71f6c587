"""Recognize whole files of other tools; without their tables of keys, which few recipes need."""

from __future__ import annotations

from collections.abc import Mapping

#: The keys that only files of LLaMA-Factory have at the top, besides the name of the model.
_OF_LLAMA_FACTORY = {"stage", "finetuning_type", "cutoff_len", "template", "dataset_dir"}


def tool_of(data: Mapping[str, object]) -> str | None:
    """The tool for which a YAML file was written, recognized by its top-level keys: ``Axolotl``,
    ``LLaMA-Factory`` or None."""
    if "base_model" in data:
        return "Axolotl"
    if "model_name_or_path" in data and _OF_LLAMA_FACTORY & data.keys():
        return "LLaMA-Factory"
    is_newer = isinstance(data.get("model"), str) and {"peft_config", "train_dataset"} & data.keys()
    return "LLaMA-Factory" if is_newer else None
