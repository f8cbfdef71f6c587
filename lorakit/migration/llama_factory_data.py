"""The datasets of a LLaMA-Factory file: names of entries of ``dataset_info.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorakit.errors import UserError
from lorakit.migration.draft import Draft, refuse
from lorakit.migration.sources import source, without_part

_INFO = "dataset_info.json"
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system",
           "history": "history", "tools": "tools"}  # fmt: skip
_OPENAI = {"role_tag": "role", "content_tag": "content"}


def set_task(draft: Draft, stage: str, file: Path) -> None:
    """Set the keys of ``task``. Raises UserError if the file names no data."""
    names = draft.names("dataset") or draft.names("train_dataset")
    if not names:
        raise UserError(
            "dataset: required key is missing; only files for training are converted (to export a "
            "model: lorakit merge, to chat with one: lorakit generate)"
        )
    folder = draft.text("dataset_dir") or "data"
    known = _entries(folder, file)
    entries = {name: known[name] for name in names if isinstance(known.get(name), Mapping)}
    for name in (name for name in names if name not in known):
        note = f"not found in {folder}/{_INFO}; set task.path to its file or Hub name"
        draft.lose("dataset", name, note)
    _set_format(draft, stage, entries)
    train = list(_weighted(draft, [_source(draft, name, known, folder) for name in names]))
    path: Any = train[0] if len(train) == 1 else train
    evaluated = draft.names("eval_dataset")
    if evaluated:
        found = [_source(draft, name, known, folder) for name in evaluated]
        path = {"train": path, "validation": found[0] if len(found) == 1 else found}
    draft.set("task.path", path)
    _set_limits(draft, stage, len(names))


def _entries(folder: str, file: Path) -> Mapping[str, Any]:
    """The entries of ``dataset_info.json``, in ``folder`` below the working directory or any
    directory above ``file``. Raises UserError if the file is not JSON."""
    for place in (Path(), *file.resolve().parents):
        info = place / folder / _INFO
        if info.is_file():
            try:
                found = json.loads(info.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise UserError(f"{info}: cannot be read as JSON: {error}") from None
            if not isinstance(found, dict):
                raise UserError(f"{info}: not a mapping of names to datasets")
            return found
    return {}


def _part(entry: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The mapping under ``key`` of an entry; empty if it is something else."""
    found = entry.get(key)
    return found if isinstance(found, Mapping) else {}


def _source(draft: Draft, name: str, known: Mapping[str, Any], folder: str) -> Any:
    entry = known.get(name)
    if not isinstance(entry, Mapping):
        return name if "." in name or "/" in name else f"{folder}/{name}.json"
    for key in ("ranking", "num_samples", "images", "videos", "audios"):
        value = entry.get(key) or _part(entry, "columns").get(key)
        if value:
            draft.lose(f"{name}.{key}", value, "lorakit has no such key")
    split, part = without_part(str(entry.get("split") or "train"))
    if part:
        draft.lose(f"{name}.split", entry["split"], "task.limit_train takes the first rows")
    if hub := entry.get("hf_hub_url"):
        return source(str(hub), split, entry.get("subset"))
    if file := entry.get("file_name"):
        return str(Path(folder, str(file)))
    draft.lose("dataset", name, "its entry has no file_name and no hf_hub_url")
    return f"{folder}/{name}.json"


def _weighted(draft: Draft, sources: list[Any]) -> Iterator[Any]:
    weights = draft.names("interleave_probs")
    if len(weights) != len(sources):
        yield from sources
        return
    for found, weight in zip(sources, weights, strict=True):
        try:
            share = float(weight)
        except ValueError:
            raise refuse("interleave_probs", weights, "allowed: numbers") from None
        yield {**(found if isinstance(found, dict) else {"path": found}), "weight": share}


def _set_format(draft: Draft, stage: str, entries: Mapping[str, Any]) -> None:
    if stage == "pt":
        draft.set("task.name", "text")
        draft.set("task.packing", True)
        columns = {str(_part(entry, "columns").get("prompt", "text")) for entry in entries.values()}
        if columns and columns != {"text"}:
            draft.set("task.text_column", min(columns))
        return
    draft.set("task.name", "chat")
    formats = {_format(draft, name, entry) for name, entry in entries.items()}
    if len(formats) == 1:
        fmt, column = formats.pop()
        draft.set("task.format", fmt)
        if column not in (None, {"messages": "messages"}.get(fmt, "conversations")):
            draft.set("task.messages_column", column)
    elif formats:
        draft.changed.append("dataset: the formats differ, and are recognized from the columns")


def _format(draft: Draft, name: str, entry: Mapping[str, Any]) -> tuple[str, str | None]:
    """The format of an entry, and the column of its messages. Renamed columns are reported."""
    columns, tags = _part(entry, "columns"), _part(entry, "tags")
    if entry.get("formatting", "alpaca") == "alpaca":
        renamed = {k: v for k, v in columns.items() if k in _ALPACA and _ALPACA[k] != v}
        if renamed:
            allowed = ", ".join(_ALPACA.values())
            draft.lose(f"{name}.columns", renamed, f"rename the columns to {allowed}")
        return "alpaca", None
    column = columns.get("messages", "conversations")
    is_openai = entry.get("formatting") == "openai" or all(
        tags.get(tag) == value for tag, value in _OPENAI.items()
    )
    return ("messages" if is_openai else "sharegpt"), str(column)


def _set_limits(draft: Draft, stage: str, count: int) -> None:
    limit = draft.take("max_samples")
    if limit and count == 1:
        draft.set("task.limit_train", limit)
    elif limit:
        note = "rows of each dataset; task.limit_train counts those of all"
        draft.lose("max_samples", limit, note)
    packing = [draft.take(key) for key in ("packing", "neat_packing")]
    if any(packing):
        draft.set("task.packing", True)
    elif packing[0] is False:
        draft.drop("task.packing")
    if packing[0] and not packing[1]:
        draft.change("packing", True, "rows in a bin do not attend to each other")
    trains = draft.take("train_on_prompt"), draft.take("mask_history")
    if stage == "sft" and any(trains):
        draft.set("task.train_on", "all" if trains[0] else "last")
