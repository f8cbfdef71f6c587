"""Reading run.json, which someone else may have written."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.io.json_file import read_json_object

#: What is read from run.json, and the types of it; ``*`` stands for any key.
_SPLIT_TYPES = {
    "source": str,
    "fingerprint": str,
    "tokens": int,
    "rows_read": int,
    "skipped_rows": int,
}
_RUN_TYPES: dict[str, Any] = {
    "exit_reason": str,
    "metrics": {"*": (int, float)},
    "trainable_parameters": int,
    "steps": int,
    "seconds": (int, float),
    "main_metric": str,
    "best_step": int,
    "diverged": bool,
    "bad_row": bool,
    "method_digest": str,
    "chat_template_digest": str,
    "init_from": {"adapter": str, "fingerprint": str},
    "launch": str,
    "hardware": {"processes": int},
    "data": {"*": _SPLIT_TYPES},
}


def read_record(output_dir: Path) -> dict[str, Any]:
    """The contents of run.json; empty if there is no such file, or if it is not a JSON object."""
    return read_json(output_dir / "run.json")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``; empty if there is no such file, or if it has none."""
    try:
        return read_json_object(file)
    except (FileNotFoundError, ValueError):
        return {}


def read_run(output_dir: Path) -> dict[str, Any]:
    """What a resumed run reads from run.json, without entries of wrong types."""
    return _typed(read_record(output_dir), _RUN_TYPES)


def _is_finite(value: Any) -> bool:
    """Not of a number that no run writes: NaN, infinity, or an integer beyond float64."""
    return not isinstance(value, int | float) or abs(value) <= sys.float_info.max


def _typed(record: Any, types: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``record`` that have the given types, or that are mappings of such entries."""
    if not isinstance(record, dict):
        return {}
    if "*" in types:
        types = dict.fromkeys(record, types["*"])
    found = {}
    for key, type_ in types.items():
        if isinstance(type_, dict):
            if isinstance(record.get(key), dict):
                found[key] = _typed(record[key], type_)
        elif isinstance(record.get(key), type_) and _is_finite(record[key]):
            found[key] = record[key]
    return found
