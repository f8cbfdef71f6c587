"""The datasets of an Axolotl file, as the ``task`` of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lorakit.errors import UserError, shown
from lorakit.migration.draft import Draft
from lorakit.migration.sources import source, without_part

#: The start of a type -> the task, and its format.
_TYPES: dict[str, tuple[str, str | None]] = {
    "alpaca": ("completion", "alpaca"),
    "chat_template": ("chat", "messages"),
    "sharegpt": ("chat", "sharegpt"),
    "completion": ("text", None),
    "pretrain": ("text", None),
}
_BUILDERS = ("json", "csv", "parquet", "text", "arrow")
_UNKNOWN = "the task is chosen by the columns of the rows; docs/data.md says which are read"
#: The keys of a message in which lorakit looks for reasoning.
_REASONING = ("reasoning_content", "thinking", "reasoning")
#: Keys of a dataset that are read here.
_READ = {
    "path", "type", "name", "split", "data_files", "ds_type", "field", "field_messages",
    "message_property_mappings", "message_field_role", "message_field_content", "roles_to_train",
    "text_column", "conversation",
}  # fmt: skip


def set_task(draft: Draft) -> None:
    """Set the keys of ``task``. Raises UserError if the file names no data."""
    entries = _listed(draft.take("datasets"))
    pretraining = _listed(draft.take("pretraining_dataset"))
    if not (entries or pretraining):
        raise UserError("datasets: a dataset is required; allowed: a list of {path, type}")
    if pretraining:
        draft.take("train_on_inputs")
        _set_text(draft, pretraining)
    else:
        _set_examples(draft, entries)
    key = "datasets" if entries else "pretraining_dataset"
    sources = list(_sources(draft, entries or pretraining, key))
    train = sources[0] if len(sources) == 1 else sources
    tests = list(_sources(draft, _listed(draft.take("test_datasets")), "test_datasets"))
    if tests:
        draft.set(
            "task.path", {"train": train, "validation": tests[0] if len(tests) == 1 else tests}
        )
    else:
        draft.set("task.path", train)


def _listed(value: Any) -> list[Mapping[str, Any]]:
    entries = value if isinstance(value, list) else [] if value is None else [value]
    found: list[Mapping[str, Any]] = []
    for entry in entries:
        if isinstance(entry, str):
            found.append({"path": entry})
        elif isinstance(entry, Mapping) and entry.get("path"):
            found.append(entry)
        else:
            raise UserError(f"datasets: {shown(entry)}; allowed: a mapping with path and type")
    return found


def _sources(draft: Draft, entries: list[Mapping[str, Any]], key: str) -> Iterator[Any]:
    for index, entry in enumerate(entries):
        where = f"{key}[{index}]"
        path, files = str(entry["path"]), entry.get("data_files")
        split, part = without_part(str(entry.get("split") or "train"))
        if part and part.isdigit() and key == "datasets" and len(entries) == 1:
            draft.set("task.limit_train", int(part))
        elif part:
            note = "a part of a split has no counterpart; task.limit_train takes the first N rows"
            draft.lose(f"{where}.split", entry.get("split"), note)
        if files and path not in _BUILDERS and not entry.get("ds_type"):
            draft.lose(f"{where}.data_files", files, "the whole dataset is read")
        local = bool(files) and (path in _BUILDERS or bool(entry.get("ds_type")))
        yield source(files if local else path, split, entry.get("name"), bool(entry.get("ds_type")))
        for name, value in entry.items():
            if name in ("field_thinking", "template_thinking_key") and value in _REASONING:
                continue
            if name not in _READ and value not in (None, False, "", [], {}):
                draft.lose(f"{where}.{name}", value, "lorakit has no such key")


def _set_text(draft: Draft, entries: list[Mapping[str, Any]]) -> None:
    draft.set("task.name", "text")
    column = entries[0].get("text_column")
    if column not in (None, "text"):
        draft.set("task.text_column", column)
    if draft.given.get("max_steps"):
        draft.set("task.streaming", True)
    elif draft.take("streaming"):
        draft.lose("streaming", True, "streaming needs a number of steps, max_steps")


def _set_examples(draft: Draft, entries: list[Mapping[str, Any]]) -> None:
    found = [_task_of(entry, index, draft) for index, entry in enumerate(entries)]
    first = found[0]
    if any(task["name"] != first["name"] for task in found):
        kinds = ", ".join(dict.fromkeys(str(task["name"]) for task in found))
        draft.lose("datasets", kinds, "a recipe has one task; rows are read as those of the first")
    elif any(task != first for task in found):
        if first["name"] == "chat":
            first = {"name": "chat", "format": "auto"}
        draft.changed.append("datasets: their formats differ, and are recognized from the columns")
    for key, value in first.items():
        draft.set(f"task.{key}", value)
    if draft.take("train_on_inputs"):
        every = {"completion": "prompt_and_completion", "chat": "all"}.get(str(first["name"]))
        if every:
            draft.set("task.train_on", every)
        elif first["name"] == "auto":
            draft.lose("train_on_inputs", True, "task.train_on needs task.name: chat or completion")


def _task_of(entry: Mapping[str, Any], index: int, draft: Draft) -> dict[str, Any]:
    kind = entry.get("type")
    where = f"datasets[{index}].type"
    if isinstance(kind, Mapping):
        return _own_prompt(kind, where, draft)
    start = str(kind or "").partition(":")[0].partition(".")[0]
    if start not in _TYPES:
        if kind:
            draft.lose(where, kind, _UNKNOWN)
        return {"name": "auto"}
    name, fmt = _TYPES[start]
    if str(kind) != start and start == "alpaca":
        draft.change(where, kind, "the prompt is the original one of Alpaca")
    if name == "text":
        column = entry.get("field")
        return {"name": name} if column in (None, "text") else {"name": name, "text_column": column}
    task: dict[str, Any] = {"name": name, "format": fmt}
    if name == "chat":
        task |= _chat_keys(entry, index, draft, str(fmt))
    return task


def _chat_keys(entry: Mapping[str, Any], index: int, draft: Draft, fmt: str) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    mapping = entry.get("message_property_mappings") or {}
    role = mapping.get("role", entry.get("message_field_role"))
    content = mapping.get("content", entry.get("message_field_content"))
    if (role, content) == ("from", "value") or fmt == "sharegpt":
        keys["format"] = fmt = "sharegpt"
    elif (role or "role", content or "content") != ("role", "content"):
        note = "messages have role and content, or from and value"
        draft.lose(f"datasets[{index}].message_property_mappings", dict(mapping), note)
    column = entry.get("field_messages") or ("conversations" if fmt == "sharegpt" else "messages")
    if column != {"messages": "messages", "sharegpt": "conversations"}[fmt]:
        keys["messages_column"] = column
    roles = entry.get("roles_to_train")
    if roles is not None and not set(roles) <= {"assistant", "gpt"}:
        if {"user", "human"} & set(roles):
            keys["train_on"] = "all"
        else:
            draft.lose(f"datasets[{index}].roles_to_train", roles, "see task.train_on")
    return keys


def _own_prompt(kind: Mapping[str, Any], where: str, draft: Draft) -> dict[str, Any]:
    """A prompt of the user's own: ``{instruction}`` and ``{input}`` stand for columns."""
    columns = {name: str(kind.get(f"field_{name}") or name) for name in ("instruction", "input")}
    template = str(kind.get("format") or "{instruction}")
    for name, column in columns.items():
        template = template.replace(f"{{{name}}}", f"{{{column}}}")
    for name in ("no_input_format", "system_prompt", "system_format", "field_system"):
        if kind.get(name):
            draft.lose(f"{where}.{name}", kind[name], "task.template is one for all rows")
    answer = str(kind.get("field_output") or "output")
    return {"name": "completion", "template": template, "completion_template": f"{{{answer}}}"}
