"""The recipe's types: one section a class, every key of the contract, nothing that loads torch.

Methods and tasks extend ``AdapterSection`` and ``TaskSection`` in their own files.

``layers``: which of the model's layers are adapted.

What a split may be called in a directory or a mapping.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    model_validator,
)

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
#: Above any matrix's rank that a model has, and small enough for sizes to be computed.
MAX_RANK = 2**16
Rank = Annotated[int, Field(gt=0, le=MAX_RANK)]
LoraAlpha = Annotated[float, Field(gt=0, le=1e9)] | Annotated[int, Field(gt=0, le=10**9)]
#: What numpy takes as a seed.
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


#: A list, or one text in place of a list of one.
TextList = Annotated[
    list[Text],
    Field(min_length=1),
    BeforeValidator(
        _as_list, json_schema_input_type=Annotated[list[Text], Field(min_length=1)] | Text
    ),
]


#: A file, a glob, or a list of these.
Files = Text | Annotated[list[Text], Field(min_length=1)]
_DataPath = Files | Annotated[dict[str, Files], Field(min_length=1)] | None


def _without_weights(value: Any) -> Any:
    """Raises ValueError for a mixture, ``{path: FILE, weight: N}``, which is not supported."""
    parts = value if isinstance(value, list) else [value]
    inner = [v for part in parts if isinstance(part, dict) for v in part.values()]
    lists = [item for v in inner if isinstance(v, list) for item in v]
    if any(isinstance(part, dict) and "weight" in part for part in [*parts, *inner, *lists]):
        raise ValueError("weights are not supported: allowed are files and globs without them")
    return value


#: A directory, files (the train split), or files by split.
DataPath = Annotated[_DataPath, BeforeValidator(_without_weights, json_schema_input_type=_DataPath)]


class Section(BaseModel):
    """A part of the recipe: strict types, unknown keys refused, values never change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """``model``: which pretrained weights, and how they are held.

    ``new_head`` replaces the classification head that the base brings by a new one.
    """

    name_or_path: Text
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    base_precision: None = None
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    trust_remote_code: bool = False
    new_head: bool = False


class AdapterSection(Section):
    """``adapter``: what every method has; a method's own keys stand in its file."""

    method: Text = "lora"
    target_modules: TextList = ["q", "v"]
    layers: Annotated[list[NonNegativeInt], Field(min_length=1)] | Text | None = None
    modules_to_save: list[Text] = []


class TaskSection(Section):
    """``task``: what every task has; a task's own keys stand in its file.

    ``path`` is a directory whose files are named by split, or a file, a glob or a list of these
    (the train split), or a mapping of splits to these; null reads the Hub's data set.
    ``max_length`` is in tokens; ``limit_train`` and ``limit_eval`` keep the first N rows. With
    ``streaming`` the train split is read while it is trained on, neither held nor written, and
    shuffled in a buffer of ``shuffle_buffer_rows``.

    ``on_bad_row`` is for the train split: ``error`` ends the run at a row that cannot be read or
    trained on, ``skip`` leaves it out, named and counted. Rows that a model is measured on are
    never left out.
    """

    name: Text
    path: DataPath = None
    max_length: PositiveInt = 512
    limit_train: PositiveInt | None = None
    limit_eval: PositiveInt | None = None
    packing: bool = False
    streaming: bool = False
    shuffle_buffer_rows: PositiveInt = 10_000
    on_bad_row: Literal["error", "skip"] = "error"


