"""Notices that the output directory of a run is no longer its own: deleted, renamed or taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lorakit.distributed.group import ConnectionLost
from lorakit.errors import LorakitError, TrainingError, WriteFailed
from lorakit.io.atomic import writing
from lorakit.training.checkpoint import checkpoints
from lorakit.training.run_json import read_record


class OutputTaken(TrainingError):
    """Another run has started in the output directory, or another directory has replaced it."""


class Guard:
    """Watches ``output_dir``, whose run.json names ``process``, from now on.

    A lock keeps two runs apart, but not every file system has locks for all hosts.
    """

    def __init__(self, output_dir: Path, process: str) -> None:
        self._output_dir, self._process = output_dir, process
        with writing(output_dir):
            self._identity = self._stat()

    def check(self) -> bool:
        """Whether the directory is still there. Raises OutputTaken if it is not this run's."""
        try:
            identity = self._stat()
        except FileNotFoundError:
            return False
        except OSError:  # the write that follows says what is wrong
            return True
        if identity != self._identity:
            raise OutputTaken(
                f"{self._output_dir} was replaced by another directory during the run; nothing is "
                "written to the new one; move the original back, then resume with --resume auto"
            )
        if (other := self._writer()) != self._process:
            host, pid, *_ = other.split(":")
            raise OutputTaken(
                f"{self._output_dir}: another run (process {pid} on {host}) has started in this "
                "directory; stopping this one"
            )
        return True

    def _stat(self) -> tuple[int, int]:
        found = self._output_dir.stat()
        return found.st_dev, found.st_ino

    def _writer(self) -> str:
        found = read_record(self._output_dir).get("process")
        return found if isinstance(found, str) and found.count(":") >= 2 else self._process


@contextmanager
def naming_checkpoints(output_dir: Path, replaces: bool = False) -> Iterator[None]:
    """Let errors of a file that cannot be written, of a process that was killed, and unexpected
    ones name the last checkpoint and say how to resume. If the run ``replaces`` an earlier one, the
    checkpoints that are there do not count: after an error, they may be back."""
    folder = output_dir / "checkpoints"
    earlier = _identities(checkpoints(folder)) if replaces else set()

    def last_good() -> tuple[str, str]:
        found = checkpoints(folder)
        if earlier & _identities(found):
            return "no checkpoint was written yet, and the earlier run is back", "start again"
        return advice_after_failure(output_dir)

    try:
        yield
    except WriteFailed as error:
        good, then = last_good()
        raise TrainingError(f"{error.problem}; {good}; {error.hint}, then {then}") from error
    except ConnectionLost as error:
        raise ConnectionLost("; ".join(last_good())) from error
    except LorakitError:
        raise
    except Exception as error:
        if checkpoints(folder) and hasattr(error, "add_note"):  # from Python 3.11 on
            error.add_note("; ".join(last_good()))
        raise


def advice_after_failure(output_dir: Path) -> tuple[str, str]:
    """The last good checkpoint of the run, and what to do once the cause is removed."""
    if left := checkpoints(output_dir / "checkpoints"):
        return f"last good checkpoint: {left[-1]}", "resume with --resume auto"
    return "no checkpoint was written yet", "start the run again"


def _identities(folders: Sequence[Path]) -> set[tuple[int, int]]:
    """What stays the same if directories are renamed, as the main process may just do."""
    found = set()
    for folder in folders:
        with suppress(FileNotFoundError):
            stat = folder.stat()
            found.add((stat.st_dev, stat.st_ino))
    return found
