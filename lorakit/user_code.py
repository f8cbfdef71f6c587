"""Load a class or function from a user's Python file, named ``FILE.py:NAME``.

A file runs only if the user names it. Its failures become one-line errors with the file and line.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import lru_cache, wraps
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

from lorakit.errors import LorakitError, UserError, did_you_mean

_SUFFIX = ".py"
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_Base = TypeVar("_Base")


class Loaded(NamedTuple):
    """An attribute of a user's file; ``digest`` is the ``code_digest`` of the file."""

    value: Any
    file: Path
    digest: bytes


def is_code(spec: str) -> bool:
    """Whether ``spec`` names a Python file, with or without an attribute."""
    return spec.endswith(_SUFFIX) or f"{_SUFFIX}:" in spec


def code_identity(spec: str) -> tuple[str, str]:
    """The resolved file and the attribute of ``FILE.py:NAME``, the same for each way to write the
    path. A relative path is relative to the working directory."""
    stem, separator, attribute = spec.partition(f"{_SUFFIX}:")
    return str(Path(f"{stem}{_SUFFIX}" if separator else spec).resolve()), attribute


def load_attribute(spec: str, base: type = object) -> Loaded:
    """Run the file of ``FILE.py:NAME`` and return the attribute ``NAME``.

    A relative path is relative to the working directory. A file is run once for each version of
    its contents; what it prints goes to stderr. Raises UserError if the file is missing, fails, or
    has no such attribute; the message lists what the file defines, of the classes only subclasses
    of ``base``.
    """
    stem, separator, attribute = spec.partition(f"{_SUFFIX}:")
    file = Path(f"{stem}{_SUFFIX}" if separator else spec)
    source = _read(file)
    module = _module(file.resolve(), hashlib.sha256(source).digest(), source, str(file))
    defined = [key for key, value in vars(module).items() if _is_defined_in(module, value, base)]
    allowed = ", ".join(defined) or f"a subclass of {base.__module__}.{base.__qualname__}"
    if not attribute:
        choices = ", ".join(f"{spec}:{name}" for name in defined) or f"{spec}:NAME, {allowed}"
        raise UserError(f"{spec}: a class or function is missing; allowed: {choices}")
    if not hasattr(module, attribute):
        message = did_you_mean(f"{spec}: the file has no {attribute!r}", attribute, defined)
        raise UserError(f"{message}; allowed: {allowed}")
    return Loaded(getattr(module, attribute), file, code_digest(source))


def code_digest(source: bytes) -> bytes:
    """A hash of Python source that ignores comments, docstrings and formatting."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, _Documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).digest()


def load_class(spec: str, base: type[_Base]) -> type[_Base]:
    """The class that ``FILE.py:NAME`` names. Raises UserError as ``load_attribute`` does, and for
    anything but a concrete subclass of ``base``."""
    found = load_attribute(spec, base).value
    if not (isinstance(found, type) and issubclass(found, base)):
        allowed = f"a subclass of {base.__module__}.{base.__qualname__}"
        raise UserError(f"{spec}: is {_kind(found)}; allowed: {allowed}")
    check_concrete(spec, found)
    return found


def check_concrete(spec: str, found: type) -> None:
    """Raise UserError if the class lacks methods that its base declares abstract."""
    if inspect.isabstract(found):
        missing = ", ".join(sorted(getattr(found, "__abstractmethods__")))  # noqa: B009
        raise UserError(f"{spec}: missing methods: {missing}; allowed: a class that defines them")


def guarded(
    function: Callable[..., Any], file: Path, error_type: type[UserError] = UserError
) -> Callable[..., Any]:
    """Wrap ``function`` so that an exception raised in ``file`` becomes an ``error_type`` that
    names the file and line."""

    @wraps(function)
    def call(*arguments: Any, **keys: Any) -> Any:
        try:
            return function(*arguments, **keys)
        except LorakitError:
            raise
        except (Exception, SystemExit) as error:
            line = _line(error, file.resolve())
            if line is None or _is_termination(error):
                raise
            raise error_type(f"{file}:{line}: {_summary(error)}") from error

    return call


def locate_error(error: BaseException) -> str | None:
    """Describe an error that a user's file raised: ``FILE:LINE: TYPE: MESSAGE``. None if the
    traceback has no line of such a file."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename in _run_files:
            return f"{_run_files[frame.filename]}:{frame.lineno}: {_summary(error)}"
    return None


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _is_defined_in(module: ModuleType, value: Any, base: type) -> bool:
    """Whether the module defines ``value``: a subclass of ``base``, an instance of one, or if
    ``base`` is object, any class or function."""
    if getattr(value, "__module__", None) != module.__name__:
        return False
    if base is object:
        return hasattr(value, "__name__")
    return isinstance(value, base) or (isinstance(value, type) and issubclass(value, base))


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        hint = "" if file.is_absolute() else f" (the path is relative to {Path.cwd()})"
        raise UserError(f"{file}: no such file{hint}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{file}: cannot be read: {reason}") from None


#: Resolved path of a user's file -> the path by which it was named.
_run_files: dict[str, str] = {}


@lru_cache(maxsize=32)
def _module(path: Path, digest: bytes, source: bytes, shown: str) -> ModuleType:
    """Compile the file instead of importing it, so that no stale bytecode is ever used."""
    name = f"lorakit_user_{hashlib.sha256(bytes(path) + digest).hexdigest()[:16]}"
    module = ModuleType(name)
    module.__file__ = str(path)
    _run_files[str(path)] = shown
    sys.modules[name] = module  # pydantic resolves the annotations of a class through it
    try:
        with redirect_stdout(sys.stderr):
            exec(compile(source, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if _is_termination(error):
            raise
        line = _line(error, path)
        where = shown if line is None else f"{shown}:{line}"
        raise UserError(f"{where}: {_summary(error)}") from error
    return module


def _is_termination(error: BaseException) -> bool:
    """Whether SIGTERM, rather than the file, raised the error."""
    return isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM


def _line(error: BaseException, path: Path) -> int | None:
    """The innermost line of the file in the traceback; None if the file is not in it."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == str(path)), None)


def _summary(error: BaseException) -> str:
    text = str(error.msg if isinstance(error, SyntaxError) else error).strip()
    first = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
