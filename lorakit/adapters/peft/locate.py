"""Finds the directory of an adapter: a local one, or one that is downloaded from the Hub."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from lorakit.adapters.peft.schema import CONFIG, WEIGHTS
from lorakit.errors import AdapterError
from lorakit.models.hub import explained, hub_resolves, is_missing_path, other_content

_HUB_ID = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^\s@:]+))?(?::(?P<subfolder>[^:]+))?"
)
#: Files that an adapter consists of; a repository may contain a whole training run as well.
_FILES = ("*.json", "*.jinja", "*.model", "*.txt", WEIGHTS, "README.md")


def adapter_directory(given: str | Path) -> Path:
    """Return the adapter's directory, downloading it first if ``given`` is a Hub id that is not in
    the cache: ``namespace/name``, followed by ``@REVISION``, ``:SUBFOLDER`` or both.

    Raises AdapterError, which says what was found instead, or ModelError if a download fails.
    """
    path = Path(given)
    try:
        is_directory, exists = path.is_dir(), path.exists()
        is_adapter = is_directory and (path / CONFIG).is_file()
    except OSError as error:  # too long, or no permission
        raise AdapterError(f"{path}: cannot be read: {error.strerror}") from None
    if is_adapter:
        return path
    if is_directory:
        raise AdapterError(f"{path}: {_instead(path)}")
    if exists:
        what = other_content(path) or "a file"
        raise AdapterError(f"{path}: {what}; allowed: an adapter directory, with {CONFIG}")
    if (found := _hub_id(given)) is None:
        slash = "/" in str(given)
        hint = "" if slash else "; an adapter on the Hub is named namespace/name"
        raise AdapterError(f"{path}: no such adapter directory{hint}")
    return _downloaded(str(given), found["repo"], found["revision"], found["subfolder"] or "")


def is_read_as_adapter(directory: Path) -> bool:
    """Whether a directory that may be a model or an adapter is read as an adapter: it is not only a
    model, so that the message about one that is neither names what an adapter has."""
    return (directory / CONFIG).is_file() or not (directory / "config.json").is_file()


def is_hub_adapter(given: str | Path, *, in_part: bool = False) -> bool:
    """Whether ``given`` has the form of an adapter on the Hub; with ``in_part``, one with a
    revision or a subfolder."""
    found = _hub_id(given)
    return found is not None and (not in_part or bool(found["revision"] or found["subfolder"]))


def _hub_id(given: str | Path) -> re.Match[str] | None:
    found = _HUB_ID.fullmatch(str(given))
    return None if found is None or is_missing_path(found["repo"]) else found


def _downloaded(given: str, repo: str, revision: str | None, subfolder: str) -> Path:
    inside = PurePosixPath(subfolder)
    if inside.is_absolute() or ".." in inside.parts:
        raise AdapterError(f"{given}: the subfolder {subfolder}: allowed: inside the repository")
    from huggingface_hub import snapshot_download

    with explained(given):
        folder = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=[str(inside / pattern) for pattern in _FILES],
            local_files_only=not hub_resolves(),
        )
    directory = Path(folder) / inside
    if not (directory / CONFIG).is_file():
        raise AdapterError(
            f"{given}: no adapter in the Hub's repository: {inside / CONFIG} is missing"
        )
    return directory


def _instead(path: Path) -> str:
    """Describe a directory that is not an adapter."""
    missing = f"{CONFIG} is missing"
    if inside := sorted(file.parent for file in path.glob(f"*/{CONFIG}")):
        names = " or ".join(map(str, inside[:5])) + (" ..." if len(inside) > 5 else "")
        return f"not an adapter: {missing}; did you mean {names}?"
    if (path / "config.json").is_file():
        return f"a model, not an adapter: {missing}"
    what = other_content(path)
    return f"not an adapter{f' ({what})' if what else ''}: {missing}"
