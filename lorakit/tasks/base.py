"""The interface of a task: it turns rows into examples and predictions into scores.

A task does not depend on the model. Its module subclasses ``Task``, exports one instance as
``TASK`` and imports heavy libraries only inside functions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, ValidationInfo, field_validator

from lorakit.data.examples import Example, Problem
from lorakit.data.sources import Split, load_split
from lorakit.errors import BadPrediction, DataError, counted, shown
from lorakit.recipe.sections import NonNegativeFloat, NonNegativeInt, PositiveInt, TaskSection

Row = Mapping[str, Any]
Prediction = Any  # a class index, a float, or generated text
_Value = TypeVar("_Value")

#: The metrics for which lower is better; for all others, higher is better.
LOWER_IS_BETTER = frozenset({"loss", "perplexity"})


def exclusive(first: str, second: str) -> ValueError:
    """Return the error for two keys of a ``Config`` that are both set."""
    return ValueError(f"{first} and {second} are mutually exclusive; allowed: one of them")


class GenerationSection(TaskSection):
    """The ``task`` section of a task that is scored on generated text."""

    max_new_tokens: PositiveInt = 128
    """The maximum length of an answer in tokens. The default shrinks to leave room for the
    prompt."""
    num_beams: Annotated[int, Field(ge=1, le=1000)] = 1
    """The number of beams; 1 decodes without beam search."""
    length_penalty: Annotated[float, Field(ge=-10, le=10)] = 1.0
    """Beams are ranked by log probability / length ** length_penalty."""
    no_repeat_ngram_size: NonNegativeInt = 0
    """No sequence of this many tokens occurs twice in an answer; 0 allows repetition."""
    temperature: NonNegativeFloat = 0.0
    """Sample with this temperature; 0 decodes greedily."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most likely tokens whose probabilities add up to this."""
    generation_batch_size: PositiveInt | None = None
    """Rows per batch of generation; null chooses by the available memory."""
    eval_generate: Literal["never", "end", "always"] = "end"
    """Which evaluations generate and score text: never, end (the final one and `lorakit eval`) or
    always. The others compute only the loss."""

    @field_validator("temperature")
    @classmethod
    def _no_beams(cls, temperature: float, info: ValidationInfo) -> float:
        beams = info.data.get("num_beams", 1)
        if temperature > 0 and beams > 1:
            raise ValueError(f"is for sampling, but task.num_beams is {beams}; allowed: 0")
        return temperature

    @field_validator("length_penalty")
    @classmethod
    def _with_beams(cls, length_penalty: float, info: ValidationInfo) -> float:
        default = cls.model_fields["length_penalty"].default
        if length_penalty not in (1.0, default) and info.data.get("num_beams") == 1:
            raise ValueError("has no effect with task.num_beams = 1; allowed: 1.0")
        return length_penalty

    @field_validator("top_p")
    @classmethod
    def _with_temperature(cls, top_p: float, info: ValidationInfo) -> float:
        if top_p != 1.0 and info.data.get("temperature") == 0:
            raise ValueError("has no effect with task.temperature = 0; allowed: 1.0")
        return top_p


