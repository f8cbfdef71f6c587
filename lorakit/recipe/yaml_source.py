"""Read YAML into plain data, and remember the line of each key.

PyYAML supplies the parse events only: nothing is constructed, and tags are rejected. Scalars
follow YAML 1.2's core schema, in which ``2e-4`` is a number and ``no`` is text.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.reader import ReaderError

from lorakit.errors import Problem, RecipeError

Scalar = str | int | float | bool | None
#: Mapping keys and list indices from the top of a file to a value.
KeyPath = tuple[str | int, ...]

MAX_BYTES = 256 * 1024
#: Nodes after alias expansion; a recipe has about a hundred.
MAX_NODES = 10_000
MAX_DEPTH = 32

_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEANS = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
#: No key takes a longer number, and Python limits the conversion of long integers.
_MAX_DIGITS = 400
_INTEGER = re.compile(rf"[-+]?[0-9]{{1,{_MAX_DIGITS}}}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"[-+]?\.(inf|Inf|INF)")
_NANS = frozenset({".nan", ".NaN", ".NAN"})


@dataclass
class YamlFile:
    """The data of a YAML file, and where each value comes from.

    ``lines`` are 1-based line numbers. ``quoted`` are the paths of quoted scalars, which are always
    text. ``overridden`` are the paths replaced by ``--set``. ``problems`` were found while reading
    and left the rest of the file readable.
    """

    file: str
    data: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)
    quoted: frozenset[KeyPath] = frozenset()
    overridden: set[KeyPath] = field(default_factory=set)
    problems: tuple[Problem, ...] = ()


def read_yaml(file: Path) -> YamlFile:
    """Read a file that contains one mapping.

    Raises RecipeError if the file is missing, unreadable, too large, not UTF-8, empty, not a
    mapping or not YAML, or if an alias refers to itself or expands to too many values.
    """
    name = str(file)
    parser = _Parser(name)
    root = parser.parse(_read_text(file))
    if root is None or root.value is None:
        raise _file_error(name, "the file is empty", "a mapping of keys to values")
    if not isinstance(root.value, dict):
        raise _file_error(name, "the file is not a mapping", "KEY: VALUE, one per line")
    data, lines, quoted = parser.expand(root)
    return YamlFile(name, data, lines, quoted, problems=tuple(parser.problems))


def read_value(text: str, file: str) -> Any:
    """Parse one YAML value, such as that of ``--set KEY=VALUE``; ``file`` is named in errors.

    Raises RecipeError as ``read_yaml`` does.
    """
    parser = _Parser(file)
    root = parser.parse(text)
    if parser.problems:
        raise RecipeError(parser.problems)
    return None if root is None else parser.expand(root)[0]


def read_scalar(text: str) -> Scalar:
    """Convert an unquoted scalar.

    Integers are decimal only (``0x1F`` is text), and only ``true`` and ``false`` are booleans
    (``yes``, ``no``, ``on`` and ``off`` are text).
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


