"""What the loop uses between steps: schedule, evaluation, early stopping and signals."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from torch import Tensor

from lorakit.distributed.group import is_first
from lorakit.distributed.launcher import is_launched, launch_id
from lorakit.distributed.processes import stop_signal
from lorakit.errors import Interrupted
from lorakit.evaluation.evaluate import Evaluation, evaluate_model
from lorakit.evaluation.progress import OnPhase
from lorakit.evaluation.scorer import Scorer
from lorakit.models.causal import CausalParts
from lorakit.tasks.base import LOWER_IS_BETTER
from lorakit.training.checkpoint import Progress
from lorakit.training.memory import evaluation_memory_advice
from lorakit.training.setup import Prepared


@dataclass(frozen=True)
class Schedule:
    """When to log, evaluate and save: at regular intervals of steps, and after the last step.
    ``steps_per_epoch`` is None for a stream."""

    total_steps: int
    steps_per_epoch: int | None
    log_every_steps: int
    eval_every_steps: int
    save_every_steps: int
    save_total_limit: int | None

    def due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.total_steps

    def epoch(self, step: int) -> float | None:
        """Return the number of passes over the rows; None if the number of rows is unknown."""
        return round(step / self.steps_per_epoch, 4) if self.steps_per_epoch else None


class StopRequest:
    """Set by a signal to any of the processes, or if a launcher is killed, which can then send
    none; all of them stop after the same step."""

    def __init__(self) -> None:
        self._launcher = os.getppid() if launch_id() else None

    @property
    def signal_number(self) -> int:
        """The signal; 0 before one."""
        if self._launcher is not None and os.getppid() != self._launcher:
            self._launcher = None
            if not stop_signal.own:
                stop_signal.set(signal.SIGTERM)
                _Handled.announce("the launcher was killed: stopping after saving a checkpoint")
        return stop_signal.agreed

    def __bool__(self) -> bool:
        return self.signal_number != 0

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler: a second signal raises Interrupted at once, but not if a launcher
        started several processes, since it passes on what a scheduler has sent to all of them."""
        if stop_signal.own and not is_launched():
            raise Interrupted("interrupted again: stopped without saving a checkpoint", number)
        is_repeated = stop_signal.own != 0
        stop_signal.set(number)
        if is_first() and not is_repeated:
            _announce_stop(number)


def _announce_stop(number: int) -> None:
    """Tell the user that the run will stop."""
    text = f"received {signal.Signals(number).name}: stopping after saving a checkpoint"
    if number == signal.SIGINT and not is_launched():
        text += "; press Ctrl-C again to stop without one"
    _Handled.announce(text)


def _write_line(text: str) -> None:
    """Bypasses sys.stderr, in which the signal may have interrupted a write; on a terminal,
    replaces the progress bar, which is drawn again below."""
    with suppress(OSError):
        start = "\r\x1b[2K" if os.isatty(2) else ""
        os.write(2, f"{start}{text}\n".encode())


class _Handled:
    """Whether signals are handled by ``stop_request``, and what shows that one has come."""

    now = False
    announce: Callable[[str], None] = staticmethod(_write_line)


@contextmanager
def announcing_stops(show: Callable[[str], None]) -> Iterator[None]:
    """During the block, ``show`` gets the text for the user after a signal. It is called in a
    signal handler, so that it must not write to sys.stderr."""
    before, _Handled.announce = _Handled.announce, staticmethod(show)
    try:
        yield
    finally:
        _Handled.announce = staticmethod(before)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Handle SIGINT, SIGTERM and SIGHUP during the block, if this is the main thread.

    A signal that is ignored, such as SIGHUP under nohup, stays ignored. A block within another one
    has its request.
    """
    request = StopRequest()
    if _Handled.now:
        yield request
        return
    stop_signal.clear()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handled = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, request.handle) for number in handled}
    _Handled.now = True
    try:
        yield request
    finally:
        _Handled.now = False
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Evaluator:
    """Measures the model, with its current weights, on the recipe's evaluation split. For
    ``in_step`` see ``evaluate_model``; ``scorer`` returns that of an evaluation."""

    prepared: Prepared
    parts: CausalParts | None
    on_progress: OnPhase
    in_step: bool = False
    scorer: Callable[[], Scorer | None] = lambda: None

    @property
    def measures_more_at_the_end(self) -> bool:
        """Whether text is generated and scored in the final evaluation only."""
        task, config = self.prepared.task, self.prepared.recipe.task
        return task.generates(config, final=True) != task.generates(config, final=False)

    def out_of_memory(self, step: int, final: bool = False, measures_loss: bool = True) -> str:
        """A message about an evaluation that ran out of memory after ``step``."""
        recipe, task = self.prepared.recipe, self.prepared.task
        generates = task.generates(recipe.task, final)
        text = f"step {step}: out of memory on {self.prepared.model.device} in an evaluation"
        return f"{text}; {evaluation_memory_advice(recipe, measures_loss, generates)}"

    def __call__(self, final: bool = False, loss: float | None = None) -> Evaluation:
        """``loss`` as in ``evaluate_model``. Raises EvaluationStopped if a signal arrives
        meanwhile."""
        data, recipe, task = self.prepared.evaluation, self.prepared.recipe, self.prepared.task
        assert data is not None
        return evaluate_model(
            self.prepared.model,
            self.prepared.tokenizer,
            data,
            batch_size=recipe.eval_batch_size,
            parts=self.parts,
            generate=task.generates(recipe.task, final),
            seed=recipe.train.seed,
            on_progress=self.on_progress,
            should_stop=lambda: stop_signal.own != 0,
            in_step=self.in_step,
            scorer=self.scorer(),
            loss=loss,
        )


@dataclass
class Best:
    """The best model so far by ``metric``, and early stopping.

    ``weights`` are those of the best evaluation, in host memory; None before the first one. The run
    stops after ``patience`` evaluations in a row without an improvement.
    """

    metric: str
    patience: int | None
    weights: dict[str, Tensor] | None = None

    def check_comparable(self, progress: Progress, weights: Mapping[str, Tensor] | None) -> None:
        """Raise ValueError if later metrics cannot be compared with the stored best ones."""
        wanted = set() if weights is None else {self.metric, "loss"}
        if not wanted <= progress.best_metrics.keys() or (progress.best_metrics and not wanted):
            raise ValueError("the best metrics are of another task")

    def update(
        self, metrics: dict[str, float], weights: Mapping[str, Tensor], progress: Progress
    ) -> str | None:
        """Copy ``weights`` if ``metrics`` are the best so far; return a message if the run is to
        stop."""
        if self.is_improvement(metrics, progress.best_metrics):
            progress.best_metrics, progress.best_step = metrics, progress.step
            progress.evaluations_without_gain = 0
            self.weights = {name: weight.cpu().clone() for name, weight in weights.items()}
            return None
        progress.evaluations_without_gain += 1
        if not self.patience or progress.evaluations_without_gain < self.patience:
            return None
        progress.stopped_early = True
        return (
            f"step {progress.step}: early stopping: {self.metric} has not improved in "
            f"{self.patience} evaluations; the best was at step {progress.best_step}"
        )

    def is_improvement(self, metrics: Mapping[str, float], best: Mapping[str, float]) -> bool:
        """Whether ``metrics`` beat ``best`` (empty at first); a lower loss breaks a tie."""
        if not best:
            return True
        if metrics[self.metric] != best[self.metric]:
            return (metrics[self.metric] < best[self.metric]) == (self.metric in LOWER_IS_BETTER)
        return metrics["loss"] < best["loss"]
