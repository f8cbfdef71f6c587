"""Loads a base model with one adapter, or with several to switch between: ``lorakit.load``; and any
model with its tokenizer: ``lorakit.load_with_tokenizer``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lorakit.adapters.base_model import (
    DTYPES,
    LABEL_KEYS,
    base_model,
    base_section,
    dtype_name,
    full_config,
    set_pad_token,
)
from lorakit.adapters.peft.locate import is_hub_adapter
from lorakit.adapters.peft.method import run_method_file
from lorakit.adapters.peft.place import load_adapter
from lorakit.adapters.peft.read import AdapterFiles, read_adapter
from lorakit.adapters.peft.schema import CONFIG
from lorakit.adapters.switching import register_adapters
from lorakit.errors import AdapterError
from lorakit.models.heads import declares_head, declares_token_head
from lorakit.models.hub import hub_options, load_config, load_tokenizer
from lorakit.models.load import load_model
from lorakit.notes import Say, to_stderr
from lorakit.recipe.sections import ModelSection

_T = TypeVar("_T")


def load(
    base: str | Path | None,
    adapter: str | Path | Mapping[str, str | Path],
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    trainable: bool = False,
    trust_remote_code: bool = False,
    method: str | PathLike[str] | None = None,
) -> PreTrainedModel:
    """Return a transformers model in evaluation mode with the adapter applied.

    ``base`` is a Hub id or directory; the default is the one that the adapter names. ``dtype`` of
    the base is by default that of training, else that of the checkpoint. With ``trainable`` the
    adapter and fully trained modules require gradients. If ``adapter`` maps names to directories,
    all are loaded and the first is active; ``lorakit.switch(model, name)`` activates another.
    ``method`` is the ``FILE.py:CLASS`` of the user's method that trained the adapter; its code is
    run. Raises ModelError and AdapterError.
    """
    run_method_file(method)
    if isinstance(adapter, Mapping):
        if trainable:
            raise AdapterError("trainable = True: allowed for a single adapter only")
        return _load_named(base, adapter, dtype, device, trust_remote_code)
    files = read_adapter(adapter)
    section = base_section(base, files, trust_remote_code)
    model = _load_files(section, files, dtype_name(dtype, "dtype"), trainable)
    if device is not None:
        model.to(torch.device(device))  # type: ignore[arg-type]
    return model


def load_with_tokenizer(
    base: str | Path | None,
    adapter: str | Path | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    trainable: bool = False,
    trust_remote_code: bool = False,
    method: str | PathLike[str] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return what ``load`` returns, and the tokenizer that the adapter was trained with.

    Without ``adapter``, ``base`` may be an adapter directory, which names its base; a merged model;
    or any other model, which is loaded as the classifier or causal model that it is. The tokenizer
    is the adapter's if it has one, else the base's. Its padding side is the right, and a missing
    pad token is set. Raises ModelError and AdapterError.
    """
    run_method_file(method)
    found = find_model(base, adapter, trust_remote_code=trust_remote_code)
    if trainable and found.files is None:
        raise AdapterError("trainable = True: allowed with an adapter only")
    model, tokenizer = found.load(dtype_name(dtype, "dtype"), trainable)
    if device is not None:
        model.to(torch.device(device))  # type: ignore[arg-type]
    return model, tokenizer


