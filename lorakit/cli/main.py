"""The command line: the list of commands, and how errors become exit codes."""

from __future__ import annotations

import atexit
import errno
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Annotated, Any

import typer
import typer.core

from lorakit.api import locate_error, yield_cores
from lorakit.cli.adapters import convert, merge
from lorakit.cli.console import echo
from lorakit.cli.doctor import doctor
from lorakit.cli.export import export
from lorakit.cli.generate import generate
from lorakit.cli.init import init
from lorakit.cli.inspect import inspect
from lorakit.cli.migration import convert_recipe
from lorakit.cli.plan import plan
from lorakit.cli.predict import predict
from lorakit.cli.preview import preview
from lorakit.cli.recipes import methods, schema, tasks, validate
from lorakit.cli.report import compare, report
from lorakit.cli.run import eval_, train
from lorakit.cli.sweep import sweep
from lorakit.errors import Interrupted, LorakitError, RecipeError, UserError, printable
from lorakit.version import __version__

_INTERRUPTED = 128 + signal.SIGINT
_TERMINATED = 128 + signal.SIGTERM
#: The class of typer's errors about the command line, which it does not export.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class _Command(typer.core.TyperCommand):
    """A command whose usage names arguments as other programs do."""

    def collect_usage_pieces(self, context: Any) -> list[str]:
        """Without the braces around required arguments, and without hidden ones."""
        arguments = [p for p in self.get_params(context) if not getattr(p, "hidden", False)]
        pieces = [piece for each in arguments for piece in each.get_usage_pieces(context)]
        return ["[OPTIONS]", *(piece.replace("{", "").replace("}", "") for piece in pieces)]


app = typer.Typer(
    name="lorakit",
    help="Train, evaluate and merge low-rank adapters from one recipe.",
    epilog="Example: lorakit validate recipes/quickstart.yaml",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)

# A command imports lorakit.api inside its function, so that `--help` loads no library.
for command in (
    init,
    train,
    plan,
    sweep,
    merge,
    eval_,
    generate,
    predict,
    convert,
    export,
    inspect,
    preview,
    report,
    compare,
    validate,
    convert_recipe,
    schema,
    methods,
    tasks,
    doctor,
):
    app.command(command.__name__.rstrip("_").replace("_", "-"), cls=_Command)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        echo(f"lorakit {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: that of the process) and return its exit code.

    0: done; 2: invalid input; 1: failure; 130 and 143: stopped by SIGINT or SIGTERM.
    """
    # On some CPUs, importing bitsandbytes (PEFT does) warns of kernels that nothing here uses.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        with _unwind_on_sigterm(), yield_cores():
            given = None if arguments is None else list(arguments)
            return _exit_code(app(args=given, prog_name="lorakit", standalone_mode=False))
    except SystemExit as end:
        return _exit_code(end.code)
    except KeyboardInterrupt as error:
        _Interrupt.last = error
        return _exit_code(_INTERRUPTED)
    except Exception as error:
        return _report(error)


class _Interrupt:
    """Keeps the KeyboardInterrupt of an interrupted import alive, since some libraries crash when
    its frames are freed."""

    last: KeyboardInterrupt | None = None


def _report(error: Exception) -> int:
    """Print an error, and return its exit code."""
    if isinstance(error, Interrupted):
        _say(f"{error.problem}\n{error.advice}")
        return error.exit_code
    if _was_interrupted(error):
        return _exit_code(_INTERRUPTED)
    if isinstance(error, _UsageError):
        _say_once(f"error: {_usage(error)}")
        return UserError.exit_code
    if isinstance(error, LorakitError):
        messages = error.problems if isinstance(error, RecipeError) else (error,)
        _say("\n".join(f"error: {message}" for message in messages))
        return error.exit_code
    if (
        isinstance(error, OSError) and error.errno == errno.ENOSPC
    ):  # what typer prints, such as --help
        _say(f"error: cannot write: {error.strerror}; hint: free some space or write elsewhere")
        return 1
    # A bug: print one line, and save the traceback to a file.
    if os.environ.get("LORAKIT_TRACEBACK"):
        raise error
    _say(f"error: {_log_traceback(error)}")
    return 1


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether the error was caused by Ctrl-C, for example during a library's import."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _exit_code(code: object) -> int:
    if code in (_INTERRUPTED, _TERMINATED):  # typer converts Ctrl-C to the first
        _say_once("interrupted" if code == _INTERRUPTED else "terminated")
    return code if isinstance(code, int) else int(code is not None)


def _say_once(text: str) -> None:
    """Print what all processes of a launcher find, in the main one."""
    from lorakit.api import is_main

    if is_main():
        _say(text)


def _say(text: str) -> None:
    """Print a line to stderr, which may be a file on a full disk."""
    with suppress(OSError):
        typer.echo(printable(text), err=True)


def _usage(error: Any) -> str:
    """Describe a wrong option or argument in one line, in the form of lorakit's own errors."""
    text = re.sub(r"\.? Did you mean (.+)\?$", r" (did you mean \1?)", error.format_message())
    text = text.rstrip(".")
    path = error.ctx.command_path if error.ctx else "lorakit"
    return f"{text[:1].lower()}{text[1:]}; hint: {path} --help"


@contextmanager
def _unwind_on_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that temporary files are deleted.

    Training installs its own handler, which saves a checkpoint.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(_TERMINATED)


def _log_traceback(error: Exception) -> str:
    first = [type(error).__name__, *str(error).strip().splitlines()[:1]]
    notes = [note for note in getattr(error, "__notes__", ()) if "\n" not in note]
    reason = "; ".join([locate_error(error) or ": ".join(first), *notes])
    try:
        handle, name = tempfile.mkstemp(prefix="lorakit-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as log:
            log.write("".join(traceback.format_exception(error)))
    except OSError:
        return reason
    return f"{reason}; the traceback is in {name}"


def main() -> None:
    """Run the command line of the process, and exit."""
    code = run()
    is_interrupted = code in (_INTERRUPTED, _TERMINATED)
    if not is_interrupted and not _shares_work():
        sys.exit(code)
    # At the regular exit, libraries crash whose import was interrupted, and sometimes those whose
    # threads have exchanged tensors with other processes.
    if not is_interrupted:
        atexit._run_exitfuncs()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _shares_work() -> bool:
    """Whether this is one of several processes, and has worked with them."""
    return "torch.distributed" in sys.modules and os.environ.get("WORLD_SIZE", "1") != "1"
