"""The sections of a recipe and their keys, as pydantic models.

Methods and tasks extend ``AdapterSection`` and ``TaskSection`` with their own keys. The
docstring under a key is its description in the JSON schema. The names of splits are here, too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lorakit.errors import check_printable, did_you_mean
from lorakit.recipe.data_path import DataPath

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


def _printable(name: str) -> str:
    check_printable(name)
    return name


#: A file or directory that is written.
OutputPath = Annotated[Text, AfterValidator(_printable)]
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
    """``model``: the pretrained model and how it is loaded."""

    name_or_path: Text
    """The pretrained model: a directory, or a Hub id. Weights must be safetensors."""
    revision: str | None = None
    """The commit or tag of a model on the Hub; null is its main branch."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """The number format of the frozen base. The adapter is always float32; float16 needs a GPU."""
    base_precision: Literal["fp8", "nf4"] | None = None
    """How the frozen linear layers are kept during training: fp8 (GPUs from compute capability
    8.9), nf4 (4 bits, QLoRA; needs bitsandbytes), or null for dtype."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """The implementation of attention; auto uses what the model supports."""
    trust_remote_code: bool = False
    """Run the code that the repository of the model contains."""
    new_head: bool = False
    """Replace the classification head of the checkpoint with a newly initialized one."""
    chat_template: Annotated[Text, BeforeValidator(_as_text)] | None = None
    """Replaces the chat template of the tokenizer: a built-in name (alpaca, chatml, gemma, llama-2,
    llama-3, mistral, vicuna, zephyr), or a file with a Jinja template."""
    add_tokens: _MaybeEmpty = []
    """Tokens to train: their rows in the embedding and the output layer are trained, and tokens
    that the tokenizer lacks are added to it."""


class AdapterSection(Section):
    """``adapter``: the keys that all methods share."""

    usual_learning_rates: ClassVar[tuple[float, float] | None] = None
    learning_rate_note: ClassVar[str] = ""
    method: Annotated[Text, BeforeValidator(_as_text)] = "lora"
    """How the model is adapted: a name that `lorakit methods` lists, or a user's
    ./FILE.py:CLASS."""
    target_parameters: _MaybeEmpty = []
    """Suffixes of the names of parameters that belong to no linear layer, such as stacked experts.
    target_modules is then empty by default."""
    target_modules: _MaybeEmpty = ["q", "v"]
    """The modules to adapt: roles (q, k, v, o), attention, experts, all-linear, suffixes of module
    names, or a regular expression after re:."""
    layers: Annotated[list[NonNegativeInt], Field(min_length=1)] | Text | None = None
    """The indices of the adapted layers, as a list or as ranges ("0-5,11"); null is all."""
    modules_to_save: list[Text] = []
    """Modules that are fully trained and saved with the adapter. A classification head
    is always one of them."""
    init_from: Annotated[Text, BeforeValidator(_as_text)] | None = None
    """Start the run from the weights of this adapter (directory or Hub id). Keys that are not set
    are taken from the adapter."""

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
    """``task``: the keys that all tasks share."""

    name: Text
    """The task: a name that `lorakit tasks` lists, or a user's ./FILE.py:CLASS or ./FILE.yaml."""
    path: DataPath = None
    """The data: a directory with files named after splits; a file, a glob or a list of these (the
    training split); {path: NAME, name: CONFIG, split: SPLIT} on the Hub; or a mapping of splits to
    these. Null reads the task's own dataset on the Hub."""
    max_length: PositiveInt = 512
    """The length in tokens to which rows are truncated. The default shrinks to the model's
    window."""
    limit_train: PositiveInt | None = None
    """Use only the first N rows of the training split."""
    limit_eval: PositiveInt | None = None
    """Use only the first N rows of the split that is evaluated."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Hold out this fraction of the training rows for validation; the same rows in every run."""
    packing: bool = False
    """Pack rows into bins of max_length tokens. Rows in a bin do not attend to each other."""
    streaming: bool = False
    """Read the training split during training, without loading it as a whole. Requires
    train.max_steps."""
    shuffle_buffer_rows: Annotated[int, Field(gt=0, le=10**9)] = 10_000
    """The number of rows in the buffer in which a stream is shuffled."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A training row that cannot be read or trained on stops the run (error), or is dropped,
    reported and counted (skip). Evaluation rows are never dropped."""