class TrainSection(Section):
    """``train``: the run. Steps are optimizer steps; ``learning_rate`` is the peak.

    Without ``epochs`` and ``max_steps`` there are 3 epochs; without ``warmup_ratio`` and
    ``warmup_steps`` the ratio is 0.06; without ``per_device_batch_size`` (rows, or bins where rows
    are packed) and ``max_tokens_per_batch`` (tokens, padding included) the first is 8. Both
    together bound a batch each.
    """

    output_dir: Text
    epochs: PositiveFloat | None = None
    max_steps: PositiveInt | None = None
    per_device_batch_size: PositiveInt | None = None
    max_tokens_per_batch: PositiveInt | None = None
    per_device_eval_batch_size: PositiveInt | None = None
    gradient_accumulation_steps: PositiveInt = 1
    learning_rate: PositiveFloat = 2e-4
    lr_scheduler: Literal[
        "constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"
    ] = "linear"
    warmup_ratio: Probability | None = None
    warmup_steps: NonNegativeInt | None = None
    weight_decay: NonNegativeFloat = 0.0
    label_smoothing: Probability = 0.0
    max_grad_norm: PositiveFloat | None = 1.0
    optimizer: Literal["adamw", "adamw_8bit", "sgd"] = "adamw"
    adam_beta1: Probability = 0.9
    adam_beta2: Probability = 0.999
    adam_epsilon: PositiveFloat = 1e-8
    gradient_checkpointing: bool = False
    compile: Literal["auto"] | bool = "auto"
    group_by_length: bool = True
    seed: Seed = 42
    log_every_steps: PositiveInt = 10
    eval_every_steps: PositiveInt | None = None
    save_every_steps: PositiveInt | None = None
    save_total_limit: PositiveInt | None = 2
    early_stopping_patience: PositiveInt | None = None
    metric_for_best_model: Text | None = None
    trackers: list[Literal["tensorboard", "wandb"]] = []

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """Here and not as defaults: a default would contradict the other key of its pair."""
        if isinstance(data, dict):
            data = dict(data)
            for key, other, default in (
                ("epochs", "max_steps", 3.0),
                ("warmup_ratio", "warmup_steps", 0.06),
                ("per_device_batch_size", "max_tokens_per_batch", 8),
            ):
                if data.get(key) is None and data.get(other) is None:
                    data[key] = default
        return data


class Recipe(Section):
    """A whole run. ``adapter`` and ``task`` are of the class that their method and task declare."""

    model: ModelSection
    adapter: SerializeAsAny[AdapterSection]
    task: SerializeAsAny[TaskSection]
    train: TrainSection

    @property
    def eval_batch_size(self) -> int:
        """Rows of a batch in an evaluation."""
        train, tokens = self.train, self.train.max_tokens_per_batch or 0
        rows = train.per_device_eval_batch_size or train.per_device_batch_size
        return rows or max(1, tokens // self.task.max_length)

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default written out: what ``recipe.yaml`` holds."""
        return self.model_dump(mode="json")


_RANGE = re.compile(r"\s*([0-9]{1,6})\s*(?:-\s*([0-9]{1,6})\s*)?")
MAX_LAYER = 9_999


def parse_layers(text: str) -> tuple[int, ...]:
    """``"0-5,11"`` -> (0, 1, 2, 3, 4, 5, 11): indices from 0, a range includes both its ends.

    Sorted, each once. Raises ValueError for anything else, a range that runs backwards included.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} is neither a layer nor a range of layers")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"the range {part.strip()!r} runs backwards")
        if last > MAX_LAYER:
            raise ValueError(f"layer {last} is beyond any model; at most {MAX_LAYER}")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def layer_indices(layers: Iterable[int] | str) -> set[int]:
    """The layers that a recipe's ``layers`` chooses, a list or a text for ``parse_layers``."""
    return set(parse_layers(layers) if isinstance(layers, str) else layers)


def format_layers(layers: Iterable[int]) -> str:
    """(0, 1, 2, 7) -> ``"0-2,7"``, which ``parse_layers`` reads."""
    found: list[list[int]] = []
    for layer in sorted(set(layers)):
        if found and layer == found[-1][-1] + 1:
            found[-1] = [found[-1][0], layer]
        else:
            found.append([layer])
    return ",".join("-".join(map(str, span)) for span in found)


_VALIDATION = ("validation", "valid", "dev", "val")
#: By its own name, which is the first.
ALIASES = {
    "train": ("train",),
    "validation": _VALIDATION,
    "test": ("test",),
    "validation_matched": ("validation_matched",),
    "validation_mismatched": ("validation_mismatched",),
}
KNOWN = tuple(name for names in ALIASES.values() for name in names)


def named_twice(given: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Each split that several of the names ``given`` stand for, and these."""
    given = list(given)
    for split, names in ALIASES.items():
        found = [name for name in given if name in names]
        if len(found) > 1:
            yield split, found
