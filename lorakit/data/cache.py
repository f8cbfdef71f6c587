"""Encoded rows as flat arrays in safetensors files, kept in the cache directory between runs.

A cache entry is one file, named by a hash of everything that determines its tokens and written
atomically. Deleting it, or the whole directory, is always safe, even while it is in use.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lorakit.data.counts import Counts
from lorakit.data.rows import cache_dir, disk_errors, scratch_file
from lorakit.data.sources import Split
from lorakit.data.tokens import EncodedRows
from lorakit.io.atomic import atomic_file, remove_leftovers

Arrays = dict[str, NDArray[Any]]

#: Tokenizing fewer rows is faster than looking them up.
CACHED_ROWS = 2000
_FORMAT = 4
_PACKAGE = Path(__file__).parents[1]
#: Widest first, so that each array is aligned.
_NAMES = (
    "labels",
    "label_sizes",
    "lengths",
    "words",
    "loss_weights",
    "origins",
    "input_ids",
    "loss_mask",
    "token_type_ids",
)
_DTYPES = {
    "U16": "<u2",
    "I32": "<i4",
    "I64": "<i8",
    "F32": "<f4",
    "F64": "<f8",
    "BOOL": "|b1",
    "I8": "|i1",
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_CHUNK = 4 << 20


# The files


class CorruptFile(Exception):
    """A file of arrays is damaged or incomplete."""


@dataclass
class Shard:
    """A range of rows, with one file per array. ``dtypes`` lists the arrays that are not empty."""

    files: dict[str, BinaryIO]
    dtypes: dict[str, str] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)

    @classmethod
    def empty(cls, in_memory: bool) -> Shard:
        make = io.BytesIO if in_memory else scratch_file
        return cls({name: make() for name in _NAMES})

    def append(self, encoded: EncodedRows, id_dtype: str, start: int) -> None:
        """Append tokenized rows, of the split's rows from ``start`` on. Raises DataError if the
        disk is full."""
        rows, labels = encoded.rows, encoded.labels
        self.counts.add(encoded.counts)
        if not rows:
            return
        weights = [row.loss_mask if row.loss_weights is None else row.loss_weights for row in rows]
        if "loss_weights" in self.dtypes or any(row.loss_weights is not None for row in rows):
            self.fill_weights()
            self._write("loss_weights", "<f4", weights)
        self._write("input_ids", id_dtype, [row.input_ids for row in rows])
        self._write("loss_mask", "|b1", [row.loss_mask for row in rows])
        self._write("lengths", "<i4", [np.array([len(row.input_ids) for row in rows])])
        self._write("origins", "<i4", [np.array(encoded.origins) + start])
        types = [row.token_type_ids for row in rows if row.token_type_ids is not None]
        if types:
            self._write("token_type_ids", "|i1", types)
        words = [row.words for row in rows if row.words is not None]
        if words:
            self._write("words", "<i4", words)
        if labels:
            dtype = "<f8" if isinstance(labels[0], float) else "<i8"
            several = [label for label in labels if isinstance(label, tuple)]
            values = [np.array(label) for label in several] or [np.array(labels, dtype)]
            self._write("labels", dtype, values)
            if several:
                self._write("label_sizes", "<i8", [np.array([len(label) for label in several])])

    def fill_weights(self) -> None:
        """Write the weights of all rows so far, if there are none of them yet."""
        file, mask = self.files["loss_weights"], self.files["loss_mask"]
        if file.seek(0, io.SEEK_END):
            return
        mask.seek(0)
        while chunk := mask.read(_CHUNK):
            self._write("loss_weights", "<f4", [np.frombuffer(chunk, np.bool_)])

    def _write(self, name: str, dtype: str, parts: Sequence[NDArray[Any]]) -> None:
        values = np.concatenate(parts).astype(dtype, copy=False)
        self.dtypes[name] = dtype
        with disk_errors("the tokens"):
            self.files[name].write(values.tobytes())

    def flush(self) -> None:
        with disk_errors("the tokens"):
            for file in self.files.values():
                file.flush()


def write_arrays(shards: Sequence[Shard], out: BinaryIO) -> None:
    """Concatenate the shards into ``out``. Raises OSError if the disk is full."""
    names = [name for name in _NAMES if name in _dtypes(shards)]
    if "loss_weights" in names:
        for shard in shards:
            shard.fill_weights()
    offsets, end = {}, 0
    for name in names:
        sizes = [shard.files[name].seek(0, io.SEEK_END) for shard in shards]
        start, end = end, end + sum(sizes)
        offsets[name] = (start, end)
    header = _header(shards, offsets)
    out.write(_packed(header, crc=0))
    crc = zlib.crc32(json.dumps(header).encode())
    for name in names:
        for shard in shards:
            shard.files[name].seek(0)
            while chunk := shard.files[name].read(_CHUNK):
                crc = zlib.crc32(chunk, crc)
                out.write(chunk)
    out.seek(0)
    out.write(_packed(header, crc))
    out.flush()


def _dtypes(shards: Sequence[Shard]) -> dict[str, str]:
    """Merge the dtypes of all shards. A shard whose rows were all skipped has none."""
    return {name: dtype for shard in shards for name, dtype in shard.dtypes.items()}


def _header(shards: Sequence[Shard], offsets: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    counts, dtypes = Counts(), _dtypes(shards)
    for shard in shards:
        counts.add(shard.counts)
    header: dict[str, Any] = {"__metadata__": {"counts": json.dumps(vars(counts))}}
    for name, (start, end) in offsets.items():
        dtype = dtypes[name]
        header[name] = {
            "dtype": _CODES[dtype],
            "shape": [(end - start) // np.dtype(dtype).itemsize],
            "data_offsets": [start, end],
        }
    return header


def _packed(header: Mapping[str, Any], crc: int) -> bytes:
    """The encoded header with the checksum, which covers the rest of the header and the data."""
    metadata = header["__metadata__"] | {"crc32": f"{crc:08x}"}
    text = json.dumps({**header, "__metadata__": metadata}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_arrays(file: BinaryIO) -> tuple[Arrays, Counts]:
    """Return the arrays that ``write_arrays`` wrote: memory-mapped, or as views of an in-memory
    file.

    Raises CorruptFile if the checksum or the structure is wrong.
    """
    raw: Any
    if isinstance(file, io.BytesIO):
        raw = file.getbuffer()
    elif not os.fstat(file.fileno()).st_size:
        raise CorruptFile("empty file")
    else:
        raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(bytes(raw[8 : 8 + size]))
        metadata = header["__metadata__"]
        checksum = metadata.pop("crc32")
        crc = zlib.crc32(json.dumps(header).encode())
        del header["__metadata__"]
        arrays = {name: _array(raw, 8 + size, entry) for name, entry in header.items()}
        counts = _counts(metadata["counts"])
        intact = _crc(file, 8 + size, crc) == checksum
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(str(error)) from error
    if not intact:
        raise CorruptFile("wrong checksum")
    return arrays, counts


def _counts(text: str) -> Counts:
    values = json.loads(text)
    skipped = [(index, reason) for index, reason in values["skipped"]]
    return Counts(**values | {"notes": Counter(values["notes"]), "skipped": skipped})


def _array(raw: Any, start: int, entry: Mapping[str, Any]) -> NDArray[Any]:
    (count,) = entry["shape"]
    offset = start + entry["data_offsets"][0]
    values = np.frombuffer(raw, _DTYPES[entry["dtype"]], count, offset)
    values.flags.writeable = False
    return values


def _crc(file: BinaryIO, start: int, crc: int) -> str:
    """Read the file rather than the mapping, which would then count in full as resident memory."""
    file.seek(start)
    while chunk := file.read(_CHUNK):
        crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


# The cache


@dataclass
class EncodedCache:
    """The cache entries of one ``encoding_key``.

    ``say`` is called with a message about each entry that was read or could not be written. If
    ``write`` is false, entries are only read.
    """

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
                raise CorruptFile("wrong number of rows")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, CorruptFile, KeyError) as error:
            self.say(f"{path}: the cache entry is corrupt ({error}); tokenizing again")
            if self.write:
                with suppress(OSError):
                    path.unlink()
            return None
        self.say(f"{split.name}: {len(split):,} rows read from the cache {self.directory}")
        return arrays, counts

    def store(self, split: Split, shards: Sequence[Shard]) -> BinaryIO | None:
        """Write an entry and open it. If it cannot be written, report that once and return None.

        An entry that another process has written meanwhile is kept: it may have mapped it, and on a
        network file system, a mapping does not survive that another host replaces the file.
        """
        if not self.write:
            return None
        path = self.path(split)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.directory)
            with atomic_file(path, replace=False) as new:
                with new.open("wb") as file:
                    write_arrays(shards, file)
                return new.open("rb")
        except OSError as error:
            self.say(
                f"cannot write to the cache {self.directory} ({error.strerror}): the next run "
                "tokenizes again; hint: set LORAKIT_CACHE to another directory"
            )
            self.write = False
            return None


def encoding_key(tokenizer: Any, config: Mapping[str, Any], extra: bytes = b"") -> str | None:
    """Hash everything that determines the tokens of a row: the tokenizer with its chat template,
    the task's ``config`` (including ``max_length``), the code, and ``extra`` (from a user task).

    Returns None for a slow tokenizer, which cannot be serialized.
    """
    import tokenizers
    import transformers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    parts = {
        "format": _FORMAT,
        "versions": [tokenizers.__version__, transformers.__version__],
        "code": source_digest(_PACKAGE / "data", _PACKAGE / "tasks"),
        "tokenizer": hashlib.sha256(_serialized(backend).encode()).hexdigest(),
        "special_tokens": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "config": config,
        "extra": hashlib.sha256(extra).hexdigest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _serialized(backend: Any) -> str:
    """The tokenizer as JSON, without the settings that its last call has left."""
    truncation, padding = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    try:
        text: str = backend.to_str()
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
    return text


@cache
def source_digest(*folders: Path) -> str:
    """Hash the Python modules in the folders. To parse them, so as to ignore comments, would take
    half a second at each start."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
