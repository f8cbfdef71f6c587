"""Loads a base model with one adapter, or with several to switch between: ``lorakit.load``."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from lorakit.adapters.base_model import (
    DTYPES,
    LABEL_KEYS,
    base_model,
    base_section,
    dtype_name,
    full_config,
    set_pad_token,
)
from lorakit.adapters.peft.method import run_method_file
from lorakit.adapters.peft.place import load_adapter
from lorakit.adapters.peft.read import AdapterFiles, read_adapter
from lorakit.adapters.switching import register_adapters
from lorakit.errors import AdapterError
from lorakit.models.hub import load_config
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
    config = full_config(section, files)
    chosen = dtype_name(dtype, "dtype") or _trained_dtype(files)
    model, _ = base_model(section, config, [files], chosen)
    set_pad_token(model.config, model, files)
    load_adapter(model, files, trainable=trainable)
    if device is not None:
        model.to(torch.device(device))  # type: ignore[arg-type]
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
    kinds = {n: "SEQ_CLS" if f.classifies else "CAUSAL_LM" for n, f in adapters.items()}
    _common("task types", kinds)
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
