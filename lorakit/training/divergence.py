"""Divergence detection, based on scalars that are copied from the device asynchronously."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorakit.training.engine import StepResult

#: The number of steps at the end of a run whose losses are averaged.
_LAST_STEPS = 10


@dataclass(frozen=True)
class StepScalars:
    """The losses, gradient norms and method values of the steps of one log line. ``known`` are
    the values that the host had when it launched the last of them, ``ranks`` those that one of
    them chose."""

    known: dict[str, Any]
    losses: list[float]
    grad_norms: list[float]
    values: dict[str, list[float]] = field(default_factory=dict)
    ranks: list[int] | None = None

    @property
    def loss(self) -> float:
        """The mean over the steps."""
        return sum(self.losses) / len(self.losses)

    def line(self) -> dict[str, Any]:
        """A line of metrics.jsonl: the mean loss, and the last step's gradient norm and values."""
        keys = ("step", "epoch", "loss", "learning_rate", "grad_norm")
        line = {**self.known, "loss": self.loss, "grad_norm": self.grad_norms[-1]}
        line |= {name: column[-1] for name, column in self.values.items()}
        line |= {} if self.ranks is None else {"ranks": self.ranks}
        return {key: line.pop(key) for key in keys} | line


_Values = Callable[[], dict[str, Any]]


class AsyncScalars:
    """Collects the scalars of steps on the device and copies a log line's worth at a time.

    ``stage`` starts the copy and does not wait, ``arrived`` returns what has been copied, with the
    values of ``late``, a function that is called then.
    ``value_names`` are those of the engine.
    """

    def __init__(self, value_names: Sequence[str] = ()) -> None:
        self._value_names = tuple(value_names)
        self._pending: list[Tensor] = []
        self._staged: deque[tuple[_Values, list[Tensor], torch.cuda.Event | None]] = deque()

    @property
    def pending_steps(self) -> int:
        """The number of steps since the last log line."""
        return len(self._pending)

    def window(self) -> list[list[float]]:
        """The scalars of the steps since the last log line; waits for the device."""
        values = torch.stack(self._pending).tolist() if self._pending else []
        return [[float(x) for x in row] for row in values]

    def restore_window(self, window: list[list[float]], device: torch.device) -> None:
        self._pending = [torch.tensor(row, device=device) for row in window]

    def add(self, result: StepResult) -> None:
        assert len(result.values) == len(self._value_names)
        scalars = (result.loss, result.grad_norm, *result.values)
        self._pending.append(torch.stack([scalar.detach().float() for scalar in scalars]))

    def stage(
        self, known: dict[str, Any], ranks: Tensor | None = None, late: _Values = dict
    ) -> None:
        """Start copying the scalars of the steps added since the last log line, and ``ranks``."""
        if not self._pending:
            return
        copies = [torch.stack(self._pending), *([] if ranks is None else [ranks])]
        self._pending = []
        event = None
        if copies[0].is_cuda:
            hosts = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in copies]
            pairs = zip(hosts, copies, strict=True)
            copies = [host.copy_(values, non_blocking=True) for host, values in pairs]
            event = torch.cuda.Event()
            event.record()
        self._staged.append((lambda: known | late(), copies, event))

    def arrived(self, wait: bool = False) -> list[StepScalars]:
        """The staged lines that have been copied, oldest first; with ``wait``, all of them."""
        found = []
        while self._staged:
            known, (values, *ranks), event = self._staged[0]
            if event is not None and not wait and not event.query():
                break
            if event is not None:
                event.synchronize()
            self._staged.popleft()
            losses, norms, *columns = values.t().tolist()
            named = dict(zip(self._value_names, columns, strict=True))
            found.append(StepScalars(known(), losses, norms, named, *(x.tolist() for x in ranks)))
        return found


def divergence_cause(learning_rate: float, advice: str | None) -> str:
    """Name the likely cause of a divergence; ``advice`` is a further one that the method adds."""
    return f"train.learning_rate ({learning_rate:g}) too high" + (
        f", or {advice}" if advice else ""
    )


