"""What the name of a model or an adapter refers to; imports no model library."""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.parse import urlparse


def other_content(path: Path) -> str | None:
    """What a file, or a directory that is no model, is; None where that is not known."""
    if path.is_file():
        if path.suffix == ".gguf":
            return "a GGUF file, which lorakit does not read"
        if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
            return "a pickle, and lorakit loads none"
        return "a file of weights, not a directory" if path.suffix == ".safetensors" else None
    if (path / "adapter_config.json").is_file():
        return "it holds an adapter, not a base model"
    if (path / "adapter" / "adapter_config.json").is_file():
        return f"it is the directory of a run, whose adapter is {path / 'adapter'}"
    if (path / "state.json").is_file() and (path / "weights.safetensors").is_file():
        return "it is a checkpoint of a run, to go on from with train --resume"
    if any(path.glob("*.gguf")):
        return "it holds GGUF files, which lorakit does not read"
    return None


def is_missing_path(name: str) -> bool:
    """Whether ``name`` can only mean a directory, and there is none: no Hub id begins so, or has
    more than one slash."""
    path = Path(name)
    local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name
    return local and not path.exists()


def hub_resolves() -> bool:
    """Whether there is a network to ask the Hub over."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True
