"""Notices that the output directory of a run is no longer its own: deleted, renamed or taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorakit.distributed.group import ConnectionLost
from lorakit.errors import TrainingError, WriteFailed
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
def naming_checkpoints(output_dir: Path) -> Iterator[None]:
    """Let errors of a file that cannot be written, and of a process that was killed, name the last
    checkpoint and say how to resume."""
    try:
        yield
    except WriteFailed as error:
        good, then = _last_good(output_dir)
        raise TrainingError(f"{error.problem}; {good}; {error.hint}, then {then}") from error
    except ConnectionLost as error:
        raise ConnectionLost("; ".join(_last_good(output_dir))) from error


def _last_good(output_dir: Path) -> tuple[str, str]:
    if left := checkpoints(output_dir / "checkpoints"):
        return f"last good checkpoint: {left[-1]}", "resume with --resume auto"
    return "no checkpoint was written yet", "start the run again"
