"""The merged model's ``config.json``: the base's own text, edited only where the model changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.adapters.checkpoint import INDEX
from lorakit.adapters.held import Held
from lorakit.adapters.merge_plan import MergePlan

CONFIG = "config.json"
_DTYPE_KEYS = ("dtype", "torch_dtype")


def write_config(
    folder: Path, base: Path, held: Held, plan: MergePlan, dtype: str | None, sharded: bool
) -> None:
    """Write ``config.json``; where nothing changes, the base's bytes.

    ``dtype`` is what was asked for (None: every tensor keeps its own)."""
    content = (base / CONFIG).read_bytes()
    settings: dict[str, Any] = json.loads(content)
    before = json.dumps(settings)
    if held.architecture is not None:
        settings["architectures"] = [held.architecture]
    settings |= held.settings
    if "num_labels" in settings and "id2label" in held.settings:
        settings["num_labels"] = len(settings["id2label"])
    if dtype is not None:
        _set_dtype(settings, dtype)
    if plan.untied:
        settings["tie_word_embeddings"] = False
        if held.text_config is not None:
            part = settings.get(held.text_config) or {}
            settings[held.text_config] = {**part, "tie_word_embeddings": False}
    if (
        "transformers_weights" in settings
        and (settings["transformers_weights"] == INDEX) != sharded
    ):
        del settings["transformers_weights"]
    if json.dumps(settings) != before:
        content = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    (folder / CONFIG).write_bytes(content)


def _set_dtype(settings: dict[str, Any], dtype: str, top: bool = True) -> None:
    """Under the base's own key, and in the parts of a model of several."""
    keys = [key for key in _DTYPE_KEYS if key in settings] or (["dtype"] if top else [])
    for key in keys:
        settings[key] = dtype
    for key, value in settings.items():
        if key.endswith("_config") and isinstance(value, Mapping):
            part = dict(value)
            _set_dtype(part, dtype, top=False)
            settings[key] = part
