"""The tokens of many rows as flat arrays, in one file of the safetensors format, mapped."""

from __future__ import annotations

import io
import json
import mmap
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lorakit.data.spool import needs_room, scratch_file
from lorakit.data.tokens import Counts, EncodedRows

Arrays = dict[str, NDArray[Any]]

#: The widest first, so that each array is aligned.
_NAMES = ("labels", "lengths", "input_ids", "loss_mask", "token_type_ids")
_DTYPES = {"U16": "<u2", "I32": "<i4", "I64": "<i8", "F64": "<f8", "BOOL": "|b1", "I8": "|i1"}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_CHUNK = 4 << 20


class BrokenFile(Exception):
    """A file of arrays that is not whole."""


@dataclass
class Shard:
    """A stretch of rows, one file an array. ``dtypes`` are those of the arrays that have
    anything."""

    files: dict[str, BinaryIO]
    dtypes: dict[str, str] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)

    @classmethod
    def empty(cls, in_memory: bool) -> Shard:
        make = io.BytesIO if in_memory else scratch_file
        return cls({name: make() for name in _NAMES})

    def append(self, encoded: EncodedRows, token_dtype: str) -> None:
        """Raises DataError if the disk is full."""
        rows, labels = encoded.rows, encoded.labels
        self.counts.add(encoded.counts)
        if not rows:
            return
        self._write("input_ids", token_dtype, [row.input_ids for row in rows])
        self._write("loss_mask", "|b1", [row.loss_mask for row in rows])
        self._write("lengths", "<i4", [[len(row.input_ids) for row in rows]])
        types = [row.token_type_ids for row in rows if row.token_type_ids is not None]
        if types:
            self._write("token_type_ids", "|i1", types)
        if labels:
            self._write("labels", "<f8" if isinstance(labels[0], float) else "<i8", [labels])

    def _write(self, name: str, dtype: str, parts: Iterable[Sequence[Any]]) -> None:
        values = np.concatenate([np.asarray(part, dtype=dtype) for part in parts])
        self.dtypes[name] = dtype
        with needs_room("the tokens"):
            self.files[name].write(values.tobytes())

    def flush(self) -> None:
        with needs_room("the tokens"):
            for file in self.files.values():
                file.flush()


def write_arrays(shards: Sequence[Shard], out: BinaryIO) -> None:
    """The shards one behind another. Raises OSError if the disk is full."""
    names = [name for name in _NAMES if name in _dtypes(shards)]
    ends, end = {}, 0
    for name in names:
        sizes = [shard.files[name].seek(0, io.SEEK_END) for shard in shards]
        start, end = end, end + sum(sizes)
        ends[name] = (start, end)
    header = _header(shards, ends)
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
    """Those of all: a shard whose rows were all skipped has none."""
    return {name: dtype for shard in shards for name, dtype in shard.dtypes.items()}


def _header(shards: Sequence[Shard], ends: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    counts, dtypes = Counts(), _dtypes(shards)
    for shard in shards:
        counts.add(shard.counts)
    header: dict[str, Any] = {"__metadata__": {"counts": json.dumps(vars(counts))}}
    for name, (start, end) in ends.items():
        dtype = dtypes[name]
        header[name] = {
            "dtype": _CODES[dtype],
            "shape": [(end - start) // np.dtype(dtype).itemsize],
            "data_offsets": [start, end],
        }
    return header


def _packed(header: Mapping[str, Any], crc: int) -> bytes:
    """With the checksum, which is of the rest of the header and of all that is behind it."""
    metadata = header["__metadata__"] | {"crc32": f"{crc:08x}"}
    text = json.dumps({**header, "__metadata__": metadata}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_arrays(file: BinaryIO) -> tuple[Arrays, Counts]:
    """The arrays that ``write_arrays`` wrote, mapped, or if ``file`` is in memory views of it.

    Raises BrokenFile if they are not those.
    """
    raw: Any
    if isinstance(file, io.BytesIO):
        raw = file.getbuffer()
    elif not os.fstat(file.fileno()).st_size:
        raise BrokenFile("it is empty")
    else:
        raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(bytes(raw[8 : 8 + size]))
        metadata = header["__metadata__"]
        checksum = metadata.pop("crc32")
        crc = zlib.crc32(json.dumps(header).encode())
        del header["__metadata__"]
        arrays = {name: _array(raw, 8 + size, place) for name, place in header.items()}
        counts = _counts(metadata["counts"])
        whole = _crc(file, 8 + size, crc) == checksum
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenFile(str(error)) from error
    if not whole:
        raise BrokenFile("the checksum differs")
    return arrays, counts


def _counts(text: str) -> Counts:
    values = json.loads(text)
    skipped = [(index, reason) for index, reason in values["skipped"]]
    return Counts(**values | {"notes": Counter(values["notes"]), "skipped": skipped})


def _array(raw: Any, start: int, place: Mapping[str, Any]) -> NDArray[Any]:
    (count,) = place["shape"]
    offset = start + place["data_offsets"][0]
    values = np.frombuffer(raw, _DTYPES[place["dtype"]], count, offset)
    values.flags.writeable = False
    return values


def _crc(file: BinaryIO, start: int, crc: int) -> str:
    """Read, not through the mapping, which would count all of it as memory."""
    file.seek(start)
    while chunk := file.read(_CHUNK):
        crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"
