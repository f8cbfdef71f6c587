"""The sections of a recipe and their keys, as pydantic models.

Methods and tasks extend ``AdapterSection`` and ``TaskSection`` with their own keys. Two kinds of
values are parsed here for the whole package: the layer ranges of ``adapter.layers`` and the names
of splits.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lorakit.errors import did_you_mean
from lorakit.recipe.data_path import DataPath

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
#: Above the rank of any weight matrix in practice, and small enough that sizes do not overflow.
MAX_RANK = 2**16
Rank = Annotated[int, Field(gt=0, le=MAX_RANK)]
LoraAlpha = Annotated[float, Field(gt=0, le=1e9)] | Annotated[int, Field(gt=0, le=10**9)]
#: Rows of a batch.
DEFAULT_ROWS = 8
#: The range of numpy seeds.
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


#: A list of strings; a single string stands for a list of one.
TextList = Annotated[
    list[Text],
    Field(min_length=1),
    BeforeValidator(
        _as_list, json_schema_input_type=Annotated[list[Text], Field(min_length=1)] | Text
    ),
]


#: The same, where the list may be empty.
_MaybeEmpty = Annotated[
    list[Text], BeforeValidator(_as_list, json_schema_input_type=list[Text] | Text)
]


class Section(BaseModel):
    """Base class of sections: immutable, with strict types and no unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """``model``: the pretrained model and how it is loaded.

    ``new_head`` replaces the classification head of the checkpoint with a newly initialized one.
    ``chat_template`` is the name of a built-in template or a file, and replaces that of the
    tokenizer. ``add_tokens`` are tokens whose rows of the embedding and the output layer are
    trained, and which the tokenizer gets if it lacks them.
    """

    name_or_path: Text
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    base_precision: Literal["fp8", "nf4"] | None = None
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    trust_remote_code: bool = False
    new_head: bool = False
    chat_template: Annotated[Text, BeforeValidator(_as_text)] | None = None
    add_tokens: _MaybeEmpty = []