def dotted(path: KeyPath) -> str:
    """Format a path for messages: ``adapter.target_modules[0]``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if part.isprintable() else ascii(part)
            text += f".{name}" if text else name
    return text


def _file_error(
    file: str, message: str, allowed: str | None = None, line: int | None = None
) -> RecipeError:
    return RecipeError([Problem("", message, allowed=allowed, file=file, line=line)])


#: Where a shell puts stdin and process substitutions.
_DESCRIPTORS = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")


def _is_stream(file: Path) -> bool:
    """Whether reading the file could wait for ever."""
    mode = file.stat().st_mode
    is_file = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
    return not is_file and not str(file).startswith(_DESCRIPTORS)


def _read_text(file: Path) -> str:
    try:
        if is_stream := _is_stream(file):
            data = b""
        else:
            with file.open("rb") as handle:
                data = handle.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise _file_error(str(file), "no such file") from None
    except IsADirectoryError:
        raise _file_error(str(file), "is a directory", "a recipe file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise _file_error(str(file), f"cannot be read: {reason}") from None
    if is_stream:
        raise _file_error(str(file), "is a device or a pipe", "a recipe file")
    if len(data) > MAX_BYTES:
        raise _file_error(str(file), "the file is too large", f"at most {MAX_BYTES} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{data[error.start]:02x}"
        raise _file_error(str(file), f"{byte} is not UTF-8", "UTF-8 text", line) from None


@dataclass
class _Node:
    value: Scalar | list[_Node] | dict[str, tuple[int, _Node]]
    line: int
    quoted: bool = False


class _Parser:
    """Builds nodes from parse events, and plain data from nodes.

    ``problems`` collects the errors after which parsing can continue.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self.anchors: dict[str, _Node | None] = {}
        self.count = 0

    def parse(self, text: str) -> _Node | None:
        """Return the root of the only document, or None if there is no document."""
        try:
            events: Iterator[Any] = yaml.parse(text, Loader=yaml.SafeLoader)
            root = None
            for event in events:
                if isinstance(event, yaml.DocumentStartEvent):
                    if root is not None:
                        raise self._error("a second document starts here", event, "one document")
                    root = self._node(next(events), events, 0)
            return root
        except yaml.YAMLError as error:
            raise _file_error(self.file, *_syntax_error(error, text)) from None

    def _node(self, event: Any, events: Iterator[Any], depth: int) -> _Node:
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        self._count_node(event)
        if depth > MAX_DEPTH:
            raise self._error("nested too deeply", event, f"at most {MAX_DEPTH} levels")
        if event.tag is not None:
            self._add(f"tag {event.tag!r} is not supported", event, "values without tags")
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        node = _Node(None, event.start_mark.line + 1)
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
            raise self._error(f"alias *{event.anchor} has no anchor &{event.anchor}", event)
        node = self.anchors[event.anchor]
        if node is None:
            raise self._error(f"alias *{event.anchor} refers to itself", event)
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
                raise self._error("the key is a list or a mapping", event, "text keys")
            if event.tag is not None:
                self._add(f"tag {event.tag!r} is not supported", event, "keys without tags")
            node = self._node(next(events), events, depth + 1)
            if event.value in items:
                first = items[event.value][0]
                key = dotted((event.value,))
                self._add(f"duplicate key {key!r}, first set on line {first}", event, "one of them")
            else:
                items[event.value] = (line, node)
        return items

    def expand(self, root: _Node) -> tuple[Any, dict[KeyPath, int], frozenset[KeyPath]]:
        """Return plain data with aliases expanded, the lines, and the quoted scalars."""
        lines: dict[KeyPath, int] = {}
        quoted: set[KeyPath] = set()
        self.count = 0

        def plain(node: _Node, path: KeyPath, line: int) -> Any:
            self._count_node(None)
            lines[path] = line
            if isinstance(node.value, dict):
                return {k: plain(v, (*path, k), at) for k, (at, v) in node.value.items()}
            if isinstance(node.value, list):
                return [plain(item, (*path, i), item.line) for i, item in enumerate(node.value)]
            if node.quoted:
                quoted.add(path)
            return node.value

        return plain(root, (), root.line), lines, frozenset(quoted)

    def _count_node(self, event: Any) -> None:
        self.count += 1
        if self.count > MAX_NODES:
            allowed = f"at most {MAX_NODES} values after alias expansion"
            raise self._error("too many values", event, allowed)

    def _error(self, message: str, event: Any, allowed: str | None = None) -> RecipeError:
        line = None if event is None else event.start_mark.line + 1
        return _file_error(self.file, message, allowed, line)

    def _add(self, message: str, event: Any, allowed: str) -> None:
        self.problems.extend(self._error(message, event, allowed).problems)


def _syntax_error(error: yaml.YAMLError, text: str) -> tuple[str, str | None, int | None]:
    """Return the message, what is allowed, and the line."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        reason = " ".join(part for part in (error.context, error.problem) if part)
        allowed = "spaces for indentation, not tabs" if "\\t" in reason else None
        return f"not valid YAML: {reason}", allowed, None if mark is None else mark.line + 1
    if isinstance(error, ReaderError):
        line = text.count("\n", 0, error.position) + 1
        character = f"U+{int(error.character):04X}"
        return f"not valid YAML: character {character}", "printable characters", line
    return f"not valid YAML: {error}", None, None
