"""Reads the pieces of ``tokenizer.model``, a SentencePiece model, without that library.

The file is a protocol buffer. Its field 1, repeated, is a piece: text (field 1), score (2, a float)
and type (3). All other fields are skipped.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lorakit.errors import ModelError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Piece:
    """``kind``: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte; GGUF has the same
    numbers."""

    text: str
    score: float
    kind: int = 1


def read_pieces(file: Path) -> list[Piece]:
    """The pieces in the order of their ids. Raises ModelError for a corrupt file."""
    try:
        content = file.read_bytes()
        pieces = [_piece(value) for field, value in _fields(content) if field == 1]
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise ModelError(f"{file}: not a SentencePiece model: {error}") from error
    if not pieces:
        raise ModelError(f"{file}: not a SentencePiece model: it has no pieces")
    return pieces


def _piece(content: object) -> Piece:
    if not isinstance(content, bytes):
        raise ValueError("a piece is not a message")
    values = dict(_fields(content))
    text, score, kind = values.get(1, b""), values.get(2, 0.0), values.get(3, 1)
    if not (isinstance(text, bytes) and isinstance(score, float) and isinstance(kind, int)):
        raise ValueError("a piece has values of other types")
    return Piece(text.decode("utf-8"), score, kind)


def _fields(content: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Field number and value of each field of a message."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        wire = key & 7
        if wire == _VARINT:
            value, at = _varint(content, at)
            yield key >> 3, value
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
            yield key >> 3, struct.unpack_from("<f" if wire == _FIXED32 else "<d", content, at)[0]
            at += size
        elif wire == _BYTES:
            size, at = _varint(content, at)
            if at + size > len(content):
                raise ValueError("truncated")
            yield key >> 3, content[at : at + size]
            at += size
        else:
            raise ValueError(f"unknown wire type {wire}")


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = content[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if not byte & 128:
            return value, at
