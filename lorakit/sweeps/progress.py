"""What a sweep shows on stderr while it runs: a live table on a terminal, else plain lines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.live import Live
from rich.table import Column, Table

from lorakit.errors import decimal, printable
from lorakit.notes import to_stderr
from lorakit.sweeps.halving import Halving
from lorakit.sweeps.results import MemberResult, SweepResult
from lorakit.terminal.console import stderr_console
from lorakit.terminal.progress_lines import progress_lines
from lorakit.training.control import announcing_stops
from lorakit.training.tracking import Display, format_metrics, time_left

_SECONDS_PER_LINE = 30.0
#: Lines of the terminal that are not for members: the table's head and rules, and a caption of up
#: to three lines; columns that are not for their names. Narrower terminals get plain lines.
_MARGIN, _NUMBERS_WIDTH, _LEAST_WIDTH = 8, 52, 70
#: Of these lines of metrics.jsonl, one has a loss, and mostly one an evaluation.
_LINES_READ = 20


class MemberDisplay(Display):
    """The progress of one member, as the sweep's table shows it."""

    def __init__(self, progress: SweepProgress, name: str, total_steps: int, done: int = 0) -> None:
        self._progress, self._name = progress, name
        self.total_steps, self.step, self._first = total_steps, done, done
        self.numbers: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}
        self._start = self._last = time.monotonic()

    def begin(self) -> None:
        """The first step starts now."""
        self._start = time.monotonic()

    def advance(self, step: int) -> None:
        self.step = step
        self._progress.on_tick()
        if time.monotonic() - self._last >= _SECONDS_PER_LINE and not self._progress.is_live:
            self._last = time.monotonic()
            parts = [f"step {step}/{self.total_steps}", self.loss, self.speed, self.left]
            self.say("  ".join(filter(None, parts)))

    def log(self, line: dict[str, Any]) -> None:
        self.numbers = line

    def evaluating(self, what: str, done: int, total: int) -> None:
        self._progress.evaluating(f"{self._name}: evaluation: {what}", done, total)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self.metrics = metrics
        if self._progress.halving is not None:
            self._progress.halving.evaluated(self._name, step, metrics)

    @property
    def loss(self) -> str:
        return f"loss {decimal(self.numbers['loss'])}" if self.numbers else ""

    @property
    def speed(self) -> str:
        return f"{self.numbers['tokens_per_second']:,.0f} tok/s" if self.numbers else ""

    @property
    def left(self) -> str:
        """The time that the member's other steps will take."""
        return time_left(self._start, self._first, self.step, self.total_steps)

    def say(self, text: str) -> None:
        self._progress.say(f"{self._name}: {text}")

    def close(self) -> None:
        """The table remains."""


class FollowedRun(MemberDisplay):
    """The progress of a member that another process trains, read from its ``metrics.jsonl``."""

    def __init__(self, progress: SweepProgress, name: str, folder: Path) -> None:
        super().__init__(progress, name, 0)
        self._file = folder / "metrics.jsonl"

    def read(self) -> None:
        """Read the newest lines."""
        with suppress(OSError, ValueError):
            for text in self._file.read_text(encoding="utf-8").splitlines()[-_LINES_READ:]:
                line = json.loads(text)
                self.step = line["step"]
                if "eval" in line:
                    self.metrics = line["eval"]
                else:
                    self.numbers = line


