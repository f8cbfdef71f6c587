"""Problems of the members' recipes, located in the sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lorakit.errors import Problem
from lorakit.recipe.diagnostics import OVERRIDE
from lorakit.recipe.yaml_source import KeyPath
from lorakit.sweeps.source import Source


class MemberProblems:
    """Each problem once, with the names of the members that have it."""

    def __init__(self, source: Source, count: int) -> None:
        self._source, self._count = source, count
        self._found: dict[str, tuple[Problem, list[str]]] = {}

    def add(self, name: str, paths: Mapping[str, KeyPath], problems: Sequence[Problem]) -> None:
        """``paths`` tell where the sweep has the recipe keys that it sets."""
        for problem in problems:
            if problem.file == OVERRIDE:
                file, line = self._source.place(_place_of(problem.key, paths))
                problem = replace(problem, file=file, line=line)
            without_value = replace(problem, has_value=False)
            is_unknown = problem.message.startswith("unknown key")  # whatever values it has
            identity = str(without_value if is_unknown else problem)
            first, names = self._found.setdefault(identity, (problem, []))
            names.append(name)
            if first != problem:
                self._found[identity] = without_value, names

    def listed(self) -> list[Problem]:
        return [self._named(problem, names) for problem, names in self._found.values()]

    def _named(self, problem: Problem, names: Sequence[str]) -> Problem:
        """What all members have in common names none of them."""
        if len(names) == self._count:
            return problem
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        key = f"member {names[0]}{others}" + (f": {problem.key}" if problem.key else "")
        return replace(problem, key=key)


def _place_of(key: str, paths: Mapping[str, KeyPath]) -> KeyPath:
    """Where the sweep sets ``key``, a key inside of it or one around it."""
    for name, path in paths.items():
        if key == name or key.startswith((f"{name}.", f"{name}[")) or name.startswith(f"{key}."):
            return path
    return ()
