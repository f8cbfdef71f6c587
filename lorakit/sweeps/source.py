"""Where a sweep is described: a file, a mapping, or a recipe with ``--grid``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lorakit.errors import Problem, RecipeError, UserError
from lorakit.recipe.diagnostics import OVERRIDE, Fault, locate
from lorakit.recipe.load import expand_environment
from lorakit.recipe.sections import Recipe
from lorakit.recipe.yaml_source import KeyPath, YamlFile, read_value, read_yaml

GRID = "--grid"
_FORMS = {OVERRIDE: "SECTION.KEY=VALUE, such as train.epochs=1"}
_FORMS[GRID] = "SECTION.KEY=VALUE,VALUE, such as train.seed=1,2"


@dataclass
class Source:
    """The keys of a sweep. ``options`` are the paths that command-line options have set."""

    yaml: YamlFile
    options: dict[KeyPath, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    @property
    def data(self) -> dict[str, Any]:
        return self.yaml.data

    def place(self, path: KeyPath) -> tuple[str, int | None]:
        """The file and line, or the option, that set ``path`` or the nearest enclosing key."""
        for length in range(len(path), 0, -1):
            if option := self.options.get(path[:length]):
                return option, None
        return locate(self.yaml, path)

    def located(self, fault: Fault) -> Problem:
        if fault.file is None:
            file, line = self.place(fault.path)
            return replace(fault.locate(self.yaml), file=file, line=line)
        return fault.locate(self.yaml)

    def set(self, path: KeyPath, value: Any, option: str) -> None:
        """Set the key at ``path``, which is at most two deep."""
        if len(path) == 1:
            self.data[str(path[0])] = value
        else:
            first, second = map(str, path)
            held = self.data.get(first)
            self.data[first] = {**(held if isinstance(held, dict) else {}), second: value}
        self.options[path] = option


def read_source(
    sweep: str | Path | Mapping[str, Any],
    *,
    grid: Sequence[str] = (),
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Source:
    """Read a sweep file or a mapping of its keys; with ``grid``, texts as after ``--grid``, a
    recipe. ``overrides`` are texts as after ``--set``; ``options`` maps options to values.

    Raises RecipeError if a file cannot be read, and UserError for a recipe in place of a sweep
    file, or the other way around.
    """
    source = Source(YamlFile("sweep", dict(sweep))) if isinstance(sweep, Mapping) else None
    if source is None:
        source = _read_file(Path(str(sweep)), bool(grid))
    if not grid:  # what the command line gives has been expanded by the shell, or is the recipe's
        source.faults += expand_environment(source.yaml)
    for option, key, texts in ((OVERRIDE, "set", overrides), (GRID, "grid", grid)):
        for text in texts:
            _add_text(source, option, key, text)
    for option, value in (options or {}).items():
        if value is not None:
            source.set((option.removeprefix("--").replace("-", "_"),), value, option)
    return source


def _read_file(file: Path, has_grid: bool) -> Source:
    yaml = read_yaml(file)
    is_recipe = "recipe" not in yaml.data and any(key in Recipe.model_fields for key in yaml.data)
    if is_recipe and not has_grid:
        raise UserError(f"{file}: is a recipe, not a sweep file; hint: add --grid KEY=V1,V2")
    if has_grid and not is_recipe:
        raise UserError(
            f"{GRID}: {file} is not a recipe; allowed: a recipe; a sweep file has its own grid"
        )
    if not has_grid:
        return Source(yaml)
    source = Source(YamlFile(str(file), {"recipe": str(file)}))
    expand_environment(yaml)
    train = yaml.data.get("train")
    output_dir = train.get("output_dir") if isinstance(train, dict) else None
    if isinstance(output_dir, str):
        source.data["output_dir"] = f"{output_dir}-sweep"
    return source


def _add_text(source: Source, option: str, key: str, text: str) -> None:
    name, equals, value = text.partition("=")
    name = name.strip()
    if not (name and equals):
        message = f"{text!r} is not a key and a value"
        source.faults.append(Fault((), message, allowed=_FORMS[option], file=option))
        return
    try:
        parsed = read_value(f"[{value}]" if option == GRID else value, option)
    except RecipeError as error:
        source.faults += [
            Fault((name,), problem.message, value, True, problem.allowed, option)
            for problem in error.problems
        ]
        return
    if option == GRID and value.rstrip().endswith(","):
        source.faults.append(Fault((name,), "ends with a comma", value, True, file=option))
    if source.options.get((key, name)) == GRID:
        source.faults.append(Fault((name,), "duplicate", value, True, "each key once", option))
    source.set((key, name), parsed, option)
