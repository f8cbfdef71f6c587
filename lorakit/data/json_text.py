"""Split JSON text into objects while reading it in chunks.

Three forms are recognized by the file's content: one object per line, a single array of objects,
and concatenated objects. Together the pieces contain all bytes of the file; each has the row that
it begins with, if any.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from lorakit.data.rows import UnreadRow
from lorakit.errors import DataError, shown

#: Bytes of the file, and the object that they begin with; None between rows.
Piece = tuple[bytes, dict[str, Any] | None]

#: The size of a read, in bytes.
CHUNK = 1 << 20
_HEAD = 1 << 12
#: In characters. A larger value is not a row but a file in an unsupported form.
LARGEST_ROW = 256 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
#: A literal or an escape cut off by the end of a chunk is no longer than this.
_LONGEST_LITERAL = 16
_DECODER = json.JSONDecoder()
_FORMS = "allowed: an array of objects, [{...}, ...], or one object per line"


def pieces(file: Path, handle: BinaryIO, by_line: bool, skip_bad: bool = False) -> Iterator[Piece]:
    """Yield the text in pieces. An array is recognized by its first character; any other file has
    one object per line if ``by_line``, else concatenated objects.

    Raises DataError with the row, counted from 1. With ``skip_bad``, each bad row becomes an
    UnreadRow, provided that the start of the next row can be found.
    """
    is_array = _first_character(handle) == "["
    if by_line and not is_array:
        yield from _lines(file, handle, skip_bad)
        return
    text = _Text(file, handle)
    with unrecoverable(skip_bad):
        yield from (_array if is_array else _objects)(file, text, skip_bad)


@contextmanager
def unrecoverable(skip_bad: bool) -> Iterator[None]:
    """Explain in errors, if bad rows are to be skipped, why this one cannot be skipped."""
    try:
        yield
    except DataError as error:
        if not skip_bad:
            raise
        raise DataError(
            f"{error}; task.on_bad_row: skip cannot find the start of the next row"
        ) from error


def _first_character(handle: BinaryIO) -> str:
    """The first character that is not whitespace, or an empty string. Rewinds the handle."""
    found = b""
    while not found and (chunk := handle.read(_HEAD)):
        found = chunk.removeprefix(codecs.BOM_UTF8).lstrip()
    handle.seek(0)
    return found[:1].decode("latin-1")


def _lines(file: Path, handle: BinaryIO, skip_bad: bool) -> Iterator[Piece]:
    """One object per line; blank lines are ignored."""
    number = 0
    for line in handle:
        if line.isspace():
            yield line, None
            continue
        number += 1
        yield line, _row_or_reason(f"{file}, row {number}", partial(_line_row, line), skip_bad)


def _line_row(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from error
    return _checked(line, value)


def _array(file: Path, text: _Text, skip_bad: bool) -> Iterator[Piece]:
    """The elements of a single array."""
    yield (text.space(bom=True) + text.take(1) + text.space()).encode(), None
    if text.peek() == "]":
        yield (text.take(1) + text.space()).encode(), None
    else:
        yield from _elements(file, text, skip_bad)
    if text.peek():
        raise DataError(f"{file}: text after the end of the array; {_FORMS}")


def _elements(file: Path, text: _Text, skip_bad: bool) -> Iterator[Piece]:
    number, separator = 0, ","
    while separator == ",":
        number += 1
        where = f"{file}, row {number}"
        value, raw = text.value(where)
        raw += text.space()
        separator = text.peek()
        if separator not in (",", "]"):
            found = repr(separator) if separator else "the end of the file"
            raise DataError(f"{where}: not JSON: {found} after the value; allowed: ',' or ']'")
        data = (raw + text.take(1) + text.space()).encode()
        yield data, _checked_row(where, data, value, skip_bad)


def _objects(file: Path, text: _Text, skip_bad: bool) -> Iterator[Piece]:
    """Concatenated objects, on separate lines or not. A single object that wraps the rows in a list
    is an error."""
    yield text.space(bom=True).encode(), None
    number, first = 0, None
    while text.peek():
        number += 1
        where = f"{file}, row {number}"
        value, raw = text.value(where)
        data = (raw + text.space()).encode()
        row = _checked_row(where, data, value, skip_bad)
        if number == 1:
            first = data, row
            continue
        if first is not None:
            yield first
            first = None
        yield data, row
    if first is not None:
        _refuse_wrapped(file, first[1])
        yield first


class _Text:
    """A file's text, buffered up to the end of the value that is being read."""

    def __init__(self, file: Path, handle: BinaryIO) -> None:
        self._handle = handle
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._buffer = ""
        self._position = 0
        self._ended = False
        self._where = str(file)
        self._broken: UnicodeDecodeError | None = None

    def value(self, where: str) -> tuple[Any, str]:
        """Parse the value that begins here and return it with its text. ``where`` names the row in
        errors from here on."""
        self._where = where
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._position)
            except RecursionError as error:
                raise DataError(f"{where}: not JSON: {error}") from error
            except json.JSONDecodeError as error:
                # Positions are counted from the beginning of the value.
                reason = f"{error.msg} at character {error.pos - self._position + 1} of the row"
                if len(self._buffer) > LARGEST_ROW:
                    reason = f"no end within {LARGEST_ROW >> 20} MiB; {_FORMS}"
                elif self._may_be_cut_off(error) and self._read_more():
                    continue
                raise DataError(f"{where}: not JSON: {reason}") from error
            return value, self._taken(end)

    def space(self, bom: bool = False) -> str:
        """Consume whitespace, and with ``bom`` a byte order mark before it."""
        found = self.take(1) if bom and self.peek() == "\ufeff" else ""
        while True:
            match = _SPACE.match(self._buffer, self._position)
            assert match is not None, "the pattern also matches the empty string"
            found += self._taken(match.end())
            if self._position < len(self._buffer) or not self._read_more():
                return found

    def peek(self) -> str:
        """The next character, or an empty string at the end of the file."""
        if self._position == len(self._buffer) and not self._read_more():
            return ""
        return self._buffer[self._position]

    def take(self, count: int) -> str:
        return self._taken(self._position + count)

    def _taken(self, end: int) -> str:
        begin, self._position = self._position, end
        return self._buffer[begin:end]

    def _may_be_cut_off(self, error: json.JSONDecodeError) -> bool:
        """Whether the value may simply continue beyond what has been read."""
        if error.msg.startswith("Unterminated string"):
            return True
        left = self._buffer[error.pos : error.pos + CHUNK]
        return len(left) <= _LONGEST_LITERAL or not left.strip()

    def _read_more(self) -> bool:
        """Read another chunk, larger for long values, so that they are not reparsed too often."""
        self._buffer, self._position = self._buffer[self._position :], 0
        more = ""
        while not more and not self._ended and self._broken is None:
            chunk = self._handle.read(max(CHUNK, len(self._buffer)))
            self._ended = not chunk
            try:
                more = self._decode(chunk, self._ended)
            except UnicodeDecodeError as error:  # raised below, for the row it is in
                more, self._broken = error.object[: error.start].decode(), error
        if not more and self._broken is not None:
            raise DataError(f"{self._where}: not UTF-8: {self._broken}") from self._broken
        self._buffer += more
        return bool(more)


