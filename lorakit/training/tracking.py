"""What a run tells: metrics.jsonl, a bar or plain lines on stderr, TensorBoard and W&B.

Numbers that the device still works on, read only when they have arrived.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from lorakit.errors import UserError
from lorakit.io.atomic import write_text

#: The name under which trackers file a run.
PROJECT = "lorakit"


class MetricsFile:
    """``metrics.jsonl``, a line at a time; a resumed run keeps the first ``keep`` lines, which
    are those that were there at its checkpoint."""

    def __init__(self, path: Path, keep: int = 0) -> None:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        kept = lines[:keep]
        self.lines = len(kept)
        write_text(path, "".join(f"{line}\n" for line in kept))
        self._handle = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        self._handle.write(json.dumps(line) + "\n")
        self._handle.flush()
        self.lines += 1

    def close(self) -> None:
        self._handle.close()


class Display:
    """A progress bar on a terminal, plain lines elsewhere; both on stderr."""

    def __init__(self, total_steps: int, done: int = 0) -> None:
        self._total, self._start, self._first = total_steps, time.monotonic(), done
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("train", total=total_steps, completed=done, numbers="")
            self._bar.start()

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def log(self, line: dict[str, Any]) -> None:
        numbers = (
            f"loss {line['loss']:.4f}  lr {line['learning_rate']:.2e}  "
            f"{line['tokens_per_second']:,.0f} tok/s  {line['peak_memory_bytes'] / 2**30:.1f} GiB"
        )
        if self._bar is not None:
            self._bar.update(self._task, numbers=numbers)
            return
        step = line["step"]
        spent = time.monotonic() - self._start
        left = spent / max(step - self._first, 1) * (self._total - step)
        self.say(f"step {step}/{self._total}  {numbers}  left {_clock(left)}")

    def say(self, text: str) -> None:
        """A line that stays, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            tell(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def tell(text: str) -> None:
    """A line on stderr; a closed pipe or a full disk there does not end the run."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class Recorder:
    """All listeners at once."""

    def __init__(self, metrics: MetricsFile, display: Display, accelerator: Accelerator) -> None:
        self._metrics, self.display, self._accelerator = metrics, display, accelerator
        self._last_step = 0

    @property
    def metrics_lines(self) -> int:
        return self._metrics.lines

    def log(self, line: dict[str, Any]) -> None:
        self._metrics.write(line)
        self.display.log(line)
        self._track({key: v for key, v in line.items() if key != "step"}, line["step"])

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self._metrics.write({"step": step, "eval": metrics})
        self.display.say(f"step {step}  evaluation: " + format_metrics(metrics))
        self._track({f"eval/{key}": value for key, value in metrics.items()}, step)

    def _track(self, values: dict[str, Any], step: int) -> None:
        """Trackers refuse a step before the last; the best model's final evaluation has one."""
        self._last_step = max(step, self._last_step)
        if self._accelerator.log_with:
            self._accelerator.log(values, step=self._last_step)

    def close(self) -> None:
        self.display.close()
        self._metrics.close()
        if self._accelerator.log_with:
            self._accelerator.end_training()


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError for a tracker whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"train.trackers: {name!r} is not installed (pip install 'lorakit[trackers]')"
            )


def trackers(names: Sequence[str]) -> list[Any]:
    """What Accelerate logs with. W&B reads its environment variables itself, but for the project,
    which Accelerate gives it: WANDB_PROJECT goes before ours there too."""
    from accelerate.tracking import WandBTracker

    project = os.environ.get("WANDB_PROJECT") or PROJECT
    return [WandBTracker(project) if name == "wandb" else name for name in names]


def format_metrics(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def throttled(say: Callable[[str], None], seconds: float = 10.0) -> Any:
    """A callback (what, done, total) that says how far it is, at most once in ``seconds``."""
    last = time.monotonic()

    def report(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds and done < total:
            last = time.monotonic()
            say(f"{what} {done}/{total}")

    return report


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


@dataclass(frozen=True)
class LateValues:
    """A log line's known part, and the losses, gradient norms and other values of its steps."""

    known: dict[str, Any]
    losses: list[float]
    grad_norms: list[float]
    others: dict[str, list[float]] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """The mean over the steps."""
        return sum(self.losses) / len(self.losses)

    def line(self) -> dict[str, Any]:
        """A line of metrics.jsonl: the mean loss, and the last step's gradient norm and others."""
        keys = ("step", "epoch", "loss", "learning_rate", "grad_norm")
        values = {**self.known, "loss": self.loss, "grad_norm": self.grad_norms[-1]}
        values |= {name: column[-1] for name, column in self.others.items()}
        return {key: values.pop(key) for key in keys} | values


class LateReader:
    """Collects scalars of each step: loss, gradient norm and those that ``others`` names.
    ``stage`` sends a line's worth to the host without waiting."""

    def __init__(self, others: Sequence[str] = ()) -> None:
        self._others = tuple(others)
        self._pending: list[Tensor] = []
        self._staged: deque[tuple[dict[str, Any], Tensor, torch.cuda.Event | None]] = deque()

    def window(self) -> list[list[float]]:
        """The scalars of the steps since the last line; waits for the device."""
        values = torch.stack(self._pending).tolist() if self._pending else []
        return [[float(x) for x in row] for row in values]

    def restore_window(self, window: list[list[float]], device: torch.device) -> None:
        self._pending = [torch.tensor(row, device=device) for row in window]

    def add(self, loss: Tensor, grad_norm: Tensor, others: Sequence[Tensor] = ()) -> None:
        assert len(others) == len(self._others)
        values = (loss, grad_norm, *others)
        self._pending.append(torch.stack([value.detach().float() for value in values]))

    def stage(self, known: dict[str, Any]) -> None:
        if not self._pending:
            return
        values = torch.stack(self._pending)
        self._pending = []
        event = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._staged.append((known, values, event))

    def arrived(self, wait: bool = False) -> list[LateValues]:
        """The staged lines that are there, oldest first; with ``wait`` all of them."""
        found = []
        while self._staged:
            known, values, event = self._staged[0]
            if event is not None and not wait and not event.query():
                break
            if event is not None:
                event.synchronize()
            self._staged.popleft()
            losses, norms, *others = values.t().tolist()
            found.append(
                LateValues(known, losses, norms, dict(zip(self._others, others, strict=True)))
            )
        return found
