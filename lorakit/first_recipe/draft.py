"""Put a first recipe together, check it, and write it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakit import registry
from lorakit.errors import Problem, RecipeError, UserError, did_you_mean, listed, shown
from lorakit.first_recipe.choose import Choice, Given, choose_task
from lorakit.first_recipe.columns import class_names
from lorakit.first_recipe.data import Data, measure, read_data
from lorakit.first_recipe.model import read_base_model
from lorakit.first_recipe.sections import Facts, recipe_text
from lorakit.first_recipe.settings import find_hardware, read_hardware, too_large
from lorakit.io.atomic import check_new, write_text, writing
from lorakit.notes import Say, silent
from lorakit.pipeline.local_paths import path_faults
from lorakit.recipe.diagnostics import OVERRIDE
from lorakit.recipe.load import load_recipe_text
from lorakit.recipe.overrides import Overrides, apply_overrides
from lorakit.recipe.sections import Recipe
from lorakit.recipe.yaml_source import YamlFile
from lorakit.tasks.base import Task
from lorakit.tasks.labelling import label_order


@dataclass(frozen=True)
class FirstRecipe:
    """A recipe that was written to ``path``. ``rows`` are those of the training split, None if not
    all of them were read; ``tokens`` are the median and the longest row of a sample, None without
    data, ``is_estimate`` if they were not tokenized. ``reason`` is what the columns say, in words.
    """

    path: Path
    recipe: Recipe
    reason: str
    rows: int | None
    tokens: tuple[int, int] | None
    is_estimate: bool


class RecipeDraft:
    """A recipe for a base model, of which it looks at the configuration and the tokenizer.
    ``overrides`` are keys that are set already, as for ``load_recipe``. ``say`` gets notes.

    Raises ModelError for a path without a model, and RecipeError for ``overrides`` that are not of
    the form ``SECTION.KEY``.
    """

    def __init__(
        self, model: str, *, overrides: Overrides | None = None, say: Say = silent
    ) -> None:
        self._say = say
        self._given = _parsed(overrides)
        self._base = read_base_model(model)
        self._data: Data | None = None
        self._inputs: list[Path] = []
        if self._base.config is None:
            say(f"{model}: not on this machine; its kind and the tokens of a row are estimates")

    def look_at(self, data: str, validation: str | None = None) -> None:
        """Read training rows: a file, a glob or a directory as in ``task.path``; ``validation`` is
        the same for the validation split. A task that has a dataset of its own on the Hub needs
        none. Raises DataError if they cannot be read."""
        self._data = read_data(data, validation)
        self._inputs = [Path(file) for file in (data, validation) if file is not None]
        names = [shown(name)[1:-1] for name in self._data.columns]
        self._say(f"{self._data.described()}, columns {listed(names, 12)}")

    def suggested_task(self) -> str | None:
        """The task that fits the columns; None without data. Raises DataError if none does."""
        return None if self._data is None else self._choose(None).task

    def check_task(self, name: str) -> str:
        """Return ``name``. Raises UserError for an unknown task, and for one that does not fit the
        columns or the model."""
        self._choose(name)
        self._base.check_kind(registry.task(name).kind)
        return name

    def write(
        self,
        output: str | Path,
        *,
        task: str | None = None,
        method: str = "lora",
        hardware: str | None = None,
        overwrite: bool = False,
    ) -> FirstRecipe:
        """Write a recipe that trains ``method`` on ``task`` (default: ``suggested_task``) with
        ``hardware``: ``cpu``, ``gpu``, ``gpu:GIB`` (default: that of this machine). A sample of the
        rows has then been read as the task reads them, and the recipe has been checked.

        Raises UserError if ``output`` exists, unless ``overwrite``, and for whatever does not fit.
        """
        output = Path(output)
        check_new(output, overwrite)
        if output.exists() and any(path.resolve() == output.resolve() for path in self._inputs):
            raise UserError(f"--output {output}: is a file of the data; allowed: another file")
        check_method_name(method)
        if method == "bitfit" and not self._base.has_biases:
            raise UserError("--method bitfit: trains biases, and the model has none; allowed: lora")
        machine = find_hardware() if hardware is None else read_hardware(hardware)
        choice = self._choose(task)
        self._base.check_kind(registry.task(choice.task).kind)
        facts = Facts(self._base, self._data, choice, method, machine, output, self._given)
        recipe = self._checked(recipe_text(facts), output)
        if self._data is not None:
            facts = self._measured(facts, recipe)
        text = recipe_text(facts)
        recipe = self._checked(text, output)
        if note := too_large(method, self._base.parameters, machine):
            self._say(note)
        with writing(output):
            write_text(output, text)
        rows = None if self._data is None else self._data.rows
        lengths = facts.lengths
        if lengths is None:
            return FirstRecipe(output, recipe, "data of the task", rows, None, is_estimate=False)
        tokens = (lengths.quantile(0.5), lengths.tokens[-1])
        return FirstRecipe(output, recipe, choice.reason, rows, tokens, lengths.is_estimate)

    def _choose(self, wanted: str | None) -> Choice:
        if wanted is not None:
            _check_name("--task", wanted, registry.tasks(), registry.task)
        if self._data is not None:
            given = Given(
                self._base.kinds, self._base.has_chat_template, self._given.get("task", {})
            )
            choice = choose_task(self._data.columns, given, self._data.train.source, wanted)
            return self._with_tags(choice)
        if wanted is None:
            raise UserError("--data is missing; allowed without it: --task glue/NAME")
        return Choice(wanted)

    def _with_tags(self, choice: Choice) -> Choice:
        """Name tags that are ids, since a file does not name them."""
        if choice.task != "token_classification" or self._data is None:
            return choice
        column = choice.keys.get("tags_column", "tags")
        if self._data.columns[column].kind != "ids" or "labels" in self._given.get("task", {}):
            return choice
        names = sorted(class_names(self._data.train, column), key=label_order)
        self._say(f"task.labels: the tags in {column} are ids; replace them by their names")
        return replace(choice, keys={**choice.keys, "labels": names})

    def _measured(self, facts: Facts, recipe: Recipe) -> Facts:
        """``facts`` with what the rows tell as the task reads them."""
        assert self._data is not None, "there are rows to measure"
        split = self._data.train
        task: Task = registry.task(recipe.task.name)
        task.check_columns(split, recipe.task)
        task, config = task.chosen(recipe.task, split)
        config = task.resolve(config, split)
        new_head = False
        if task.kind == "encoder":
            labels = task.labels(config, split)
            new_head = self._base.needs_new_head(labels, task.problem(config))
        tokenizer = self._base.tokenizer
        if tokenizer is not None:
            from lorakit.models.vocabulary import extend_tokenizer

            extend_tokenizer(tokenizer, recipe.model)
        lengths = measure(task, config, split, tokenizer)
        return replace(facts, lengths=lengths, new_head=new_head)

    def _checked(self, text: str, output: Path) -> Recipe:
        """The recipe, loaded and checked. Raises RecipeError, which names ``--set`` for what it
        set."""
        try:
            return load_recipe_text(text, check=path_faults)
        except RecipeError as error:
            raise RecipeError([*self._located(error.problems, output)]) from None

    def _located(self, problems: Iterable[Problem], output: Path) -> Iterable[Problem]:
        given = {f"{name}.{key}" for name, keys in self._given.items() for key in keys}
        for problem in problems:
            is_set = ".".join(problem.key.split(".")[:2]) in given
            yield replace(problem, file=OVERRIDE if is_set else str(output), line=None)


def init_recipe(
    output: str | Path = "recipe.yaml",
    *,
    model: str,
    data: str | None = None,
    validation: str | None = None,
    task: str | None = None,
    method: str = "lora",
    hardware: str | None = None,
    overrides: Overrides | None = None,
    overwrite: bool = False,
    say: Say = silent,
) -> FirstRecipe:
    """Write a first recipe for ``model`` and ``data`` to ``output``, and return it.

    The arguments are the options of ``lorakit init``; ``overrides`` are those of ``--set``, as for
    ``load_recipe``. Without ``task``, the columns of the data decide. ``say`` receives notes.

    Raises UserError if ``output`` exists, unless ``overwrite``, and for whatever does not fit.
    """
    check_new(Path(output), overwrite)
    draft = RecipeDraft(model, overrides=overrides, say=say)
    if data is not None:
        draft.look_at(data, validation)
    return draft.write(output, task=task, method=method, hardware=hardware, overwrite=overwrite)


def check_method_name(name: str) -> str:
    """Return ``name``. Raises UserError for an unknown method, and a file that defines none."""
    _check_name("--method", name, registry.methods(), registry.method)
    return name


def check_hardware(text: str) -> str:
    """Return ``text``. Raises UserError if ``RecipeDraft.write`` would not take it."""
    read_hardware(text)
    return text


def this_hardware() -> str:
    """The hardware of this machine, as ``RecipeDraft.write`` takes it."""
    return str(find_hardware())


def _check_name(
    option: str, name: str, known: Mapping[str, Any], find: Callable[[str], Any]
) -> None:
    """Raise UserError for a name that is not ``known``, and for a file that defines nothing."""
    try:
        find(name)
    except KeyError:
        message = did_you_mean(f"{option} {name}: unknown", name, known)
        raise UserError(f"{message}; allowed: {', '.join(known)}, ./FILE.py:CLASS") from None


def _parsed(overrides: Overrides | None) -> dict[str, dict[str, Any]]:
    source = YamlFile(OVERRIDE, {})
    if faults := apply_overrides(source, overrides):
        raise RecipeError([fault.locate(source) for fault in faults])
    for name, keys in source.data.items():
        if not isinstance(keys, dict):
            raise UserError(f"{OVERRIDE} {name}: allowed: SECTION.KEY=VALUE")
    return source.data
