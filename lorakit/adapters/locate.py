"""Where an adapter is: a directory, or a repository of the Hub; and what is there instead."""

from __future__ import annotations

import re
from pathlib import Path

from lorakit.errors import AdapterError
from lorakit.models.located import hub_resolves, is_missing_path, other_content

CONFIG = "adapter_config.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
#: All that an adapter may consist of; a repository may hold a whole training beside it.
_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "adapter_model.safetensors", "README.md"]


def adapter_directory(given: str | Path) -> Path:
    """The directory of an adapter; of a Hub id, ``namespace/name``, that of its snapshot in the
    cache, downloaded where it is not there yet.

    Raises AdapterError that says what is there instead, ModelError for an id that cannot be had.
    """
    path = Path(given)
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise AdapterError(f"{path}: {_instead(path)}: {CONFIG} is missing")
        return path
    if path.exists():
        what = other_content(path) or "a file"
        raise AdapterError(f"{path}: {what}; allowed: an adapter directory, which holds {CONFIG}")
    if is_missing_path(str(given)) or not _HUB_ID.fullmatch(str(given)):
        slash = "/" in str(given)
        hint = "" if slash else "; an adapter on the Hub is named namespace/name"
        raise AdapterError(f"{path}: no such adapter directory{hint}")
    from huggingface_hub import snapshot_download

    from lorakit.models.load import explained

    with explained(str(given), "adapter"):
        found = snapshot_download(
            str(given), allow_patterns=_FILES, local_files_only=not hub_resolves()
        )
    if not (Path(found) / CONFIG).is_file():
        raise AdapterError(f"{given}: no adapter in the Hub's repository: {CONFIG} is missing")
    return Path(found)


def _instead(path: Path) -> str:
    """What a directory without an adapter is."""
    inside = sorted(file.parent for file in path.glob(f"*/{CONFIG}"))
    if inside:
        names = ", ".join(map(str, inside[:5])) + (", ..." if len(inside) > 5 else "")
        return f"not an adapter, but it holds some ({names}); name one of them"
    if (path / "config.json").is_file():
        return "a model, not an adapter"
    what = other_content(path)
    return f"no adapter ({what})" if what else "no adapter"