class Task(ABC):
    """A family of tasks. ``config`` is always an instance of the task's ``Config``.

    ``lorakit tasks`` lists ``names``, ``summary`` and ``source``, the paper as ``Author YEAR``; a
    user task is named by its file and needs none of them.
    """

    names: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""
    Config: ClassVar[type[TaskSection]]
    kind: ClassVar[Literal["causal", "encoder"]]
    #: A hash of the file that defines a user task; empty for built-in tasks.
    digest: bytes = b""

    def summary_of(self, name: str) -> str:
        """The summary of the task called ``name``, which is one of ``names``."""
        return self.summary

    def source_of(self, name: str) -> str:
        """The source of the task called ``name``."""
        return self.source

    def needed_columns(self, name: str) -> tuple[tuple[str, ...], ...]:
        """The columns that rows of the task called ``name`` have by default, as alternatives."""
        return (self.columns(self.Config(name=name)),)

    def hub_source(self, config: Any) -> tuple[str, str | None] | None:
        """The Hub dataset and its configuration to read when ``config.path`` is null: those that
        the keys ``dataset_name`` and ``dataset_config_name`` name, if the task has them."""
        name = getattr(config, "dataset_name", None)
        return (name, getattr(config, "dataset_config_name", None)) if name else None

    def eval_split(self, config: Any) -> str:
        """The split that training evaluates on, and the default of ``eval``."""
        return "validation"

    def read_file(self, file: Path) -> Sequence[Row] | None:
        """Read a file in a task-specific format; None means one of the common formats."""
        return None

    def load(self, config: Any, split: str) -> Split | None:
        """Load the split, limited by ``limit_train`` or ``limit_eval``; None if there is none.

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

    @abstractmethod
    def columns(self, config: Any) -> tuple[str, ...]:
        """The columns that a row must have."""

    def text_columns(self, config: Any) -> tuple[str, ...]:
        """An encoder's columns of a text, or of a pair of texts, in which ``lorakit predict`` looks
        for them first; empty if a row's texts are not whole columns."""
        return ()

    def check_columns(self, split: Split, config: Any) -> None:
        """Raise DataError if a column that the task needs is missing; its message starts with the
        key that names the column, if there is one."""
        columns = self.columns(config)
        keys = {name: key for name in columns if (key := self.column_key(config, name))}
        causes = {name: f"task.{key} = {shown(getattr(config, key))}" for name, key in keys.items()}
        split.require(columns, causes)

    def column_key(self, config: Any, column: str) -> str | None:
        """The key of ``config`` that names ``column``: ``text_column``, for example. By default
        ``X_column`` names the column in its value, or ``X`` if its value is null."""
        keys = [key for key in type(config).model_fields if key.endswith("_column")]
        named = {getattr(config, key) or key.removesuffix("_column"): key for key in keys}
        return named.get(column)

    def read_columns(self, config: Any, columns: Sequence[str]) -> Collection[str] | None:
        """Those of ``columns`` that the task reads, or that are known to be unused in its data.

        All others are reported as unused when the data is loaded. None, for a task that cannot tell
        which columns its code reads, reports nothing.
        """
        return None

    def template_columns(self, config: Any) -> tuple[str, ...]:
        """Columns that a template inserts; they are empty in its text if a row lacks them."""
        return ()

    def unused_keys(self, row: Row, config: Any) -> Iterable[str]:
        """Keys inside the columns of ``row`` that the task does not read, as ``COLUMN[].KEY``. This
        method must not raise for any row."""
        return ()

    def drops_messages(self, row: Row, config: Any) -> bool:
        """Whether messages of a chat are dropped because no trained one follows them. This method
        must not raise for any row."""
        return False

    def notes(self, config: Any, split: Split) -> list[str]:
        """Messages for the user about what was recognized in the rows of ``split``."""
        return []

    def chosen(self, config: Any, split: Split) -> tuple[Task, Any]:
        """The task that reads ``split``, and its config: this task, unless the rows decide."""
        return self, config

    def check_requirements(self, config: Any) -> None:  # noqa: B027 (most tasks need nothing)
        """Raise UserError, before anything is loaded, if a metric needs a missing library."""

    def resolve(self, config: Any, train: Split | None) -> Any:
        """``config`` completed from the training split (class names). Called once, before
        ``example``. Raises DataError if the split does not determine a value."""
        return config

    def accepts_labels(self, config: Any, split: Split) -> bool:
        """Whether each label of ``split`` is one of those that ``resolve`` found."""
        return True

    def labels_of_rows(self, config: Any, splits: Sequence[Split]) -> list[str] | None:
        """The class names in the rows of ``splits``; None if a value is not a class name, or if the
        task does not take class names from rows."""
        return None

    def labels(self, config: Any, train: Split | None) -> list[str] | None:
        """Class names by index for classification; None for regression and causal tasks."""
        return None

    def problem(self, config: Any) -> Problem | None:
        """What the labels of an encoder's rows are; None for causal tasks. By default a row has one
        class, or a number if there are no class names."""
        if self.kind == "causal":
            return None
        return "regression" if self.labels(config, None) is None else "single_label_classification"

    def strata(self, config: Any, split: Split) -> Sequence[Hashable] | None:
        """A group key for each row, such as its class; ``validation_share`` holds out the same
        share of each group. None if there are no groups."""
        return None

    @abstractmethod
    def example(self, row: Row, config: Any) -> Example:
        """The training example of a row. Raises DataError, without naming file and row."""

    def prompt(self, row: Row, config: Any) -> Example:
        """The prompt of a row, which the model continues; only for tasks that generate."""
        raise DataError(f"task {config.name} does not generate")

    def stop_texts(self, config: Any) -> tuple[str, ...]:
        """Stop sequences: a generation ends before any of them."""
        return ()

    def generates(self, config: Any, final: bool = True) -> bool:
        """Whether an evaluation generates text (else it predicts a label, or computes the loss
        alone); ``final`` is false for evaluations during training."""
        if not isinstance(config, GenerationSection):
            return False
        return config.eval_generate == "always" or (final and config.eval_generate == "end")

    def main_metric(self, config: Any) -> str:
        """The metric to report first."""
        return "loss"

    def best_metric(self, config: Any, final: bool = False) -> str:
        """The metric that selects the best model by default: the main metric, or the loss if
        evaluations during training, or with ``final`` the last one, do not compute it."""
        if isinstance(config, GenerationSection) and not self.generates(config, final):
            return "loss"
        return self.main_metric(config)

    def metric_names(self, config: Any) -> tuple[str, ...] | None:
        """The names of the scores of ``metrics``; None if they are known only from its result."""
        return None

    def prediction_counts(self, split: Split, config: Any) -> tuple[int, ...]:
        """The numbers of predictions that ``metrics`` accepts: one per row, and any other number
        whose meaning the task defines."""
        return (len(split),)

    def metrics(
        self, predictions: Sequence[Prediction], split: Split, config: Any
    ) -> dict[str, float]:
        """Scores, by metric name, of predictions in the split's order; 0 to 1 for most metrics."""
        return {}


