"""Python of a user's own: ``./my_task.py:MyTask``, run when a recipe names it and only then."""

from __future__ import annotations

import hashlib
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import lru_cache, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from lorakit.errors import DataError, LorakitError
from lorakit.recipe.diagnostics import did_you_mean

_SUFFIX = ".py"


def is_code(name: str) -> bool:
    """Whether ``name`` is that of a Python file, with or without what is meant in it."""
    return name.endswith(_SUFFIX) or f"{_SUFFIX}:" in name


def load_attribute(name: str) -> tuple[Any, Path, bytes]:
    """What ``FILE.py:NAME`` names, its file and a hash of that file.

    A relative path stands from the working directory. What the file prints while it runs goes to
    stderr. Raises DataError in one line for a file that is not there or does not run, and for a
    name that it does not have.
    """
    stem, found, attribute = name.partition(f"{_SUFFIX}:")
    file = Path(f"{stem}{_SUFFIX}" if found else name)
    source = _read(file)
    digest = hashlib.sha256(source).digest()
    module = _module(file.resolve(), digest, source, str(file))
    own = [key for key, value in vars(module).items() if _defined_in(module, value)]
    if not attribute:
        raise DataError(f"{name}: names no class or function; allowed: {_choices(file, own)}")
    if not hasattr(module, attribute):
        message = did_you_mean(f"{file}: has no {attribute!r}", attribute, own)
        raise DataError(f"{message}; allowed: {_choices(file, own)}")
    return getattr(module, attribute), file, digest


def guarded(function: Callable[..., Any], file: Path) -> Callable[..., Any]:
    """``function``, whose failures inside ``file`` are DataErrors that name file and line."""

    @wraps(function)
    def call(*arguments: Any, **keys: Any) -> Any:
        try:
            return function(*arguments, **keys)
        except LorakitError:
            raise
        except (Exception, SystemExit) as error:
            line = _line(error, file.resolve())
            stopped = isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM
            if line is None or stopped:
                raise
            raise DataError(f"{file}:{line}: {_words(error)}") from error

    return call


def _choices(file: Path, own: list[str]) -> str:
    return ", ".join(f"{file}:{name}" for name in own) or f"{file}:NAME"


def _defined_in(module: ModuleType, value: Any) -> bool:
    return getattr(value, "__module__", None) == module.__name__ and hasattr(value, "__name__")


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{file}: no such file (a relative path stands from {Path.cwd()})"
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"{file}: cannot be read: {reason}") from None


@lru_cache(maxsize=32)
def _module(path: Path, digest: bytes, source: bytes, shown: str) -> ModuleType:
    """Compiled here and not imported: no byte code is left beside the file, and none is stale."""
    name = f"lorakit_own_{hashlib.sha256(bytes(path) + digest).hexdigest()[:16]}"
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # where pydantic looks up the types of a class's annotations
    try:
        with redirect_stdout(sys.stderr):
            exec(compile(source, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        line = _line(error, path)
        where = shown if line is None else f"{shown}:{line}"
        raise DataError(f"{where}: {_words(error)}") from error
    return module


def _line(error: BaseException, path: Path) -> int | None:
    """The last line of the file that the failure went through; None if it did not."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == str(path)), None)


def _words(error: BaseException) -> str:
    text = str(error.msg if isinstance(error, SyntaxError) else error).strip()
    first = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
