"""The steps, nothing else: it knows neither the method nor the task."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from lorakit.data.collate import Batch
from lorakit.data.files import UnreadableFile
from lorakit.data.plan import Bin, Step, StepSource
from lorakit.data.stream import FileChanged
from lorakit.errors import (
    BadRow,
    DataError,
    EvaluationError,
    Interrupted,
    TrainingError,
    UserError,
)
from lorakit.evaluation.progress import EvaluationStopped
from lorakit.methods.base import RunHooks
from lorakit.training.checkpoint import (
    Progress,
    Snapshot,
    random_states,
    restore_random_states,
    save_checkpoint,
)
from lorakit.training.checks import (
    broken_step,
    broken_weight,
    diverged,
    divergence_note,
    grown_loss,
)
from lorakit.training.control import Best, Schedule, StopRequest
from lorakit.training.record import peak_memory_bytes
from lorakit.training.tracking import LateReader, LateValues, Recorder


@dataclass
class Loop:
    """``objective`` maps a batch to the sum of its losses; ``evaluate`` gives the metrics of the
    model as it is; ``cause`` says why weights are likely to diverge. ``check_first_step`` is called
    once, when the first gradients are there."""

    accelerator: Accelerator
    objective: nn.Module
    trainable: dict[str, nn.Parameter]
    optimizer: Any
    scheduler: LRScheduler
    steps: StepSource
    collate: Callable[[list[Bin]], Batch]
    schedule: Schedule
    recorder: Recorder
    stop: StopRequest
    checkpoint_dir: Path
    evaluate: Callable[[], dict[str, float]] | None
    best: Best
    max_grad_norm: float | None
    hooks: RunHooks
    cause: str
    check_first_step: Callable[[], None] | None = None
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self._late = LateReader(self.hooks.device_values)
        self._window_start = time.monotonic()
        self._window_tokens = 0
        self._last_checkpoint: Path | None = None
        self._first: Step | None = None
        self.broken = False

    def resume(self, checkpoint: Path, snapshot: Snapshot) -> None:
        """Put everything back as it was when ``checkpoint`` was written.

        Raises UserError if the checkpoint is of another model or run.
        """
        self._check_fits(checkpoint, snapshot)
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(snapshot.weights[name])
        self.hooks.load_state(snapshot.method)
        self.optimizer.load_state_dict(snapshot.optimizer)
        self.scheduler.load_state_dict(snapshot.scheduler)
        if snapshot.scaler is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(snapshot.scaler)
        self.progress, self.best.weights = snapshot.progress, snapshot.best
        self._late.restore_window(self.progress.window, self.accelerator.device)
        self._last_checkpoint = checkpoint
        restore_random_states(snapshot.random)

    def run(self) -> None:
        """Train to the end. Raises TrainingError if the loss is no longer finite; with a checkpoint
        saved, Interrupted after a signal, and DataError, BadRow among them, for a stream that
        cannot be read on."""
        self.objective.train()
        self._window_start = time.monotonic()
        if self.progress.step and self._evaluation_due():
            self._evaluate()
        while self.progress.step < self.schedule.total_steps and not self.progress.stopped_early:
            began = time.monotonic()
            try:
                self._train_step()
            except DataError as error:  # of a stream's rows, before anything of the step
                self._stop_for_data(error)
            self.progress.seconds += time.monotonic() - began
            self._log()
            if self.stop:
                self._interrupt()
            if self._evaluation_due():
                self._evaluate()
            if self.schedule.due(self.progress.step, self.schedule.save_every_steps):
                self.save()
        self._stage()  # an early stop may stand between two log lines
        self.save()

    def _check_fits(self, checkpoint: Path, snapshot: Snapshot) -> None:
        fits = snapshot.fits(self.trainable, self.hooks.state())
        if not (fits and 0 <= snapshot.progress.step <= self.schedule.total_steps):
            raise UserError(f"--resume: {checkpoint}: does not belong to this model and run")

    def save(self) -> Path:
        """Write a checkpoint of this step; never of one whose losses were not finite."""
        self._settle()
        self.progress.metrics_lines = self.recorder.metrics_lines
        scaler = self.accelerator.scaler
        snapshot = Snapshot(
            progress=self.progress,
            weights={name: p.detach() for name, p in self.trainable.items()},
            method=self.hooks.state(),
            optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
            scaler=scaler.state_dict() if scaler is not None else None,
            best=self.best.weights,
            random=random_states(),
        )
        self._last_checkpoint = save_checkpoint(
            self.checkpoint_dir, snapshot, self.schedule.save_total_limit
        )
        return self._last_checkpoint

    def step_once(self) -> float:
        """One step for a dry run: its loss."""
        self.objective.train()
        self._train_step()
        self._stage()
        return self._late.arrived(wait=True)[0].losses[0]

    def divergence(self) -> str | None:
        """What to say of a run that is over and left the model worse than it was.

        Where the losses of the steps suggest it, the first step's rows are measured once more;
        those of a resumed stream have gone by.
        """
        step, history = self._first, self.progress.history
        if not diverged(history, None):
            return None
        if step is None and self.steps.steps_per_epoch is not None:
            step = self.steps.step(0)
        again = self._measure(step) if step is not None else None
        return divergence_note(history, again, self.cause) if diverged(history, again) else None

    @torch.no_grad()
    def _measure(self, step: Step) -> float:
        """The step's loss with the weights as they are, without dropout."""
        self.objective.eval()
        total = 0.0
        for bins in step.micro_batches:
            batch = self.collate(bins).to(self.accelerator.device)
            total += float(self.objective(batch))
        self.objective.train()
        return total / step.loss_count

    def _train_step(self) -> None:
        """Forward and backward over the step's micro-batches, normalised over all of its trained
        tokens, and one optimizer step. Nothing here waits for the device."""
        step = self.steps.step(self.progress.step)
        if self.progress.step == 0:
            self._first = step
        count = step.loss_count
        factor = 1 / count
        total: Tensor | None = None
        for index, bins in enumerate(step.micro_batches):
            batch = self.collate(bins).to(self.accelerator.device)
            last = index == len(step.micro_batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.objective):
                loss = self.objective(batch) * factor
                if loss.requires_grad:  # not where all that trains are experts without tokens
                    self.accelerator.backward(loss)
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        if self.check_first_step is not None:
            self.check_first_step()
            self.check_first_step = None
        values = self.hooks.before_step(self._scaled)
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(list(self.trainable.values()), limit)
        self.optimizer.step()
        self.hooks.after_step(self.progress.step + 1, self.accelerator.scaler is not None)
        if not self.accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._late.add(total, norm, values)
        self._window_tokens += step.tokens
        self.progress.step += 1
        self.progress.trained_tokens += count

    def _scaled(self, gradient: Tensor) -> Tensor:
        """As float16's gradients are until they are clipped."""
        scaler = self.accelerator.scaler
        scaled: Tensor = gradient if scaler is None else scaler.scale(gradient)
        return scaled

    def _log(self) -> None:
        step = self.progress.step
        self.recorder.display.advance(step)
        if self.schedule.due(step, self.schedule.log_every_steps):
            self._stage()
        self._emit(wait=False)

    def _stage(self) -> None:
        now = time.monotonic()
        spent = max(now - self._window_start, 1e-9)
        self._late.stage(
            {
                "step": self.progress.step,
                "epoch": self.schedule.epoch(self.progress.step),
                "learning_rate": self.scheduler.get_last_lr()[0],
                "tokens_per_second": round(self._window_tokens / spent, 1),
                "peak_memory_bytes": peak_memory_bytes(self.accelerator.device),
                **self.hooks.logged(self.progress.step, self.optimizer),
            }
        )
        self._window_start, self._window_tokens = now, 0

    def _emit(self, wait: bool) -> None:
        for values in self._late.arrived(wait):
            self._check_finite(values)
            self.progress.history.add(values.losses)
            self.recorder.log(values.line())
            self._warn_if_grown(values)

    def _settle(self) -> None:
        """Wait for every loss so far, and make sure that none is broken, nor a weight."""
        self._emit(wait=True)
        self.progress.window = window = self._late.window()
        if window:
            losses, norms, *_ = (list(column) for column in zip(*window, strict=True))
            known = {
                "step": self.progress.step,
                "learning_rate": self.scheduler.get_last_lr()[0],
            }
            self._check_finite(LateValues(known, losses, norms))
        if name := broken_weight(self.trainable):
            self._fail(
                f"step {self.progress.step}: {name} is not finite after it; likely cause: "
                f"{self.cause}"
            )

    def _check_finite(self, values: LateValues) -> None:
        scaled = self.accelerator.scaler is not None
        if what := broken_step(values, scaled, self.cause):
            self._fail(what)

    def _warn_if_grown(self, values: LateValues) -> None:
        """Once a run: it diverges, without a loss that is not finite."""
        progress = self.progress
        if progress.first_loss is None:
            progress.first_loss = values.loss
        what = grown_loss(values, progress.first_loss, self.cause)
        if what and not progress.said_grown:
            self.recorder.display.say(what)
            progress.said_grown = True

    def _fail(self, what: str) -> NoReturn:
        self.broken = True
        good = self._last_checkpoint or "none was written yet"
        raise TrainingError(f"{what}; last good checkpoint: {good}")

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
        began = time.monotonic()
        try:
            metrics = self.evaluate()
        except EvaluationStopped:
            self._interrupt()
        except EvaluationError as error:
            self._fail(f"step {self.progress.step}: {error}; if the weights diverged: {self.cause}")
        self.objective.train()
        step = self.progress.step
        self.progress.seconds += time.monotonic() - began
        self.progress.last_eval_step = step
        self.recorder.evaluation(step, metrics)
        final = self.hooks.is_final_form(step)
        stopping = self.best.compare(metrics, self.trainable, self.progress) if final else None
        if stopping:
            self.recorder.display.say(stopping)
        self._window_start += time.monotonic() - began

    def _stop_for_data(self, error: DataError) -> NoReturn:
        saved = self.save()
        changed = isinstance(error, FileChanged)
        advice = "put the file back" if changed else "correct or remove the row"
        if isinstance(error, UnreadableFile):
            advice = "replace the file with a complete one"
        raise (DataError if changed else BadRow)(
            f"{error}; stopped at step {self.progress.step} of {self.schedule.total_steps}; saved "
            f"{saved}; {advice}, then go on with --resume auto"
        ) from error

    def _interrupt(self) -> NoReturn:
        saved = self.save()
        raise Interrupted(
            f"stopped at step {self.progress.step} of {self.schedule.total_steps}; saved {saved}; "
            "go on with --resume auto",
            self.stop.signal_number,
        )