@dataclass(frozen=True)
class FoundModel:
    """A model that is not loaded yet: a base, and the ``files`` of an adapter, None without one."""

    section: ModelSection
    files: AdapterFiles | None

    @property
    def directory(self) -> str:
        """The adapter's directory, else the name of the model; messages start with it."""
        return str(self.files.directory) if self.files else self.section.name_or_path

    def classifies(self) -> bool:
        """Whether it has a classification head. Raises ModelError if there is no such model."""
        if self.files is not None:
            return self.files.classifies
        return declares_head(load_config(self.section))

    def is_token_classifier(self) -> bool:
        """Whether its head is one for tokens. Raises ModelError if there is no such model."""
        if self.files is not None:
            return self.files.is_token_classifier
        return declares_token_head(load_config(self.section))

    def dtype_on(self, device: torch.device, dtype: str | None, say: Say) -> str | None:
        """``dtype``, or that of the adapter's training, or of the checkpoint; float32 in place of
        float16 on a CPU. None if it is unknown."""
        chosen = dtype_name(dtype, "--dtype")
        if chosen is None and self.files is not None:
            chosen = _trained_dtype(self.files)
        if chosen is None:
            stored = load_config(self.section).dtype
            chosen = dtype_name(stored, self.section.name_or_path)
        if chosen == "float16" and device.type == "cpu":
            say("float16 is not supported on the CPU: loading the model in float32")
            return "float32"
        return chosen

    def load(
        self, dtype: str | None, trainable: bool = False, say: Say = to_stderr
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load model and tokenizer, which agree on the pad token. ``say`` receives notes."""
        section, files = self.section, self.files
        if files is not None and (files.directory / "tokenizer.json").is_file():
            tokenizer, notes = load_tokenizer(str(files.directory), {})
        else:
            tokenizer, notes = load_tokenizer(section.name_or_path, hub_options(section))
        for note in notes:
            say(note)
        if files is None:
            model = load_model(section, dtype)
        else:
            model = _load_files(section, files, dtype, trainable)
        model.config.pad_token_id = tokenizer.pad_token_id
        return model, tokenizer


def find_model(
    base: str | Path | None,
    adapter: str | Path | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    say: Say = to_stderr,
) -> FoundModel:
    """Find a model and its adapter. Without ``adapter``, ``base`` may be an adapter directory.

    ``revision`` is that of the base. Raises AdapterError if neither is given, and for an adapter
    that cannot be read; notes go to ``say``.
    """
    if adapter is None and base is not None and is_adapter(base):
        base, adapter = None, base
    if adapter is not None:
        files = read_adapter(adapter, say)
        section = base_section(base, files, trust_remote_code)
    elif base:
        files = None
        section = ModelSection(name_or_path=str(base), trust_remote_code=trust_remote_code)
    else:
        raise AdapterError(f"base = {base!r}: allowed: a model directory, or a Hub id")
    if revision is not None:
        section = section.model_copy(update={"revision": revision})
    return FoundModel(section, files)


def is_adapter(path: str | Path) -> bool:
    """Whether ``path`` is an adapter directory, or a revision or subfolder on the Hub, which only
    adapters are named with."""
    try:
        return (Path(path) / CONFIG).is_file() or is_hub_adapter(path, in_part=True)
    except OSError:  # too long, or no permission
        return False


def _load_files(
    section: ModelSection, files: AdapterFiles, dtype: str | None, trainable: bool
) -> PreTrainedModel:
    config = full_config(section, files)
    model, _ = base_model(section, config, [files], dtype or _trained_dtype(files))
    set_pad_token(model.config, model, files)
    load_adapter(model, files, trainable=trainable)
    model.eval()
    return model


def _load_named(
    base: str | Path | None,
    directories: Mapping[str, str | Path],
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    if not directories:
        raise AdapterError("adapter = {}: allowed: a directory, or at least one name -> directory")
    chosen = dtype_name(dtype, "dtype")
    adapters = {name: read_adapter(directory) for name, directory in directories.items()}
    section = _common_section(base, adapters, trust_remote_code)
    if chosen is None:
        trained = {name: _trained_dtype(files) for name, files in adapters.items()}
        chosen = _common("training dtypes (pass dtype to choose one)", trained)
    _common("task types", {name: files.task_type for name, files in adapters.items()})
    configs = {name: full_config(section, files) for name, files in adapters.items()}
    bare = _bare_config(section, configs)
    model, absent = base_model(section, bare, list(adapters.values()), chosen)
    settings = {}
    for name, config in configs.items():
        set_pad_token(config, model, adapters[name])
        keys = LABEL_KEYS if adapters[name].classifies else ()
        settings[name] = {key: getattr(config, key, None) for key in keys}
    if device is not None:
        model.to(torch.device(device))  # type: ignore[arg-type]
    model.eval()
    register_adapters(model, adapters, settings, absent)
    return model


def _common_section(
    base: str | Path | None, adapters: Mapping[str, AdapterFiles], trust_remote_code: bool
) -> ModelSection:
    """The base of all adapters. Those without a revision use that of the others."""
    sections = {n: base_section(base, files, trust_remote_code) for n, files in adapters.items()}
    name = _common("base models", {n: section.name_or_path for n, section in sections.items()})
    revision = _common("revisions of the base", {n: s.revision for n, s in sections.items()})
    assert name is not None
    return ModelSection(name_or_path=name, revision=revision, trust_remote_code=trust_remote_code)


def _bare_config(
    section: ModelSection, configs: Mapping[str, PreTrainedConfig]
) -> PreTrainedConfig:
    """The base's configuration with the adapters' number of labels, which must be the same."""
    config = load_config(section)
    count = _common("numbers of labels", {name: c.num_labels for name, c in configs.items()})
    assert count is not None
    if config.num_labels != count:
        config.num_labels = count
    return config


def _common(what: str, values: Mapping[str, _T | None]) -> _T | None:
    """The value of the adapters that have one. Raises AdapterError if they differ."""
    given = {name: value for name, value in values.items() if value is not None}
    if len(set(given.values())) > 1:
        listed = ", ".join(f"{name}: {value}" for name, value in given.items())
        raise AdapterError(f"the adapters have different {what}: {listed}")
    return next(iter(given.values()), None)


def _trained_dtype(files: AdapterFiles) -> str | None:
    """The base's dtype during training, if the files have it."""
    dtype = (files.sidecar or {}).get("base_dtype")
    return dtype if dtype in DTYPES else None
