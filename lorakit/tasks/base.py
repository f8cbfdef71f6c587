"""What a task is: rows -> examples -> metrics. It knows nothing of the model.

A task file subclasses ``Task`` and exports one instance as ``TASK``. It imports heavy libraries
inside its functions only.

``exact_match``: the share of predictions that are the reference.

Generated texts against the texts of the rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from lorakit.data.examples import Example
from lorakit.data.sources import Split, load_split
from lorakit.errors import DataError, shown
from lorakit.recipe.sections import NonNegativeFloat, NonNegativeInt, PositiveInt, TaskSection

Row = Mapping[str, Any]
Prediction = Any  # a class index, a float, or generated text

#: The metrics of which less is better; of all others more is.
LOWER_IS_BETTER = frozenset({"loss", "perplexity"})


class GenerationSection(TaskSection):
    """``task`` for what is scored on generated text.

    ``max_new_tokens`` ends a generation. ``num_beams`` above 1 searches with beams, ranked by the
    sum of log probabilities / length ** ``length_penalty``; no ``no_repeat_ngram_size`` tokens
    occur twice in a row's text (0 = they may). ``temperature`` above 0 draws tokens, among the
    likeliest whose probabilities add up to ``top_p``. ``generation_batch_size`` is in rows; null
    chooses it. ``eval_generate``: ``end`` = evaluations during training take the loss only, the
    final one and ``eval`` generate; ``always`` = each one generates; ``never`` = none.
    """

    max_new_tokens: PositiveInt = 128
    num_beams: PositiveInt = 1
    length_penalty: Annotated[float, Field(ge=-10, le=10)] = 1.0
    no_repeat_ngram_size: NonNegativeInt = 0
    temperature: NonNegativeFloat = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    generation_batch_size: PositiveInt | None = None
    eval_generate: Literal["never", "end", "always"] = "end"

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> GenerationSection:
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError("num_beams above 1 and temperature above 0 exclude each other")
        if self._given("length_penalty") and self.num_beams == 1:
            raise ValueError("length_penalty: only with num_beams above 1, which ranks by it")
        if self._given("top_p") and self.temperature == 0:
            raise ValueError("top_p: only with temperature above 0; else nothing is drawn")
        return self

    def _given(self, key: str) -> bool:
        """Whether the key has a value that changes a search: not 1 and not the default."""
        return getattr(self, key) not in (1.0, type(self).model_fields[key].default)


class Task(ABC):
    """One family of tasks. ``config`` is always an instance of the task's own ``Config``.

    ``names`` and ``summary`` are what ``lorakit tasks`` lists; a task of a user's own file is
    named by its file and needs neither.
    """

    names: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = ""
    Config: ClassVar[type[TaskSection]]
    kind: ClassVar[Literal["causal", "encoder"]]
    #: A hash of the file that the task comes from; empty for lorakit's own.
    digest: bytes = b""

    def hub_source(self, config: Any) -> tuple[str, str | None] | None:
        """Hub data set and its configuration, read when ``config.path`` is null."""
        return None

    def eval_split(self, config: Any) -> str:
        """The split that training evaluates on and ``eval`` takes by default."""
        return "validation"

    def read_file(self, file: Path) -> Sequence[Row] | None:
        """Rows of a file in a format of the task's own; None: in one that all tasks read."""
        return None

    def load(self, config: Any, split: str) -> Split | None:
        """The split's rows with ``limit_train`` or ``limit_eval`` applied; None if there is none.

        Raises DataError for a missing file, an empty split or a missing column.
        """
        limit = config.limit_train if split == "train" else config.limit_eval
        found = load_split(
            config.path,
            split,
            hub=self.hub_source(config),
            read_file=self.read_file,
            limit=limit,
            skip_bad=split == "train" and config.on_bad_row == "skip",
        )
        if found is not None:
            self.check_columns(found, config)
        return found

    def check_columns(self, split: Split, config: Any) -> None:
        """Raise DataError if the rows lack what the task reads."""
        split.require(self.columns(config))

    def check_requirements(self, config: Any) -> None:  # noqa: B027 (most tasks need nothing)
        """Raise UserError, before anything is loaded, if the metrics need what is not installed."""

    def chosen(self, config: Any, split: Split) -> tuple[Task, Any]:
        """The task that reads ``split`` and its config, where this one leaves that to the rows."""
        return self, config

    def notes(self, config: Any, split: Split) -> list[str]:
        """What was recognised in the rows of ``split``, to be said once."""
        return []

    def read_columns(self, config: Any, columns: Sequence[str]) -> Collection[str] | None:
        """Those that the task reads of rows with ``columns``, or that its data is known to have
        beside them. The others are named where data is loaded, so that no column is dropped
        without a word; None, for a task whose code alone knows, names nothing."""
        return None

    def template_columns(self, config: Any) -> tuple[str, ...]:
        """Columns that stand in a template, where a row that lacks one has an empty text."""
        return ()

    def unread_keys(self, row: Row, config: Any) -> Iterable[str]:
        """Keys inside the columns of ``row`` that the task does not read, as ``COLUMN[].KEY``; must
        not raise, whatever the row holds."""
        return ()

    def has_left_turns(self, row: Row, config: Any) -> bool:
        """Whether turns of a chat are left out because nothing trained follows them; must not
        raise, whatever the row holds."""
        return False

    def resolve(self, config: Any, train: Split | None) -> Any:
        """``config`` with what is learnt from the train split written out (class names); called
        once, before ``example``. Raises DataError if it cannot be learnt."""
        return config

    def reads_labels(self, config: Any, split: Split) -> bool:
        """Whether each label of ``split`` is one of those that ``resolve`` found."""
        return True

    def label_names(self, config: Any, splits: Sequence[Split]) -> list[str] | None:
        """The class names that the rows of ``splits`` have; None for a task that does not take its
        class names from its rows, and for rows with other values."""
        return None

    def labels(self, config: Any, train: Split | None) -> list[str] | None:
        """Class names by index for classification; None for regression and causal tasks."""
        return None

    @abstractmethod
    def columns(self, config: Any) -> tuple[str, ...]:
        """The columns a row must have."""

    @abstractmethod
    def example(self, row: Row, config: Any) -> Example:
        """One row as an example to train on. Raises DataError, without file and row."""

    def prompt(self, row: Row, config: Any) -> Example:
        """One row as what the model continues; only for tasks that generate."""
        raise DataError(f"task {config.name} does not generate")

    def stop_texts(self, config: Any) -> tuple[str, ...]:
        """Texts before which a generation ends, as EOS ends it: what follows is not scored."""
        return ()

    def main_metric(self, config: Any) -> str:
        """The metric of which a paper speaks: the first one to report."""
        return "loss"

    def generates(self, config: Any, final: bool = True) -> bool:
        """Whether an evaluation generates text (else: a label, or the loss alone); ``final`` is
        false for the evaluations during training."""
        if not isinstance(config, GenerationSection):
            return False
        return config.eval_generate == "always" or (final and config.eval_generate == "end")

    def best_metric(self, config: Any) -> str:
        """What selects the best model if the recipe names nothing: the main metric, or the loss
        where evaluations during training do not measure it."""
        if isinstance(config, GenerationSection) and not self.generates(config, final=False):
            return "loss"
        return self.main_metric(config)

    def prediction_counts(self, split: Split, config: Any) -> tuple[int, ...]:
        """How many predictions ``metrics`` takes: one a row, or another number, with its meaning
        the task's own."""
        return (len(split),)

    def metrics(
        self, predictions: Sequence[Prediction], split: Split, config: Any
    ) -> dict[str, float]:
        """Scores by the contract's names, 0-1, of predictions in the split's order."""
        return {}


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of the pairs that are equal text once white space at both ends is stripped; 0-1.

    ``references`` holds one text a prediction, and there is at least one.
    """
    assert len(predictions) == len(references) > 0
    pairs = zip(predictions, references, strict=True)
    return sum(a.strip() == b.strip() for a, b in pairs) / len(predictions)


def exact_matches(
    predictions: Sequence[Prediction], split: Split, reference: Callable[[Row], str]
) -> dict[str, float]:
    """``exact_match`` with ``reference`` of each row. Raises DataError as ``paired`` does."""
    return {"exact_match": exact_match(*paired(predictions, split, reference))}


def paired(
    predictions: Sequence[Prediction], split: Split, reference: Callable[[Row], str]
) -> tuple[list[str], list[str]]:
    """Predictions and references. Raises DataError for a wrong count, for what is no text, and with
    file and row for a row that has no reference."""
    if len(predictions) != len(split):
        raise DataError(f"{split.source}: {len(predictions)} predictions for {len(split)} rows")
    for number, prediction in enumerate(predictions, 1):
        if not isinstance(prediction, str):
            raise DataError(f"prediction {number}: {shown(prediction)}; allowed: text")
    references: list[str] = []
    try:
        for row in split.rows:
            references.append(reference(row))  # noqa: PERF401 (an error needs the row)
    except DataError as error:
        raise DataError(f"{split.locate(len(references))}: {error}") from error
    return list(predictions), references