class SweepProgress:
    """Shows the members of ``result`` while they run, and tells ``halving`` how they are doing."""

    def __init__(self, result: SweepResult, halving: Halving | None = None) -> None:
        self._result, self.halving = result, halving
        self._running: dict[str, MemberDisplay | None] = {}
        self._said: set[str] = set()
        self._report = progress_lines(self.say, _SECONDS_PER_LINE)
        #: Called when a member that this process trains has made progress.
        self.on_tick: Callable[[], None] = lambda: None
        self._ended: list[MemberResult] = []
        self._console = stderr_console()
        self._live: Live | None = None
        self._contexts = ExitStack()
        self._stopping = ""
        if self._console.is_terminal and self._console.width >= _LEAST_WIDTH:
            self._live = Live(
                get_renderable=self._table,
                console=self._console,
                refresh_per_second=2,
                transient=True,
            )

    @property
    def is_live(self) -> bool:
        return self._live is not None

    def __enter__(self) -> SweepProgress:
        if self._live is not None:
            # A line written by a signal handler would be erased, and shift the table.
            self._contexts.enter_context(announcing_stops(self._show_stop))
            self._contexts.enter_context(self._live)
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._contexts.close()
        if self._stopping and self._live is not None:
            self.say(self._stopping)

    def _show_stop(self, text: str) -> None:
        self._stopping = text

    def started(self, member: MemberResult) -> None:
        self._running[member.name] = None
        if not self.is_live:
            self.say(f"{member.name}: started ({self._place(member)})")

    def ended(self, member: MemberResult) -> None:
        self._running.pop(member.name, None)
        self._ended.append(member)
        if not self.is_live or member.status == "failed":
            self.say(f"{member.name}: {_outcome(member)} ({self._place(member)})")

    def evaluating(self, what: str, done: int, total: int) -> None:
        if not self.is_live:
            self._report(what, done, total)
        self.on_tick()

    def _place(self, member: MemberResult) -> str:
        return f"{self._result.members.index(member) + 1} of {len(self._result.members)}"

    def display(self, name: str) -> Callable[[int, int], Display]:
        """What ``train`` shows the progress of the member with."""
        return partial(self._display, name)

    def _display(self, name: str, total_steps: int, done: int = 0) -> Display:
        self._running[name] = display = MemberDisplay(self, name, total_steps, done)
        if self.halving is not None:
            self.halving.started(name, total_steps)
        return display

    def follow(self, name: str, folder: Path) -> None:
        """Show the progress of a member that another process trains in ``folder``."""
        self._running[name] = FollowedRun(self, name, folder)

    def note(self, name: str, text: str) -> None:
        """Print what a run has to tell, unless another member has told the same."""
        if text not in self._said:
            self._said.add(text)
            self.say(f"{name}: {text}")

    def say(self, text: str) -> None:
        if self._live is None:
            to_stderr(text)
        else:
            self._live.console.print(printable(text), markup=False, highlight=False)

    def _table(self) -> Table:
        """Members that run, then those that have finished, the latest first, then pending ones, as
        far as the terminal has room."""
        members = self._result.members
        earlier = [m for m in members if m.status != "pending" and m not in self._ended]
        running = [member for member in members if member.name in self._running]
        pending = [m for m in members if m.status == "pending" and m.name not in self._running]
        numbers = ("step", "loss", self._result.metric, "seconds")
        table = Table(
            Column("member", no_wrap=True), Column("status", no_wrap=True),
            *(Column(printable(name), justify="right", no_wrap=True) for name in numbers),
            caption=self._stopping or self._state(len(self._ended) + len(earlier)),
        )  # fmt: skip
        room = max(1, self._console.height - _MARGIN)
        for member in [*running, *reversed(self._ended), *earlier, *pending][:room]:
            table.add_row(*map(printable, self._row(member)))
        return table

    def _state(self, finished: int) -> str:
        """How far the sweep is, in a line."""
        parts = [f"{finished} of {len(self._result.members)} members have finished"]
        displays = [display for display in self._running.values() if display is not None]
        parts += [
            text for display in displays[:1] for text in (display.speed, display.left) if text
        ]
        if (best := self._result.best) is not None:
            parts.append(f"best {decimal(best.metrics[self._result.metric])}")
        return "; ".join(parts)

    def _row(self, member: MemberResult) -> list[str]:
        metrics, seconds = member.stopped_metrics or member.metrics, member.seconds
        metric = metrics.get(self._result.metric)
        status, step, loss = str(member.status), "", ""
        if member.name in self._running:
            status, display = "running", self._running[member.name]
            if display is not None:
                if isinstance(display, FollowedRun):
                    display.read()
                total = f"/{display.total_steps}" if display.total_steps else ""
                step, loss = f"{display.step}{total}", display.loss.removeprefix("loss ")
                metric = display.metrics.get(self._result.metric)
        score = "" if metric is None else decimal(metric)
        room = max(1, self._console.width - _NUMBERS_WIDTH)
        name = member.name if len(member.name) <= room else f"…{member.name[1 - room :]}"
        return [name, status, step, loss, score, "" if seconds is None else f"{seconds:.1f}"]


def _outcome(member: MemberResult) -> str:
    if member.status == "failed":
        return f"failed: {member.error}"
    status = str(member.status)
    if member.stopped_at_step is not None:
        status = f"stopped by halving at step {member.stopped_at_step}"
    seconds = "" if member.seconds is None else f"{member.seconds:.1f} s"
    metrics = member.stopped_metrics or member.metrics
    return ", ".join(filter(None, [status, format_metrics(metrics), seconds]))