class TrainSection(Section):
    """``train``: the training run.

    Defaults that depend on another key: 3 epochs unless ``epochs`` or ``max_steps`` is set; a
    warmup ratio of 0.06 unless ``warmup_ratio`` or ``warmup_steps`` is set; a
    ``per_device_batch_size`` of 8 unless it or ``max_tokens_per_batch`` is set.
    """

    output_dir: OutputPath
    """The directory that the run is written to."""
    epochs: PositiveFloat | None = None
    """The number of epochs (passes over the training rows); 3 if max_steps is not set either."""
    max_steps: PositiveInt | None = None
    """The length of the run in optimizer steps, instead of epochs."""
    per_device_batch_size: Literal["auto"] | PositiveInt | None = None
    """Rows (or bins of packed rows) per batch and process; 8 if max_tokens_per_batch is not set
    either. auto: as many as fit into the memory of the GPU."""
    rows_per_step: Annotated[int, Field(gt=0, le=10**6)] | None = None
    """With per_device_batch_size: auto, the rows (or bins) of a step over all processes."""
    max_tokens_per_batch: PositiveInt | None = None
    """Tokens per batch, including padding; bounds the batch alone or together with the number of
    rows."""
    per_device_eval_batch_size: PositiveInt | None = None
    """Rows per batch and process in evaluations; null is that of training."""
    gradient_accumulation_steps: PositiveInt = 1
    """Batches per optimizer step. The loss is the mean over all trained tokens of the step."""
    learning_rate: PositiveFloat = 2e-4
    """The peak of the learning rate."""
    lr_scheduler: Literal[
        "constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"
    ] = "linear"
    """How the learning rate changes after the warmup."""
    warmup_ratio: Probability | None = None
    """The share of the run in which the learning rate rises from 0; 0.06 if warmup_steps is not set
    either."""
    warmup_steps: NonNegativeInt | None = None
    """The number of steps in which the learning rate rises from 0, instead of a share."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of the optimizer."""
    label_smoothing: Probability = 0.0
    """The share of the target probability that is spread over all tokens or classes."""
    max_grad_norm: PositiveFloat | None = 1.0
    """The norm to which gradients are clipped; null does not clip."""
    optimizer: Literal["adamw", "adamw_8bit", "sgd"] = "adamw"
    """The optimizer; adamw_8bit keeps its state in 8 bits and needs bitsandbytes."""
    adam_beta1: Probability = 0.9
    """Decay of Adam's mean of the gradients."""
    adam_beta2: Probability = 0.999
    """Decay of Adam's mean of the squared gradients."""
    adam_epsilon: PositiveFloat = 1e-8
    """Added to the divisor of Adam's update."""
    gradient_checkpointing: Literal["offload"] | bool = False
    """Save memory: keep only the input of each layer for the backward pass, on the device (true) or
    in host memory (offload, GPU only)."""
    compile: Literal["auto"] | bool = "auto"
    """Run each layer through torch.compile (true), or eagerly (false). auto chooses whichever is
    faster on a GPU: CUDA graphs for small batches, compiled layers for large ones in long runs."""
    kernels: Literal["auto", "torch"] = "auto"
    """torch: the operators of PyTorch only. auto: also lorakit's own."""
    deterministic: bool = False
    """Select kernels that give bit-identical results in each run, on one GPU; slower."""
    group_by_length: bool = True
    """Batch rows of similar length, for less padding."""
    seed: Seed = 42
    """The seed of the initialization, the order of rows and dropout."""
    log_every_steps: PositiveInt = 10
    """Steps between the lines of metrics.jsonl, whose loss is the mean of these steps."""
    eval_every_steps: PositiveInt | None = None
    """Steps between evaluations; null evaluates after every epoch."""
    save_every_steps: PositiveInt | None = None
    """Steps between checkpoints; null saves one after every epoch."""
    save_total_limit: PositiveInt | None = 2
    """How many checkpoints are kept; null keeps all."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after this many evaluations without improvement; null never does."""
    metric_for_best_model: Text | None = None
    """The metric that selects the saved adapter; null is the task's main metric."""
    trackers: list[Literal["tensorboard", "wandb"]] = []
    """Where metrics are logged besides metrics.jsonl."""

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
