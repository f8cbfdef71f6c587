"""Lets a merged model stop where it was trained to: at the EOS of the adapter's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorakit.adapters.merge.tokenizer import Tokenizer

_FILE = "generation_config.json"


def add_eos(folder: Path, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> str | None:
    """Add the EOS of ``tokenizer``, if it replaces that of the base, to the ids at which
    ``generate`` of transformers stops; return a note, None if nothing has changed.

    Without a ``generation_config.json`` in ``folder``, the ids are those of ``settings``, the
    base's ``config.json``.
    """
    eos, file = tokenizer.eos_id(), folder / _FILE
    stored: Any = {k: settings[k] for k in ("bos_token_id", "eos_token_id") if k in settings}
    if file.is_file():
        with suppress(OSError, ValueError):
            stored = json.loads(file.read_text(encoding="utf-8"))
    before = stored.get("eos_token_id") if isinstance(stored, dict) else None
    ids = before if isinstance(before, list) else [before] if before is not None else []
    if eos is None or not isinstance(stored, dict) or eos in ids:
        return None
    text = json.dumps(stored | {"eos_token_id": [eos, *ids]}, indent=2)
    file.write_text(f"{text}\n", encoding="utf-8")
    return f"{_FILE}: text also ends at the EOS of the adapter's tokenizer, id {eos}"
