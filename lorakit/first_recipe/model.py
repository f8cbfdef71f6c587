"""What is known of the base model before its weights are loaded."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import LorakitError
from lorakit.recipe.sections import ModelSection

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from lorakit.models.kinds import Kind

#: The number of parameters in a model's name, such as 8B, 135M and 8x7B.
_SIZE = re.compile(r"(?<![a-z0-9])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", re.IGNORECASE)


@dataclass(frozen=True)
class BaseModel:
    """A base model. ``config``, ``tokenizer`` and ``positions``, the most tokens of a row, are None
    if the model is not on this machine, ``positions`` also if there is no limit; ``parameters`` is
    None if its name does not tell it either. ``kinds`` are those of the tasks that it can be
    trained on; ``has_chat_template`` is that of its own tokenizer, None if it is not known."""

    name: str
    config: PreTrainedConfig | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    parameters: int | None = None
    positions: int | None = None
    kinds: tuple[str, ...] = ("causal", "encoder")
    has_chat_template: bool | None = None
    has_biases: bool = True

    def check_kind(self, kind: Kind) -> None:
        """Raise ModelError if the model cannot be trained on tasks of ``kind``."""
        from lorakit.models.kinds import check_kind

        if self.config is not None:
            check_kind(self.config, kind, self.name)

    def needs_new_head(self, labels: list[str] | None, problem: Any) -> bool:
        """Whether the model has a classification head for other labels than ``labels``."""
        from lorakit.models.heads import declares_head, plan_head

        if self.config is None or not declares_head(self.config):
            return False
        try:
            plan_head(labels, self.config, False, self.name, problem)
        except LorakitError:
            return True
        return False


def read_base_model(name: str) -> BaseModel:
    """Read configuration and tokenizer of a model in a directory or in the cache of the Hub, which
    is not reached. Raises ModelError if ``name`` is a path without a model."""
    from lorakit.models.hub import check_location, load_config, load_tokenizer
    from lorakit.models.kinds import task_type_of
    from lorakit.models.load import empty_model
    from lorakit.models.window import position_limit

    check_location(name)
    folder = Path(name) if Path(name).is_dir() else _cached_folder(name)
    if folder is None:
        return BaseModel(name, parameters=parameters_in(name))
    config = load_config(ModelSection(name_or_path=str(folder)))
    tokenizer, _ = load_tokenizer(str(folder), {})
    kinds = _kinds(config, name)
    model = empty_model(config, task_type_of(kinds[0]), trust_remote_code=False)
    count = sum(parameter.numel() for parameter in model.parameters())
    return BaseModel(
        name=name,
        config=config,
        tokenizer=tokenizer,
        parameters=count,
        positions=position_limit(model),
        kinds=kinds,
        has_chat_template=bool(tokenizer.chat_template),
        has_biases=any(parameter.endswith("bias") for parameter, _ in model.named_parameters()),
    )


def _cached_folder(name: str) -> Path | None:
    """Where the cache of the Hub keeps the files of a model; None without those of its
    configuration and tokenizer."""
    from huggingface_hub import try_to_load_from_cache

    with suppress(ValueError):  # not the form of a Hub id
        found = [try_to_load_from_cache(name, file) for file in ("config.json", "tokenizer.json")]
        if all(isinstance(file, str) for file in found):
            return Path(str(found[0])).parent
    return None


def _kinds(config: PreTrainedConfig, name: str) -> tuple[Kind, ...]:
    """The kinds of tasks that a model can be trained on. Raises ModelError if there is none."""
    from lorakit.models.kinds import check_kind

    found: list[Kind] = []
    kinds: tuple[Kind, ...] = ("causal", "encoder")
    for kind in kinds:
        with suppress(LorakitError):
            check_kind(config, kind, name)
            found.append(kind)
    if not found:
        check_kind(config, "causal", name)
    return tuple(found)


def parameters_in(name: str) -> int | None:
    """The number of parameters that a model's name tells: 8,000,000,000 for ``Qwen3-8B``."""
    match = _SIZE.search(name.rpartition("/")[2])
    if match is None:
        return None
    experts, size, unit = match.groups()
    return round(int(experts or 1) * float(size) * (1e9 if unit in "bB" else 1e6))
