"""Tokens that an earlier run made of the same data, kept in the cache directory.

An entry is one file, named by a hash of all that the tokens follow from and written atomically.
Deleting it, or the whole directory, is always safe, also while it is in use.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from lorakit.data.arrays import Arrays, BrokenFile, Shard, read_arrays, write_arrays
from lorakit.data.sources import Split
from lorakit.data.spool import cache_dir
from lorakit.data.tokens import Counts
from lorakit.io.atomic import atomic_file, remove_leftovers

#: Fewer rows are tokenised sooner than looked up.
CACHED_ROWS = 2000
_FORMAT = 3


def encoding_key(tokenizer: Any, config: Mapping[str, Any], extra: bytes = b"") -> str | None:
    """A hash of what makes tokens of rows: the tokenizer with its chat template, the task's
    ``config`` (its ``max_length`` among it), the code, and ``extra`` (of a task's own file).

    None for a tokenizer that cannot be written down (a slow one).
    """
    import tokenizers
    import transformers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    state = json.loads(backend.to_str())
    for key in ("truncation", "padding"):  # left there by the last call
        state.pop(key, None)
    parts = {
        "format": _FORMAT,
        "versions": [tokenizers.__version__, transformers.__version__],
        "code": _code_digest(),
        "tokenizer": state,
        "special_tokens": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "config": config,
        "extra": hashlib.sha256(extra).hexdigest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _code_digest() -> str:
    """Of the files that make examples and tokens."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for folder in ("data", "tasks"):
        for file in sorted((package / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


@dataclass
class EncodedCache:
    """``key`` is ``encoding_key``; ``say`` gets what was read or could not be written; without
    ``write`` entries are only read."""

    key: str
    say: Callable[[str], None]
    write: bool = True
    directory: Path = field(default_factory=lambda: cache_dir() / "tokens")

    def path(self, split: Split) -> Path:
        name = hashlib.sha256(f"{self.key}:{split.fingerprint}".encode()).hexdigest()[:32]
        return self.directory / f"{name}.safetensors"

    def read(self, split: Split) -> tuple[Arrays, Counts] | None:
        path = self.path(split)
        try:
            with path.open("rb") as file:
                arrays, counts = read_arrays(file)
            if counts.rows != len(split):
                raise BrokenFile("it has another number of rows")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, BrokenFile, KeyError) as error:
            self.say(f"{path}: the cache entry is broken ({error}): tokenising again")
            return None
        self.say(f"{split.name}: {len(split):,} rows read from the cache {self.directory}")
        return arrays, counts

    def store(self, split: Split, shards: Sequence[Shard]) -> BinaryIO | None:
        """The entry, open; None if it cannot be written, which is said, the first time."""
        if not self.write:
            return None
        path = self.path(split)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.directory)
            with atomic_file(path) as new, new.open("wb") as file:
                write_arrays(shards, file)
            return path.open("rb")
        except OSError as error:
            self.say(
                f"the cache {self.directory} cannot be written ({error.strerror}): the next run "
                "tokenises again; LORAKIT_CACHE names another directory"
            )
            self.write = False
            return None
