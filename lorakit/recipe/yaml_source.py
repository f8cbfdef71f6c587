"""Plain scalars as YAML 1.2's core schema reads them: ``2e-4`` is a number, ``no`` is a text.

YAML -> plain data and the line of each key. Nothing is ever constructed: tags are refused.

PyYAML gives the events; this module makes lists, texts and mappings with text keys of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.reader import ReaderError

from lorakit.errors import Problem, RecipeError

Scalar = str | int | float | bool | None

_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEANS = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
#: Longer ones cannot be meant, and Python refuses to convert them.
_MAX_DIGITS = 400
_INTEGER = re.compile(rf"[-+]?[0-9]{{1,{_MAX_DIGITS}}}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"[-+]?\.(inf|Inf|INF)")
_NANS = frozenset({".nan", ".NaN", ".NAN"})


def read_scalar(text: str) -> Scalar:
    """The value of an unquoted scalar.

    Integers are decimal only (``0x1F`` stays a text); of the booleans only ``true`` and ``false``
    count (``yes``, ``no``, ``on``, ``off`` stay texts).
    Source: YAML 1.2.2, section 10.3, the core schema without octal and hexadecimal integers.
    """
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) and len(text) <= _MAX_DIGITS:
        return float(text)
    if _INFINITY.fullmatch(text) or text in _NANS:
        return float(text.replace(".", ""))
    return text


KeyPath = tuple[str | int, ...]

MAX_BYTES = 256 * 1024
#: Nodes after the aliases are expanded; a recipe has about a hundred.
MAX_NODES = 10_000
MAX_DEPTH = 32


@dataclass
class Source:
    """A file's contents.

    ``lines`` counts from 1; ``quoted`` are the scalars in quotes, which stay texts;
    ``overridden`` is what ``--set`` gave in place of the file; ``problems`` are the faults that
    leave the rest readable.
    """

    file: str
    data: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)
    quoted: frozenset[KeyPath] = frozenset()
    overridden: set[KeyPath] = field(default_factory=set)
    problems: tuple[Problem, ...] = ()


def dotted(path: KeyPath) -> str:
    """``("adapter", "target_modules", 0)`` -> ``adapter.target_modules[0]``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if part.isprintable() else ascii(part)
            text += f".{name}" if text else name
    return text


def read_yaml(file: Path) -> Source:
    """The mapping that ``file`` holds.

    Raises RecipeError if the file is missing, unreadable, too large, not UTF-8, empty, not a
    mapping, or not YAML, or if it holds an alias of itself or aliases that expand without measure.
    """
    name = str(file)
    text = _read_text(file)
    builder = _Builder(name)
    root = builder.document(text)
    if root is None or root.value is None:
        raise _whole(name, "the file is empty", "a mapping of keys to values")
    if not isinstance(root.value, dict):
        raise _whole(name, "the file is not a mapping", "KEY: VALUE, each on a line")
    data, lines, quoted = builder.expand(root)
    return Source(name, data, lines, quoted, problems=tuple(builder.problems))


def read_value(text: str, file: str) -> Any:
    """One YAML value, as after ``--set key=``. Raises RecipeError as ``read_yaml`` does."""
    builder = _Builder(file)
    root = builder.document(text)
    if builder.problems:
        raise RecipeError(builder.problems)
    return None if root is None else builder.expand(root)[0]


def _whole(
    file: str, message: str, allowed: str | None = None, line: int | None = None
) -> RecipeError:
    return RecipeError([Problem("", message, allowed=allowed, file=file, line=line)])


