"""Sources of ``task.path``: files, and datasets on the Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_FILE = re.compile(r"\.(jsonl?|csv|tsv|parquet|arrow|txt)(\.gz)?$")


def source(path: Any, split: str, name: str | None = None, is_local: bool = False) -> Any:
    """A source: the path of files, or a dataset on the Hub with its split and configuration."""
    if is_local or isinstance(path, list) or is_file_name(str(path)):
        return path
    return {"path": path, **({"name": str(name)} if name else {}), "split": split}


def is_file_name(path: str) -> bool:
    """Whether ``path`` names files or a directory rather than a dataset on the Hub."""
    starts = path.startswith((".", "/", "~"))
    return starts or bool(_FILE.search(path)) or any(c in path for c in "*?") or Path(path).exists()


def without_part(split: str) -> tuple[str, str | None]:
    """The name of a split, and the part that it is limited to: N of ``[:N]``, or all in brackets;
    None for the whole split."""
    name, bracket, part = split.partition("[")
    return name, part.rstrip("]").removeprefix(":") if bracket else None