def _checked_row(where: str, data: bytes, value: Any, skip_bad: bool) -> dict[str, Any]:
    return _row_or_reason(where, partial(_checked, data, value), skip_bad)


def _row_or_reason(
    where: str, read: Callable[[], dict[str, Any]], skip_bad: bool
) -> dict[str, Any]:
    try:
        return read()
    except DataError as error:
        if skip_bad:
            return UnreadRow(str(error))
        raise DataError(f"{where}: {error}") from error


def _checked(data: bytes, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError("not a JSON object")
    if b"\\u" in data and b"\\ud" in data.lower() and _has_lone_surrogate(value):
        raise DataError("lone surrogate: not valid text")
    # A duplicate key shows as more colons after a quote than the value has keys. A text may
    # contain such a colon too, in which case the row is parsed a second time.
    seen = data.count(b'":') + data.count(b'" :')
    if seen != len(value) and seen != _count_keys(value):
        _refuse_duplicates(data)
    return value


def _count_keys(value: dict[str, Any]) -> int:
    left: list[Any] = [value]
    count = 0
    while left:
        found = left.pop()
        inner: Iterable[Any] = found
        if isinstance(found, dict):
            count += len(found)
            inner = found.values()
        left += [item for item in inner if item.__class__ is dict or item.__class__ is list]
    return count


def _refuse_duplicates(data: bytes) -> None:
    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"duplicate key {shown(twice)}; allowed: each key once")
        return found

    text = data.decode("utf-8-sig").lstrip(" \t\r\n")
    json.JSONDecoder(object_pairs_hook=checked).raw_decode(text)


def _has_lone_surrogate(value: dict[str, Any]) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _refuse_wrapped(file: Path, row: dict[str, Any] | None) -> None:
    """Raise DataError if the file's only object wraps a list of rows or a list per column."""
    values = row or {}
    objects = {key: value for key, value in values.items() if _is_list_of_objects(value)}
    if any("role" in item or "from" in item for items in objects.values() for item in items):
        return  # a chat
    if objects:
        key = next(iter(objects))
        raise DataError(f"{file}: a single object with the rows in {key!r}; {_FORMS}")
    lengths = {len(v) if isinstance(v, list | dict) else 0 for v in values.values()}
    if len(values) > 1 and len(lengths) == 1 and lengths != {0}:
        raise DataError(f"{file}: a single object with a list per column; {_FORMS}")


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)
