"""Decide when to take a step, log, evaluate, save and stop; the engine computes the step.

A loop is a generator of the steps that it wants to be taken, see ``training.steps``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from lorakit.data.collate import Batch
from lorakit.data.files import UnreadableFile
from lorakit.data.stream import FileChanged
from lorakit.distributed.group import rank_and_world_size
from lorakit.distributed.processes import gather, run_on_main
from lorakit.errors import (
    BadRow,
    DataError,
    EvaluationError,
    Interrupted,
    TrainingError,
    UserError,
)
from lorakit.evaluation.progress import EvaluationStopped
from lorakit.tasks.base import Prediction
from lorakit.training.batching import StepLoader
from lorakit.training.checkpoint import (
    Progress,
    Snapshot,
    save_checkpoint,
)
from lorakit.training.clock import Clock, StepWindow
from lorakit.training.control import Best, Evaluator, Schedule, StopRequest
from lorakit.training.divergence import (
    AsyncScalars,
    StepScalars,
    divergence_note,
    has_diverged,
    loss_growth,
    nonfinite_step,
    nonfinite_weight,
)
from lorakit.training.earlier_run import delete_earlier_run
from lorakit.training.engine import Engine, same_shapes
from lorakit.training.guard import Guard
from lorakit.training.memory import drop_frames
from lorakit.training.random_states import random_states, restore_random_states
from lorakit.training.record import peak_memory_bytes
from lorakit.training.steps import StepRequest, Steps
from lorakit.training.tracking import Recorder


@dataclass
class Loop:
    """``evaluate`` is None without a validation split; ``cause`` is the likely cause of a
    divergence; ``out_of_memory`` returns a message about a step and its batches; only the main
    process has a ``guard``. ``broken`` is set once the loss or a weight is not finite.
    ``predictions`` are those of the best evaluation, none if that was before a resume. ``clock``
    measures the time of the steps."""

    engine: Engine
    loader: StepLoader
    schedule: Schedule
    recorder: Recorder
    stop: StopRequest
    evaluate: Evaluator | None
    best: Best
    checkpoint_dir: Path
    guard: Guard | None
    cause: str
    out_of_memory: Callable[[int, Sequence[Batch]], str]
    progress: Progress = field(default_factory=Progress)
    broken: bool = False
    predictions: Sequence[Prediction] = ()
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self._scalars = AsyncScalars(self.engine.value_names)
        self._window = StepWindow(self.clock, self.loader.device)
        self._first_step = 1
        self._last_checkpoint: Path | None = None
        self._evaluated: dict[str, float] | None = None

    def resume(self, checkpoint: Path, snapshot: Snapshot) -> None:
        """Restore everything as it was when ``checkpoint`` was written.

        Raises UserError if the checkpoint is of another model or run.
        """
        progress, best = snapshot.progress, snapshot.best
        try:
            if progress.step > self.schedule.total_steps:
                raise ValueError("the run ends before this step")
            if best is not None and not same_shapes(best, self.engine.weights):
                raise ValueError("the best weights are of another model")
            if any(len(row) != 2 + len(self.engine.value_names) for row in progress.window):
                raise ValueError("the numbers of its last steps are of another method")
            self.best.check_comparable(progress, best)
            self.engine.load_state_dict(snapshot.engine)
        except ValueError as error:
            raise UserError(
                f"{checkpoint}: does not match this model and recipe: {error}", about="--resume"
            ) from error
        self.progress, self.best.weights = progress, best
        self.recorder.truncate(progress.metrics_lines)
        self._scalars.restore_window(progress.window, self.loader.device)
        self._last_checkpoint = checkpoint
        restore_random_states(snapshot.random, rank_and_world_size()[0])

    def steps(self) -> Steps[None]:
        """Train to the end.

        Raises TrainingError if the loss or a weight is not finite. With a checkpoint saved, raises
        Interrupted after a signal, and DataError (BadRow for a row) if a stream cannot be read.
        """
        self._window = StepWindow(self.clock, self.loader.device)
        self._first_step = self.progress.step + 1
        self.recorder.display.begin()
        if self.progress.step and self._evaluation_due():
            self._evaluate()
        while self.progress.step < self.schedule.total_steps and not self.progress.stopped_early:
            if not (yield from self._take_step()):
                break
            self._log()
            if self.stop:
                self._interrupt()
            if self._evaluation_due():
                self._evaluate()
            if self.schedule.due(self.progress.step, self.schedule.save_every_steps):
                self.save()
        self._end_window()  # early stopping may come between two log lines
        self.save()

    def save(self) -> Path:
        """Write a checkpoint of this step; raises TrainingError if its numbers are not finite or
        the output directory was deleted, and WriteFailed."""
        self._settle()
        with self.clock.paused():
            self.progress.metrics_lines = self.recorder.metrics_lines
            state = self.engine.state_dict()
            snapshot = Snapshot(self.progress, state, self.best.weights, gather(random_states()))
            self._last_checkpoint, is_there = run_on_main(lambda: self._write(snapshot))
        if not is_there:
            raise TrainingError(
                f"step {self.progress.step}: {self.checkpoint_dir.parent} was deleted or renamed "
                f"during the run; saved {self._last_checkpoint}; resume with --resume auto"
            )
        return self._last_checkpoint

    def _write(self, snapshot: Snapshot) -> tuple[Path, bool]:
        """Write the checkpoint; return its path and whether the output directory was there."""
        is_there = self.guard is None or self.guard.check()
        kept = self.schedule.save_total_limit
        saved = save_checkpoint(self.checkpoint_dir, snapshot, kept)
        delete_earlier_run(self.checkpoint_dir.parent)
        return saved, is_there

    def finish(self) -> dict[str, float]:
        """Load the best weights and return their metrics; raises Interrupted after a signal."""
        loss = None
        if self.best.weights is not None:
            self.engine.load_weights(self.best.weights)
            loss = self.progress.best_metrics["loss"]
        if self.evaluate is None or not self.evaluate.measures_more_at_the_end:
            return self.progress.best_metrics
        try:
            found = self.evaluate(final=True, loss=loss)
        except torch.OutOfMemoryError as error:
            message = self.evaluate.out_of_memory(self.progress.step, True, loss is None)
            raise TrainingError(f"{message}; {self._last_good()}") from error
        except EvaluationStopped as error:
            raise Interrupted(
                "interrupted in the final evaluation", self.stop.signal_number
            ) from error
        self.predictions = found.predictions
        self.recorder.evaluation(self.progress.best_step, found.metrics)
        return found.metrics

    def divergence(self) -> str | None:
        """A warning if the finished run left the model worse than before.

        If the losses of the steps suggest it, the loss on the first step's rows is measured again,
        unless they came from a stream and the run was resumed.
        """
        history = self.progress.history
        if not has_diverged(history, None):
            return None
        batches = self.loader.first_step()
        again = self.engine.loss(batches) if batches is not None else None
        return divergence_note(history, again, self.cause) if has_diverged(history, again) else None

    def _take_step(self) -> Steps[bool]:
        """Take the next step; false if the run is to stop before it."""
        began, progress = self.clock.now(), self.progress
        try:
            loaded = self.loader.take(progress.step)
        except DataError as error:
            self._stop_for_data(error)
        request = StepRequest(self.engine, loaded, self._evaluated)
        self._evaluated = None
        try:
            result = yield request
        except torch.OutOfMemoryError as error:
            message = self.out_of_memory(progress.step + 1, loaded.micro_batches)
            raise TrainingError(f"{message}; {self._last_good()}") from error
        if result is None:
            progress.stopped_early = True
            return False
        progress.step += 1
        if progress.step < self.schedule.total_steps:
            self.loader.prefetch(progress.step)  # while the device computes
        self._scalars.add(result)
        self._window.tokens += loaded.token_count
        progress.trained_tokens += loaded.trained_count
        progress.seconds += self.clock.now() - began
        return True

    def _log(self) -> None:
        step = self.progress.step
        self.recorder.display.advance(step)
        if self.schedule.due(step, self.schedule.log_every_steps):
            self._end_window()
        elif step == self._first_step:  # shown, but not a log line; waits for the device once
            loss = self._scalars.window()[-1][0]
            self.recorder.display.log({**self._window_values(), "loss": loss})
        self._record(wait=False)

    def _end_window(self) -> None:
        """End the window of steps that one log line covers."""
        ranks, known = self.engine.changed_ranks(self._scalars.pending_steps), self._window_values()
        speed = self._window.end()
        self._scalars.stage(known, ranks, lambda: {"tokens_per_second": round(speed(), 1)})

    def _window_values(self) -> dict[str, Any]:
        """What the host knows of the steps since the last log line."""
        return {
            "step": self.progress.step,
            "epoch": self.schedule.epoch(self.progress.step),
            "tokens_per_second": round(self._window.tokens / self._window.host_seconds(), 1),
            "peak_memory_bytes": peak_memory_bytes(self.loader.device),
            **self.engine.log_values(),
        }

    def _record(self, wait: bool) -> None:
        """Write the log lines whose numbers have arrived; with ``wait``, all complete ones."""
        for scalars in self._scalars.arrived(wait):
            self._check_finite(scalars)
            self.progress.history.add(scalars.losses)
            self.recorder.log(scalars.line())
            self._warn_of_growth(scalars)

    def _settle(self) -> None:
        """Wait for the steps so far, and check that their losses and the weights are finite."""
        began = self.clock.now()
        self._record(wait=True)
        self.progress.seconds += self.clock.now() - began
        self.progress.window = window = self._scalars.window()
        if window:
            losses, norms, *_ = (list(column) for column in zip(*window, strict=True))
            self._check_finite(StepScalars({"step": self.progress.step}, losses, norms))
        if name := nonfinite_weight(self.engine.weights):
            self._fail(
                f"step {self.progress.step}: {name} is not finite after this step; likely cause: "
                f"{self.cause}"
            )

    def _check_finite(self, scalars: StepScalars) -> None:
        if message := nonfinite_step(scalars, self.engine.scales_loss, self.cause):
            self._fail(message)

    def _warn_of_growth(self, scalars: StepScalars) -> None:
        """Warn once per run of a loss that grows but stays finite."""
        progress = self.progress
        if progress.first_loss is None:
            progress.first_loss = scalars.loss
        message = loss_growth(scalars, progress.first_loss, self.cause)
        if message and not progress.warned_of_growth:
            self.recorder.display.say(message)
            progress.warned_of_growth = True

    def _fail(self, message: str) -> NoReturn:
        self.broken = True
        raise TrainingError(f"{message}; {self._last_good()}")

    def _last_good(self) -> str:
        return f"last good checkpoint: {self._last_checkpoint or 'none was written yet'}"

    def _evaluation_due(self) -> bool:
        step = self.progress.step
        return (
            self.evaluate is not None
            and self.progress.last_eval_step != step
            and self.schedule.due(step, self.schedule.eval_every_steps)
        )

    def _evaluate(self) -> None:
        assert self.evaluate is not None
        self._settle()
        began, step = self.clock.now(), self.progress.step
        try:
            found = self.evaluate()
        except EvaluationStopped:
            self._interrupt()
        except torch.OutOfMemoryError as error:
            drop_frames(error)  # saving needs memory, too
            # The others of a group wait in the evaluation: they cannot save with this process.
            saved = self.save() if rank_and_world_size()[1] == 1 else None
            kept = f"saved {saved}; resume with --resume auto" if saved else self._last_good()
            raise TrainingError(f"{self.evaluate.out_of_memory(step)}; {kept}") from error
        except EvaluationError as error:
            self._fail(f"step {step}: {error}; if the weights diverged: {self.cause}")
        self.progress.seconds += self.clock.now() - began
        self.progress.last_eval_step, self._evaluated = step, found.metrics
        self.recorder.evaluation(step, found.metrics)
        if self.engine.is_final_form():
            stopping = self.best.update(found.metrics, self.engine.weights, self.progress)
            if self.progress.best_step == step:
                self.predictions = found.predictions
            if stopping:
                self.recorder.display.say(stopping)
        self._window.skip(self.clock.now() - began)

    def _stop_for_data(self, error: DataError) -> NoReturn:
        saved = self.save()
        changed = isinstance(error, FileChanged)
        advice = "restore the file" if changed else "correct or remove the row"
        if isinstance(error, UnreadableFile):
            advice = "replace the file with a complete one"
        raise (DataError if changed else BadRow)(
            f"{error}; stopped at step {self.progress.step} of {self.schedule.total_steps}; saved "
            f"{saved}; {advice}, then resume with --resume auto"
        ) from error

    def _interrupt(self) -> NoReturn:
        saved = self.save()
        raise Interrupted(
            f"interrupted at step {self.progress.step} of {self.schedule.total_steps}; "
            f"saved {saved}",
            self.stop.signal_number,
        )