def map_rows(split: Split, values: Iterable[Any], read: Callable[[Any], _Value]) -> list[_Value]:
    """Apply ``read`` to ``values``, one per row; file and row are added to a DataError."""
    found: list[_Value] = []
    try:
        for value in values:
            found.append(read(value))  # noqa: PERF401 (an error needs the row's number)
    except DataError as error:
        raise DataError(f"{split.locate(len(found))}: {error}") from error
    return found


def check_count(predictions: Sequence[Prediction], split: Split) -> None:
    """Raise DataError unless there is one prediction per row."""
    if len(predictions) != len(split):
        raise DataError(
            f"{split.source}: {counted(len(predictions), 'prediction')} for "
            f"{counted(len(split), 'row')}"
        )


def check_texts(predictions: Sequence[Prediction]) -> None:
    """Raise BadPrediction for one that is not text."""
    for number, prediction in enumerate(predictions, 1):
        if not isinstance(prediction, str):
            raise BadPrediction(number, shown(prediction), "text")


def paired(
    predictions: Sequence[Prediction], split: Split, reference: Callable[[Row], str]
) -> tuple[list[str], list[str]]:
    """Return the predictions and the ``reference`` of each row. Raises DataError for a wrong number
    of predictions, for one that is not text, and for a row without a reference."""
    check_count(predictions, split)
    check_texts(predictions)
    return list(predictions), map_rows(split, split.rows, reference)


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The fraction of predictions that equal their reference, ignoring whitespace at both
    ends."""
    assert len(predictions) == len(references) > 0
    pairs = zip(predictions, references, strict=True)
    return sum(a.strip() == b.strip() for a, b in pairs) / len(predictions)


def required_text(row: Row, column: str) -> str:
    """The column's text. Raises DataError for anything else."""
    value = row.get(column)
    if not isinstance(value, str):
        raise DataError(f"column {column!r} = {shown(value)}; allowed: text")
    return value


def optional_text(row: Row, column: str) -> str:
    """The column's text; empty if it is missing, null or blank. Raises DataError for anything
    else."""
    if row.get(column) is None:
        return ""
    text = required_text(row, column)
    return text if text.strip() else ""


def is_empty(value: Any) -> bool:
    """Whether the value has no content: null, blank text, an empty list or mapping."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, (list, dict)) and not value)