class AdapterSection(Section):
    """``adapter``: the keys that all methods share.

    ``method`` is the name of a built-in method or a user's ``./FILE.py:CLASS``. ``layers`` are the
    indices of the adapted layers, as a list or as ranges (``"0-5,11"``); null means all.
    ``target_parameters`` are suffixes of parameters that belong to no linear layer, as in PEFT;
    ``target_modules`` is then empty by default.
    ``modules_to_save`` are fully trained and saved with the adapter. ``init_from`` is an adapter
    whose values a new run starts from; keys that are not set are then those of the adapter.

    ``usual_learning_rates`` is no key: the rates that suit a method, that for models of billions of
    parameters first and that for small ones second; None if they are unknown.
    ``learning_rate_note`` says why they are what they are.
    """

    usual_learning_rates: ClassVar[tuple[float, float] | None] = None
    learning_rate_note: ClassVar[str] = ""
    method: Annotated[Text, BeforeValidator(_as_text)] = "lora"
    target_parameters: _MaybeEmpty = []
    target_modules: _MaybeEmpty = ["q", "v"]
    layers: Annotated[list[NonNegativeInt], Field(min_length=1)] | Text | None = None
    modules_to_save: list[Text] = []
    init_from: Annotated[Text, BeforeValidator(_as_text)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _parameters_only(cls, data: Any) -> Any:
        only = isinstance(data, dict) and data.get("target_parameters")
        if only and cls.model_fields["target_modules"].default == ["q", "v"]:
            return {"target_modules": [], **data}
        return data

    @classmethod
    def shown_learning_rates(cls) -> str:
        """``2e-4 to 1e-3``; empty if they are unknown."""
        rates = (f"{rate:.0e}".replace("e-0", "e-") for rate in cls.usual_learning_rates or ())
        return " to ".join(rates)

    @field_validator("target_modules")
    @classmethod
    def _some_target(cls, target_modules: Any, info: ValidationInfo) -> Any:
        if target_modules == [] and info.data.get("target_parameters") == []:
            raise ValueError(
                "must not be empty; allowed: a non-empty list of strings or a non-empty string"
            )
        return target_modules


class TaskSection(Section):
    """``task``: the keys that all tasks share.

    ``name`` is a built-in task or a user's ``./FILE.py:CLASS`` or ``./FILE.yaml``. ``path`` is a
    directory with files named after splits; a file, a glob or a list of files, globs and
    directories (the train split); or a mapping from splits to these. In place of each may be a
    source with keys, ``{path: FILES, weight: W}``, or a data set on the Hub, ``{path: NAME, name:
    CONFIG, split: SPLIT}``. Null reads the task's own data set on the Hub. ``max_length`` is in
    tokens. ``limit_train`` and ``limit_eval`` keep the first N rows.

    With ``streaming``, the train split is read during training, without being loaded or cached as a
    whole, and shuffled in a buffer of ``shuffle_buffer_rows`` rows.

    ``validation_share`` of the train rows are held out for validation, the same ones in each run.

    ``on_bad_row`` applies to train rows that cannot be read or trained on: ``error`` stops the run,
    ``skip`` drops, reports and counts them. Evaluation rows are never dropped.
    """

    name: Text
    path: DataPath = None
    max_length: PositiveInt = 512
    limit_train: PositiveInt | None = None
    limit_eval: PositiveInt | None = None
    validation_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    packing: bool = False
    streaming: bool = False
    shuffle_buffer_rows: Annotated[int, Field(gt=0, le=10**9)] = 10_000
    on_bad_row: Literal["error", "skip"] = "error"


class TrainSection(Section):
    """``train``: the training run.

    Steps are optimizer steps. ``learning_rate`` is the peak of the schedule. Defaults that depend
    on another key: 3 epochs unless ``epochs`` or ``max_steps`` is set; a warmup ratio of 0.06
    unless ``warmup_ratio`` or ``warmup_steps`` is set; a ``per_device_batch_size`` (rows, or bins
    of packed rows) of 8 unless it or ``max_tokens_per_batch`` (tokens, including padding) is set. A
    batch respects both of these limits if both are set. ``per_device_batch_size: auto`` is the
    largest that fits on the GPU, which splits ``rows_per_step`` (over all processes) if it is set.

    ``gradient_checkpointing: true`` keeps only the input of each layer for the backward pass, and
    ``offload`` keeps it in host memory. ``compile: true`` runs each layer through
    ``torch.compile``, ``false`` runs eagerly, and ``auto`` chooses on a GPU what is faster: CUDA
    graphs for small models, compiled layers for large ones in long runs. ``kernels: torch`` uses
    PyTorch's operators only, ``auto`` also lorakit's own on a GPU. ``deterministic: true`` selects
    kernels that compute the same bits in each run.
    """

    output_dir: Text
    epochs: PositiveFloat | None = None
    max_steps: PositiveInt | None = None
    per_device_batch_size: Literal["auto"] | PositiveInt | None = None
    rows_per_step: Annotated[int, Field(gt=0, le=10**6)] | None = None
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
    gradient_checkpointing: Literal["offload"] | bool = False
    compile: Literal["auto"] | bool = "auto"
    kernels: Literal["auto", "torch"] = "auto"
    deterministic: bool = False
    group_by_length: bool = True
    seed: Seed = 42
    log_every_steps: PositiveInt = 10
    eval_every_steps: PositiveInt | None = None
    save_every_steps: PositiveInt | None = None
    save_total_limit: PositiveInt | None = 2
    early_stopping_patience: PositiveInt | None = None
    metric_for_best_model: Text | None = None
    trackers: list[Literal["tensorboard", "wandb"]] = []

    @property
    def units_per_batch(self) -> int | None:
        """``per_device_batch_size``, once a number has replaced ``auto``."""
        assert self.per_device_batch_size != "auto", "it is replaced before batches are planned"
        return self.per_device_batch_size

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """Set defaults here, because a field default would conflict with the pair's other key."""
        if isinstance(data, dict):
            data = dict(data)
            for key, other, default in (
                ("epochs", "max_steps", 3.0),
                ("warmup_ratio", "warmup_steps", 0.06),
                ("per_device_batch_size", "max_tokens_per_batch", DEFAULT_ROWS),
            ):
                if data.get(key) is None and data.get(other) is None:
                    data[key] = default
        return data


class Recipe(Section):
    """A whole recipe; ``adapter`` and ``task`` have the classes of their method and task."""

    model: ModelSection
    adapter: SerializeAsAny[AdapterSection]
    task: SerializeAsAny[TaskSection]
    train: TrainSection

    @property
    def eval_batch_size(self) -> int:
        """Rows per evaluation batch."""
        train, tokens = self.train, self.train.max_tokens_per_batch or 0
        rows = train.per_device_batch_size
        rows = train.per_device_eval_batch_size or (DEFAULT_ROWS if rows == "auto" else rows)
        return rows or max(1, tokens // self.task.max_length)

    def resolved(self) -> dict[str, Any]:
        """The recipe with all defaults filled in, as ``recipe.yaml`` records it."""
        return self.model_dump(mode="json")

    def flat(self) -> dict[str, Any]:
        """``resolved`` as one mapping from ``section.key`` to values."""
        sections = self.resolved().items()
        return {f"{name}.{key}": value for name, keys in sections for key, value in keys.items()}


_RANGE = re.compile(r"\s*([0-9]{1,6})\s*(?:-\s*([0-9]{1,6})\s*)?")
MAX_LAYER = 9_999


def parse_layers(text: str) -> tuple[int, ...]:
    """Parse layer ranges: ``"0-2,11"`` gives (0, 1, 2, 11). Indices start at 0, ends are included.

    The result is sorted and unique. Raises ValueError for anything else, reversed ranges included.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} is neither a layer index nor a range")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"range {part.strip()!r} is reversed")
        if last > MAX_LAYER:
            raise ValueError(f"layer index {last} is too large; at most {MAX_LAYER}")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def layer_indices(layers: Iterable[int] | str) -> set[int]:
    """Return the layer indices that a value of ``adapter.layers`` selects."""
    return set(parse_layers(layers) if isinstance(layers, str) else layers)


def format_layers(layers: Iterable[int]) -> str:
    """Format layer indices as ranges for ``parse_layers``: ``"0-2,7"``."""
    found: list[list[int]] = []
    for layer in sorted(set(layers)):
        if found and layer == found[-1][-1] + 1:
            found[-1] = [found[-1][0], layer]
        else:
            found.append([layer])
    return ",".join("-".join(map(str, span)) for span in found)


#: Split -> the names it may have in a directory or a mapping, its own name first.
SPLIT_ALIASES = {
    "train": ("train",),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test",),
    "validation_matched": ("validation_matched",),
    "validation_mismatched": ("validation_mismatched",),
}
SPLIT_NAMES = tuple(name for names in SPLIT_ALIASES.values() for name in names)


def split_name_errors(given: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield an error, as message and what is allowed, for each unknown name and for each split that
    several of the ``given`` names refer to."""
    given = list(given)
    for name in given:
        if name not in SPLIT_NAMES:
            message = did_you_mean(f"unknown split {name!r}", name, SPLIT_NAMES)
            yield message, ", ".join(SPLIT_NAMES)
    for split, names in SPLIT_ALIASES.items():
        found = [name for name in given if name in names]
        if len(found) > 1:
            yield f"{' and '.join(found)} both name split {split!r}", "one of them"
