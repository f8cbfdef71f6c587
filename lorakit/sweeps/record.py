"""How the members of a sweep are doing: recorded, and shown, by the main process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from lorakit.distributed.watch import Watch
from lorakit.errors import Interrupted
from lorakit.sweeps.directory import write_settings
from lorakit.sweeps.halving import Halving
from lorakit.sweeps.load import Sweep
from lorakit.sweeps.outcome import complete, fail
from lorakit.sweeps.progress import SweepProgress
from lorakit.sweeps.results import SweepResult
from lorakit.training.joint.members import NotesOnly
from lorakit.training.tracking import Display

#: What to do after a signal, or when a process was killed.
RESUME = "resume with --resume"


class Record(Protocol):
    """Receives events about members, identified by index, from the code that trains them."""

    def started(self, at: int) -> None: ...

    def note(self, at: int, text: str) -> None:
        """What a run has to say."""

    def say(self, text: str) -> None: ...

    def ended(self, at: int, error: str | None) -> None:
        """A member has finished, or failed with ``error``."""

    def display(self, at: int) -> Callable[[int, int], Display]:
        """Return the display for the member's ``train`` call."""


class MainRecord:
    """Writes ``sweep.json`` after each member."""

    def __init__(
        self,
        sweep: Sweep,
        result: SweepResult,
        progress: SweepProgress,
        halving: Halving | None = None,
    ) -> None:
        self._sweep = sweep
        self._folders = [Path(member.recipe.train.output_dir) for member in sweep.members]
        self._result, self._progress, self._halving = result, progress, halving

    def started(self, at: int) -> None:
        self._progress.started(self._result.members[at])

    def started_elsewhere(self, at: int) -> None:
        """Another process trains the member, whose files show the progress."""
        self.started(at)
        self._progress.follow(self._name(at), self._folders[at])

    def note(self, at: int, text: str) -> None:
        self._progress.note(self._name(at), text)

    def say(self, text: str) -> None:
        self._progress.say(text)

    def ended(self, at: int, error: str | None) -> None:
        own = self._result.members[at]
        if error is None:
            complete(own, self._folders[at])
            if self._halving is not None:
                self._halving.record(own)
        else:
            fail(own, error)
        write_settings(self._sweep)  # the directory may have been deleted
        self._result.write()
        self._progress.ended(own)

    def display(self, at: int) -> Callable[[int, int], Display]:
        return self._progress.display(self._name(at))

    def interrupted(self, error: Interrupted) -> Interrupted:
        """``error`` with the number of members that have ended, and how to resume."""
        members = self._result.members
        done = sum(own.status != "pending" for own in members)
        return Interrupted(
            f"{error.problem}; {done} of {len(members)} members have finished",
            error.signal_number,
            advice=RESUME,
        )

    def take_over(self, watch: Watch) -> None:
        """Record what the other processes have told since the last call."""
        for name, *arguments in watch.heard():
            getattr(self, name)(*arguments)

    def _name(self, at: int) -> str:
        return self._result.members[at].name


class RemoteRecord:
    """The record that another process has: sends everything there."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def started(self, at: int) -> None:
        self._watch.tell(("started_elsewhere", at))

    def note(self, at: int, text: str) -> None:
        self._watch.tell(("note", at, text))

    def say(self, text: str) -> None:
        self._watch.tell(("say", text))

    def ended(self, at: int, error: str | None) -> None:
        self._watch.tell(("ended", at, error))

    def display(self, at: int) -> Callable[[int, int], Display]:
        return partial(_NoEvaluations, partial(self.note, at))


class _NoEvaluations(NotesOnly):
    """Leaves evaluations to the files that the main process reads."""

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """They are in metrics.jsonl."""
