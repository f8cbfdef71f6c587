"""What a run reports: metrics.jsonl, progress on stderr, TensorBoard and W&B."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from rich.progress import BarColumn, TextColumn

from lorakit.errors import UserError, decimal, memory_size, printable
from lorakit.io.atomic import write_text, writing
from lorakit.notes import to_stderr
from lorakit.terminal.console import stderr_console
from lorakit.terminal.progress_bar import ProgressBar
from lorakit.terminal.progress_lines import progress_lines

#: The project's name in trackers, and the subdirectory that TensorBoard writes to.
PROJECT = "lorakit"
_NUMBERS = "{task.fields[numbers]}"
#: Columns of a terminal on which the bar has room for all numbers.
_WIDE = 80


class MetricsFile:
    """Appends lines to ``metrics.jsonl``. A resumed run keeps the first ``keep`` lines: those
    written before its checkpoint; not the rest of one that was cut off."""

    def __init__(self, path: Path, keep: int = 0) -> None:
        self._path = path
        self._handle = self._open(keep)

    def _open(self, keep: int) -> BinaryIO:
        with writing(self._path):
            is_there = self._path.is_file()
            text = self._path.read_text(encoding="utf-8", errors="replace") if is_there else ""
            kept = [line for line in text.splitlines(keepends=True) if line.endswith("\n")][:keep]
            self.lines = len(kept)
            write_text(self._path, "".join(kept))
            return self._path.open("ab", buffering=0)

    def truncate(self, keep: int) -> None:
        """Keep only the first ``keep`` lines."""
        self._handle.close()
        self._handle = self._open(keep)

    def write(self, line: dict[str, Any]) -> None:
        """Append a line; raises WriteFailed, with nothing of it written."""
        with writing(self._path):
            end = os.fstat(self._handle.fileno()).st_size
            data = json.dumps(line).encode() + b"\n"
            try:
                while data:
                    data = data[self._handle.write(data) :]
            except OSError:
                os.ftruncate(self._handle.fileno(), end)
                raise
        self.lines += 1

    def close(self) -> None:
        self._handle.close()


class NoMetrics(MetricsFile):
    """Counts lines that another process writes."""

    def __init__(self, keep: int = 0) -> None:
        self.lines = keep

    def truncate(self, keep: int) -> None:
        self.lines = keep

    def write(self, line: dict[str, Any]) -> None:
        self.lines += 1

    def close(self) -> None:
        """There is nothing to close."""


class Display:
    """A progress bar on a terminal, which disappears at the end, plain lines elsewhere; both on
    stderr. With ``quiet``, nothing is printed."""

    def __init__(self, total_steps: int, done: int = 0, quiet: bool = False) -> None:
        self._total, self._start, self._first = total_steps, time.monotonic(), done
        self._console = stderr_console()
        self._quiet = quiet
        self._bar: ProgressBar | None = None
        self._step, self._numbers = done, ""
        self._shown: dict[int, set[str]] = {}
        self._report_line = progress_lines(self.say)
        if self._console.is_terminal and not quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn(_NUMBERS))
            self._bar = ProgressBar(*columns)
            self._task = self._bar.add_task("", total=total_steps, numbers="")
            self.advance(done)
            self._bar.start()

    def begin(self) -> None:
        """The first step starts now."""
        self._start = time.monotonic()

    def advance(self, step: int) -> None:
        self._step = step
        if self._bar is not None:
            numbers = f"{self._numbers}  {self._left(step)}".strip()
            self._show(f"step {step}/{self._total}", step, self._total, numbers)

    def log(self, line: dict[str, Any]) -> None:
        """Show the numbers of a line of metrics.jsonl, or of the first step."""
        self._numbers = f"loss {decimal(line['loss'])}"
        if self._bar is None or self._console.width >= _WIDE:
            self._numbers += (
                f"  lr {line['learning_rate']:.2e}  {line['tokens_per_second']:,.0f} tok/s  "
                f"{memory_size(line['peak_memory_bytes'])}"
            )
        step = line["step"]
        if self._bar is not None:
            self.advance(step)
        else:
            self.say(f"step {step}/{self._total}  {self._numbers}  {self._left(step)}".rstrip())

    def evaluating(self, what: str, done: int, total: int) -> None:
        """Show the progress of an evaluation, in rows."""
        if self._bar is not None:
            self._show(f"evaluation {done}/{total}", done, total, what)
        else:
            self._report_line(f"evaluation: {what}", done, total)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Show the metrics that no earlier evaluation of this step has shown."""
        shown = self._shown.setdefault(step, set())
        if new := {name: value for name, value in metrics.items() if name not in shown}:
            self.say(f"step {step}  evaluation: {format_metrics(new)}")
        shown.update(new)
        self.advance(self._step)

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(printable(text), markup=False, highlight=False)
        elif not self._quiet:
            to_stderr(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _left(self, step: int) -> str:
        return time_left(self._start, self._first, step, self._total)

    def _show(self, what: str, done: int, total: int, numbers: str) -> None:
        assert self._bar is not None
        self._bar.update(self._task, description=what, completed=done, total=total, numbers=numbers)


def time_left(start: float, first: int, step: int, total: int) -> str:
    """The time that the remaining steps will take at the mean speed since ``start``, of the
    monotonic clock, and step ``first``; nothing after one step, which takes longer than others."""
    if not first + 1 < step < total:
        return ""
    spent = time.monotonic() - start
    return f"{_clock(spent / (step - first) * (total - step))} left"


class Recorder:
    """Passes each line on to metrics.jsonl, the display and the trackers."""

    def __init__(
        self, metrics: MetricsFile, display: Display, trackers: Sequence[GeneralTracker] = ()
    ) -> None:
        self._metrics, self.display, self._trackers = metrics, display, trackers
        self._last_step = 0

    @property
    def metrics_lines(self) -> int:
        return self._metrics.lines

    def truncate(self, lines: int) -> None:
        """Keep only the first lines of metrics.jsonl: those written before a checkpoint."""
        if lines < self._metrics.lines:
            self._metrics.truncate(lines)

    def log(self, line: dict[str, Any]) -> None:
        self._metrics.write(line)
        self.display.log(line)
        scalars = {key: v for key, v in line.items() if key not in ("step", "ranks")}
        self._track(scalars, line["step"])

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self._metrics.write({"step": step, "eval": metrics})
        self.display.evaluation(step, metrics)
        self._track({f"eval/{key}": value for key, value in metrics.items()}, step)

    def _track(self, values: dict[str, Any], step: int) -> None:
        """Trackers reject an earlier step, which the best model's final evaluation may have."""
        self._last_step = max(step, self._last_step)
        for tracker in self._trackers:
            with writing(tracker.name):
                tracker.log(values, step=self._last_step)

    def close(self) -> None:
        self.display.close()
        self._metrics.close()
        for tracker in self._trackers:
            with writing(tracker.name):
                tracker.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError for a tracker whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"train.trackers: {name!r} is not installed (pip install 'lorakit[trackers]')"
            )


def start_trackers(
    names: Sequence[str], output_dir: Path, config: dict[str, Any]
) -> list[GeneralTracker]:
    """Start the trackers and give them the run's ``config``.

    W&B reads its environment variables itself, except for WANDB_PROJECT, which an explicit project
    would override.
    """
    project = os.environ.get("WANDB_PROJECT") or PROJECT
    trackers: list[GeneralTracker] = [
        WandBTracker(project) if name == "wandb" else TensorBoardTracker(PROJECT, output_dir)
        for name in dict.fromkeys(names)
    ]
    for tracker in trackers:
        tracker.start()
        tracker.store_init_configuration(config)
    return trackers


def format_metrics(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {decimal(value)}" for name, value in metrics.items())


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
