"""Resolve a model's name or path, and load its configuration and its tokenizer.

Importing this module does not import transformers.
"""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from lorakit.errors import ModelError
from lorakit.recipe.sections import ModelSection

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

#: Tokens that model families reserve for padding, in the order in which they are tried.
_PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|endoftext|>")


def other_content(path: Path) -> str | None:
    """Describe a file, or a directory that is not a model; None if the contents are unknown."""
    if path.is_file():
        if path.suffix == ".gguf":
            return "a GGUF file, which lorakit does not read"
        if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
            return "a pickle file, which lorakit does not load"
        return "a weights file, not a directory" if path.suffix == ".safetensors" else None
    if (path / "adapter_config.json").is_file():
        return "it contains an adapter, not a base model"
    if (path / "adapter" / "adapter_config.json").is_file():
        return f"it is a run's output directory; its adapter is {path / 'adapter'}"
    if (path / "state.json").is_file() and (path / "weights.safetensors").is_file():
        return "it is a training checkpoint; resume from it with train --resume"
    if any(path.glob("*.gguf")):
        return "it contains GGUF files, which lorakit does not read"
    return None


def is_missing_path(name: str) -> bool:
    """Whether ``name`` can only be a path, because no Hub id looks like it, and does not exist.
    ``models/`` is a page of the Hub, so no repository's name starts with it."""
    path = Path(name)
    local = path.is_absolute() or name.startswith((".", "~", "models/"))
    return (local or name.count("/") > 1 or "\\" in name) and not path.exists()


def hub_resolves() -> bool:
    """Whether the Hub's host name resolves and offline mode is off."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def hub_options(section: ModelSection) -> dict[str, Any]:
    """Keyword arguments for every ``from_pretrained``; offline, only the local cache is used."""
    options = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    if not Path(section.name_or_path).is_dir() and not hub_resolves():
        options["local_files_only"] = True
    return {key: value for key, value in options.items() if value is not None}


def load_config(section: ModelSection) -> PreTrainedConfig:
    """Load the model's configuration. Raises ModelError if there is none."""
    from transformers import AutoConfig

    name = section.name_or_path
    check_location(name)
    with explained(name, WRONG_CONFIG), quiet():
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, **hub_options(section))
    with suppress(ValueError):  # several text parts: check_kind refuses such a model
        text = config.get_text_config()
        if getattr(config, "tie_word_embeddings", False) and text is not config:
            # The composite model reads its own flag; an output layer stored separately stays so.
            text.tie_word_embeddings = True
    return config


def check_location(name: str) -> None:
    """Raise ModelError for a file, a directory without a model, and a path that does not exist."""
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        content = other_content(path)
        raise ModelError(
            "no config.json in the directory" + (f" ({content})" if content else ""), about=name
        )
    if path.is_file():
        content = other_content(path) or "a file"
        allowed = "a model directory in transformers format, or a Hub id"
        raise ModelError(content, about=name, allowed=allowed)
    if is_missing_path(name):
        allowed = "a model directory, or a Hub id (namespace/name)"
        raise ModelError("no such directory", about=name, allowed=allowed)


def load_tokenizer(name: str, options: dict[str, Any]) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """Load the tokenizer; return it with notes on what was changed.

    A missing pad token is set. Labels are never masked by the pad token's id, so EOS is learned
    even where it also pads. Raises ModelError if there is no fast tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # a missing file, a corrupt one and a network failure look alike
        reason = _first_lines(error)
        raise ModelError(f"{name}: no usable tokenizer: {reason}") from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"{name}: {type(tokenizer).__name__} has no fast implementation "
            "(tokenizer.json), which lorakit requires"
        )
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is not None:
        return tokenizer, []
    pad = _pad_token(tokenizer)
    if pad is None:
        raise ModelError(f"{name}: the tokenizer has no pad, unknown or EOS token")
    tokenizer.pad_token = pad
    return tokenizer, [f"the tokenizer has no pad token; using {pad!r} (EOS is unchanged)"]


def _pad_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    vocabulary = tokenizer.get_vocab()
    eos = tokenizer.eos_token
    for token in _PAD_TOKENS:
        if token in vocabulary and token != eos:
            return token
    fallback: str | None = tokenizer.unk_token or eos
    return fallback


@contextmanager
def explained(name: str, what: str = "") -> Iterator[None]:
    """Turn errors of transformers and the Hub into a one-line ModelError, ``name: reason``. Before
    a library's own text, it says ``what`` has failed."""
    try:
        yield
    except (ModelError, MemoryError):
        raise
    except Exception as error:
        reason = _reason(error, what)
        if reason is None:
            raise
        raise ModelError(f"{name}: {reason}") from error


#: What has failed if transformers rejects a configuration.
WRONG_CONFIG = "config.json does not describe a model"


def _reason(error: Exception, what: str) -> str | None:
    """Explain why a model could not be loaded; None if the device ran out of memory."""
    import torch
    from huggingface_hub import errors as hub

    causes = [*_causes(error)]
    text = str(error)
    if any(isinstance(cause, hub.GatedRepoError) for cause in causes):
        return "the repository is gated; accept its terms on the Hub and log in (hf auth login)"
    offline = "offline" in text or "couldn't connect" in text
    if offline or any(isinstance(cause, hub.LocalEntryNotFoundError) for cause in causes):
        return (
            "no such directory, not in the local cache, and the Hub cannot be reached "
            "(no network, or HF_HUB_OFFLINE is set)"
        )
    if any(isinstance(cause, hub.RepositoryNotFoundError) for cause in causes):
        return "no such directory, and no such repository on the Hub (or it is private)"
    if isinstance(error, torch.OutOfMemoryError):
        return None
    if re.search(r"file named \S*safetensors", text):
        return "no safetensors weights; lorakit does not load pickles: convert the checkpoint first"
    if "trust_remote_code" in text:
        return "the model contains custom code; enable trust_remote_code to run it"
    reason = f"KeyError: {error}" if isinstance(error, KeyError) else _first_lines(error)
    return f"{what}: {reason}" if what else reason


def _causes(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _first_lines(error: Exception) -> str:
    """The first two lines: if the first only names a field, the second says what is wrong with
    it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and reports of transformers and the Hub."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    hub_logger = logging.getLogger("huggingface_hub")
    hub_level = hub_logger.level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        hub_logger.setLevel(hub_level)
        if bars:
            transformers_logging.enable_progress_bar()
