"""Override values of a recipe file, from ``--set`` or in Python."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorakit.errors import RecipeError, shown
from lorakit.recipe.diagnostics import OVERRIDE, Fault
from lorakit.recipe.yaml_source import KeyPath, YamlFile, dotted, read_value

Overrides = Mapping[str, object] | Sequence[str]
_FORM = "SECTION.KEY=VALUE, such as train.seed=1"


def apply_overrides(source: YamlFile, overrides: Overrides | None) -> list[Fault]:
    """Set the overridden values in ``source.data``, in place; return the faults of invalid ones.

    Values from the command line are parsed as YAML, those of a mapping are used unchanged.
    Everything after the second dot is one key of a mapping:
    ``adapter.rank_pattern.layers.0.q_proj=4``. Variables are not expanded: the shell has done so.
    """
    faults: list[Fault] = []
    for name, value in _pairs(overrides, faults):
        path: KeyPath = tuple(name.split(".", 2))
        if not all(path):
            faults.append(Fault((name,), "empty key", value, True, _FORM, OVERRIDE))
        else:
            faults.extend(_place(source, path, value))
    return faults


def _pairs(overrides: Overrides | None, faults: list[Fault]) -> Iterator[tuple[str, Any]]:
    if overrides is None:
        return
    if isinstance(overrides, Mapping):
        for name, value in overrides.items():
            yield str(name), _plain(value)
        return
    for text in [overrides] if isinstance(overrides, str) else overrides:
        name, equals, value = text.partition("=")
        if not equals:
            faults.append(Fault((), f"{text!r} has no '='", allowed=_FORM, file=OVERRIDE))
            continue
        try:
            yield name.strip(), read_value(value, OVERRIDE)
        except RecipeError as error:
            faults.extend(
                Fault((name,), problem.message, value, True, problem.allowed, OVERRIDE)
                for problem in error.problems
            )


def _plain(value: object) -> Any:
    """Convert to what YAML has: lists for tuples, strings for paths."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _place(source: YamlFile, path: KeyPath, value: Any) -> Iterator[Fault]:
    holder: Any = source.data
    for length, part in enumerate(path[:-1], 1):
        if holder.get(part) is None:
            holder[part] = {}
        holder = holder[part]
        if not isinstance(holder, dict):
            parent = dotted(path[:length])
            message = f"{parent} has no keys"
            yield Fault(path, message, value, True, f"{parent}=VALUE", OVERRIDE)
            return
    holder[path[-1]] = value
    source.overridden.add(path)
    for known in [known for known in source.lines if known[: len(path)] == path]:
        del source.lines[known]


#: Keys of ``train`` of which a recipe sets one.
_EXCLUSIVE = (("epochs", "max_steps"), ("warmup_ratio", "warmup_steps"))


def drop_replaced(source: YamlFile) -> list[str]:
    """Drop the file's keys that an overridden key excludes, in place; return a note about each."""
    notes, keys = [], source.data.get("train")
    if not isinstance(keys, dict):
        return []
    for pair in _EXCLUSIVE:
        for key, other in (pair, pair[::-1]):
            given, in_file = ("train", key) in source.overridden, ("train", other) in source.lines
            if given and in_file and None not in (keys.get(key), keys.get(other)):
                replaced = shown(keys.pop(other))
                notes.append(
                    f"{OVERRIDE} train.{key} = {shown(keys[key])}: replaces train.{other} = "
                    f"{replaced} of {source.file}"
                )
    return notes