def _read_text(file: Path) -> str:
    try:
        with file.open("rb") as handle:
            data = handle.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise _whole(str(file), "no such file") from None
    except IsADirectoryError:
        raise _whole(str(file), "is a directory", "a recipe file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise _whole(str(file), f"cannot be read: {reason}") from None
    if len(data) > MAX_BYTES:
        raise _whole(str(file), "the file is too large", f"at most {MAX_BYTES} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{data[error.start]:02x}"
        raise _whole(str(file), f"{byte} is not UTF-8", "UTF-8 text", line) from None


@dataclass
class _Node:
    value: Scalar | list[_Node] | dict[str, tuple[int, _Node]]
    line: int
    quoted: bool = False


class _Builder:
    """Events -> nodes -> plain data; ``problems`` collects what need not stop the reading."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self.anchors: dict[str, _Node | None] = {}
        self.count = 0

    def document(self, text: str) -> _Node | None:
        """The only document's root; None if there is none."""
        try:
            events: Iterator[Any] = yaml.parse(text, Loader=yaml.SafeLoader)
            root = None
            for event in events:
                if isinstance(event, yaml.DocumentStartEvent):
                    if root is not None:
                        raise self._stop("a second document begins", event, "one document")
                    root = self._node(next(events), events, 0)
            return root
        except yaml.YAMLError as error:
            raise _whole(self.file, *_syntax(error, text)) from None

    def _node(self, event: Any, events: Iterator[Any], depth: int) -> _Node:
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        self._count(event)
        if depth > MAX_DEPTH:
            raise self._stop("nested too deeply", event, f"at most {MAX_DEPTH} levels")
        if event.tag is not None:
            self._add(f"the tag {event.tag!r} is refused", event, "plain values without tags")
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        line = event.start_mark.line + 1
        node = _Node(None, line)
        if isinstance(event, yaml.ScalarEvent):
            node.quoted = event.style is not None
            node.value = event.value if node.quoted else read_scalar(event.value)
        elif isinstance(event, yaml.SequenceStartEvent):
            node.value = self._sequence(events, depth)
        else:
            node.value = self._mapping(events, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def _alias(self, event: Any) -> _Node:
        if event.anchor not in self.anchors:
            raise self._stop(f"no anchor &{event.anchor} stands before *{event.anchor}", event)
        node = self.anchors[event.anchor]
        if node is None:
            raise self._stop(f"the alias *{event.anchor} holds itself", event)
        return node

    def _sequence(self, events: Iterator[Any], depth: int) -> list[_Node]:
        items = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            items.append(self._node(event, events, depth + 1))
        return items

    def _mapping(self, events: Iterator[Any], depth: int) -> dict[str, tuple[int, _Node]]:
        items: dict[str, tuple[int, _Node]] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            line = event.start_mark.line + 1
            if not isinstance(event, yaml.ScalarEvent):
                raise self._stop("a key is not a single value", event, "text keys")
            if event.tag is not None:
                self._add(f"the tag {event.tag!r} is refused", event, "plain keys without tags")
            node = self._node(next(events), events, depth + 1)
            if event.value in items:
                first = items[event.value][0]
                key = dotted((event.value,))
                self._add(f"the key {key!r} stands twice, first in line {first}", event, "once")
            else:
                items[event.value] = (line, node)
        return items

    def expand(self, root: _Node) -> tuple[Any, dict[KeyPath, int], frozenset[KeyPath]]:
        """Plain data with the aliases written out, the lines and the quoted scalars."""
        lines: dict[KeyPath, int] = {}
        quoted: set[KeyPath] = set()
        self.count = 0

        def plain(node: _Node, path: KeyPath, line: int) -> Any:
            self._count(None)
            lines[path] = line
            if isinstance(node.value, dict):
                return {k: plain(v, (*path, k), at) for k, (at, v) in node.value.items()}
            if isinstance(node.value, list):
                return [plain(item, (*path, i), item.line) for i, item in enumerate(node.value)]
            if node.quoted:
                quoted.add(path)
            return node.value

        return plain(root, (), root.line), lines, frozenset(quoted)

    def _count(self, event: Any) -> None:
        self.count += 1
        if self.count > MAX_NODES:
            allowed = f"at most {MAX_NODES} values, those of aliases included"
            raise self._stop("the file holds too many values", event, allowed)

    def _stop(self, message: str, event: Any, allowed: str | None = None) -> RecipeError:
        line = None if event is None else event.start_mark.line + 1
        return _whole(self.file, message, allowed, line)

    def _add(self, message: str, event: Any, allowed: str) -> None:
        self.problems.extend(self._stop(message, event, allowed).problems)


def _syntax(error: yaml.YAMLError, text: str) -> tuple[str, str | None, int | None]:
    """Message, what is allowed, line."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        reason = " ".join(part for part in (error.context, error.problem) if part)
        allowed = "spaces to indent, not tabs" if "\\t" in reason else None
        return f"not YAML: {reason}", allowed, None if mark is None else mark.line + 1
    if isinstance(error, ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"not YAML: the character U+{int(error.character):04X}", "printable text", line
    return f"not YAML: {error}", None, None
