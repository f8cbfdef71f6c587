"""``--set section.key=value`` and ``overrides={"section.key": value}``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorakit.errors import RecipeError
from lorakit.recipe.faults import OVERRIDE, Fault
from lorakit.recipe.yaml_source import KeyPath, Source, dotted, read_value

Overrides = Mapping[str, object] | Sequence[str]

_FORM = "section.key=value, as in train.seed=1"


def apply_overrides(source: Source, overrides: Overrides | None) -> list[Fault]:
    """Put the values into ``source.data``, in place; returns what could not be read or placed.

    On the command line the value is YAML; a mapping's values are taken as they are. What stands
    behind the second dot is one key of a mapping: ``adapter.rank_pattern.layers.0.q_proj=4``.
    Environment variables are not expanded here: a shell has done so already.
    """
    faults: list[Fault] = []
    for name, value in _pairs(overrides, faults):
        path: KeyPath = tuple(name.split(".", 2))
        if not all(path):
            faults.append(Fault((name,), "an empty key", value, True, _FORM, OVERRIDE))
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
    """What YAML would have given: lists for tuples, texts for paths."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _place(source: Source, path: KeyPath, value: Any) -> Iterator[Fault]:
    holder: Any = source.data
    for length, part in enumerate(path[:-1], 1):
        if holder.get(part) is None:
            holder[part] = {}
        holder = holder[part]
        if not isinstance(holder, dict):
            message = f"{dotted(path[:length])} holds no keys"
            yield Fault(path, message, value, True, "the value itself", OVERRIDE)
            return
    holder[path[-1]] = value
    source.overridden.add(path)
    for known in [known for known in source.lines if known[: len(path)] == path]:
        del source.lines[known]