def nonfinite_step(scalars: StepScalars, scales_loss: bool, cause: str) -> str | None:
    """Return a message about the first step whose loss or gradient is not finite.

    ``scales_loss``: float16's loss scaler skips a step whose gradient is not finite.
    """
    losses, norms = scalars.losses, scalars.grad_norms
    for index, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        step = scalars.known["step"] - len(losses) + 1 + index
        why = _likely_cause(norms[:index], scales_loss, cause)
        if not math.isfinite(loss):
            return f"step {step}: the loss is {loss}; {why}"
        if not math.isfinite(norm) and not scales_loss:
            return f"step {step}: the gradient is not finite; {why}"
    return None


def nonfinite_weight(weights: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first weight that is not finite; waits for the device once."""
    found = {
        name: weight.detach()
        for name, weight in weights.items()
        if weight.numel() and weight.is_floating_point()
    }
    if not found:
        return None
    # The largest magnitude of each, in few kernels; that of a tensor with a NaN is NaN.
    largest = torch.stack(torch._foreach_norm(list(found.values()), math.inf))
    flags = zip(found, largest.isfinite().tolist(), strict=True)
    return next((name for name, is_finite in flags if not is_finite), None)


def loss_growth(scalars: StepScalars, first: float, cause: str) -> str | None:
    """Return a message about a loss far above ``first``, the loss of the run's first log line: more
    than 3 times as high and more than 1 above it, which neither a small loss nor ordinary noise
    reaches."""
    if not (scalars.loss > 3 * first and scalars.loss > first + 1):
        return None
    return (
        f"step {scalars.known['step']}: the loss is {scalars.loss:.4g}, up from {first:.4g} at the "
        f"start; likely cause: {cause}"
    )


@dataclass
class LossHistory:
    """``start`` is the loss of the first step, before any update, ``peak`` the highest of any step,
    ``last`` are those of the last steps, oldest first."""

    start: float | None = None
    peak: float = -math.inf
    last: list[float] = field(default_factory=list)

    def add(self, losses: Sequence[float]) -> None:
        """Append the losses of the next steps."""
        if self.start is None and losses:
            self.start = losses[0]
        self.peak = max(self.peak, *losses)
        self.last = [*self.last, *losses][-_LAST_STEPS:]


def has_diverged(history: LossHistory, remeasured: float | None) -> bool:
    """Whether a run with finite losses left the model worse than before.

    ``remeasured`` is the loss on the first step's rows after training, None if unknown. It is
    compared with ``history.start``, the loss on the same rows before training, which rules out a
    difference between rows. The run diverged if ``remeasured`` and the mean of the last steps both
    exceed 1.5 times the start and the start plus 1; or if a step's loss exceeded 10 times the start
    and the start plus 10, and both ended above 0.9 of the start.
    """
    if history.start is None:
        return False
    start, mean = history.start, sum(history.last) / len(history.last)
    end = mean if remeasured is None else min(remeasured, mean)
    if not math.isfinite(end):
        return True
    if end > max(1.5 * start, start + 1):
        return True
    return history.peak > max(10 * start, start + 10) and end > 0.9 * start


def divergence_note(history: LossHistory, remeasured: float | None, cause: str) -> str:
    """Return the warning at the end of a run that ``has_diverged``."""
    assert history.start is not None
    before = f"{history.start:.4g} at the start, {history.peak:.4g} at its peak"
    if remeasured is not None:
        now = f"and {remeasured:.4g} at the end, on the rows of the first step"
    else:
        now = f"and {sum(history.last) / len(history.last):.4g} at the end"
    return f"the run diverged: the loss was {before} {now}; likely cause: {cause}"


def _likely_cause(earlier_norms: Sequence[float], scales_loss: bool, cause: str) -> str:
    finite = [norm for norm in earlier_norms if math.isfinite(norm)]
    if finite and max(finite) > 100:
        return f"the gradient norm had grown to {max(finite):.3g}: {cause}"
    overflow = ", or float16 overflow (bfloat16 has a wider range)" if scales_loss else ""
    return f"likely cause: {cause}{overflow}"
