"""Train several adapters over one frozen base in one process.

Each member is a run as ``lorakit train`` makes it, with files, evaluations and random numbers of
its own. Only the passes of a step are shared: the base computes the rows of all members at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from lorakit.distributed.group import alone, init_process_group
from lorakit.errors import Interrupted
from lorakit.host.openmp import yield_cores
from lorakit.models.fast_operators import use_fast_operators
from lorakit.notes import Say
from lorakit.recipe.sections import Recipe
from lorakit.training.build import wrap_model
from lorakit.training.clock import Clock
from lorakit.training.control import StopRequest, stop_request
from lorakit.training.deterministic import deterministic_kernels
from lorakit.training.engine import StepResult
from lorakit.training.engine.eager import CausalObjective
from lorakit.training.execution import replays_joint_passes
from lorakit.training.joint.base import SharedBase
from lorakit.training.joint.batches import Joiner
from lorakit.training.joint.evaluation import JointEvaluations
from lorakit.training.joint.graphs import JointGraphs
from lorakit.training.joint.members import Member, NotesOnly, start_member
from lorakit.training.joint.passes import JointPasses
from lorakit.training.joint.trunk import Trunk
from lorakit.training.memory import drop_frames
from lorakit.training.session import RunResult
from lorakit.training.tracking import Display

#: Gets a member's number and how it ended.
Finished = Callable[[int, RunResult | Exception], None]
#: Returns the part of a member's run that shows its progress, or what it has to say.
DisplayOf = Callable[[int], Callable[[int, int], Display]]
SayOf = Callable[[int], Say]
#: Gets a member's number, the steps that it has taken and its metrics.
StopAt = Callable[[int, int, dict[str, float] | None], bool]


@yield_cores()
def train_joint(
    recipes: Sequence[Recipe],
    resume: str | None,
    say: Say,
    finished: Finished,
    stop_at: StopAt | None = None,
    *,
    say_of: SayOf | None = None,
    display_of: DisplayOf | None = None,
) -> list[RunResult | Exception]:
    """Train the adapters of ``recipes``, of which any two ``can_join``, and return how each ended.

    Each run writes to its ``train.output_dir`` what ``train`` writes, with the same result.
    ``resume`` is None for new runs, or ``auto`` for each one's newest checkpoint. ``finished`` is
    called as soon as a run has ended; the error of one does not end the others, and has no
    traceback afterwards. After a signal, each running member saves a checkpoint, and Interrupted is
    raised.

    ``stop_at`` is asked before a member takes its next step if it has just been evaluated, with the
    metrics, or resumed, with None: true ends it there, as early stopping does. By then all running
    members have been evaluated that are due: they take their steps at the same time. At its last
    step a member is not asked.

    ``say_of`` and ``display_of`` return what ``train`` calls ``say`` and ``display`` for a member;
    by default its lines go to ``say``, after the name of its directory, and no progress is shown.

    If a launcher has started several processes, each trains the ``recipes`` that it is given.
    """
    init_process_group()
    say_of = say_of or (lambda index: _named(recipes[index], say))
    display_of = display_of or (lambda index: partial(NotesOnly, say_of(index)))
    deterministic = any(recipe.train.deterministic for recipe in recipes)
    with alone(), deterministic_kernels(deterministic), stop_request() as stop:
        run = _JointRun(recipes, resume, say, finished, stop_at, stop, say_of, display_of)
        try:
            with run.clock.paused():
                run.start()
            run.train()
        except BaseException as error:
            run.abort(error)
            raise
    return [run.outcomes[index] for index in range(len(recipes))]


class _JointRun:
    """``members`` are those that have not ended, by number; ``outcomes`` those of the others."""

    def __init__(
        self,
        recipes: Sequence[Recipe],
        resume: str | None,
        say: Say,
        finished: Finished,
        stop_at: StopAt | None,
        stop: StopRequest,
        say_of: SayOf,
        display_of: DisplayOf,
    ) -> None:
        self._say_of, self._display_of = say_of, display_of
        self._recipes, self._resume, self._say = recipes, resume, say
        self._finished, self._stop_at, self._stop = finished, stop_at, stop
        self.members: dict[int, Member] = {}
        self.outcomes: dict[int, RunResult | Exception] = {}
        self._passes: JointPasses | None = None
        self.clock = Clock()
        self._evaluations: JointEvaluations | None = None
        self._interrupted: Interrupted | None = None

    def start(self) -> None:
        """Prepare all members, run them up to their first steps, and build what they share."""
        base = SharedBase()
        for index, recipe in enumerate(self._recipes):
            if self._stop:
                raise Interrupted("interrupted before the first step", self._stop.signal_number)
            try:
                member = start_member(
                    recipe, self._resume, base, self._stop, self._say_of(index),
                    self._display_of(index), self.clock,
                )  # fmt: skip
            except Exception as error:
                self._end(index, error)
                continue
            if isinstance(member, RunResult):
                self._end(index, member)
            else:
                self.members[index] = member
        for index in list(self.members):
            self._advance(index, None)
        if self.members:
            self._passes = self._share(base)

    def train(self) -> None:
        """Take steps until all members have ended; raises Interrupted after a signal."""
        while self.members:
            self._stop_early()
            requests = {i: m.request for i, m in self.members.items() if m.request is not None}
            if not requests:
                break
            assert self._passes is not None
            results = self._passes.take(requests)
            if self._evaluations is not None:
                self._evaluations.forget()
            for member in self.members.values():
                member.has_advanced = False
            for index in sorted(results):
                self.members[index].has_advanced = True
                self._advance(index, results[index])
        if self._interrupted is not None:
            raise Interrupted(
                f"interrupted; {len(self.outcomes)} of {len(self._recipes)} runs have finished, "
                "the others have saved a checkpoint",
                self._stop.signal_number,
            ) from self._interrupted

    def abort(self, error: BaseException) -> None:
        """End the running members because of ``error``."""
        for member in self.members.values():
            member.abort(error)

    def _stop_early(self) -> None:
        if self._stop_at is None:
            return
        for index, member in list(self.members.items()):
            request = member.request
            assert request is not None
            if request.metrics is None and not member.resumed:
                continue
            member.resumed = False
            if self._stop_at(index, request.loaded.number, request.metrics):
                self._advance(index, None)

    def _advance(self, index: int, result: StepResult | Exception | None) -> None:
        member = self.members[index]
        member.advance(result)
        outcome = member.outcome
        if outcome is None:
            return
        del self.members[index]
        if self._passes is not None:
            self._passes.drop(index)
        if isinstance(outcome, Interrupted):
            self._interrupted = outcome
        else:
            self._end(index, outcome)

    def _end(self, index: int, outcome: RunResult | Exception) -> None:
        self.outcomes[index] = outcome
        self._finished(index, outcome)
        if isinstance(outcome, Exception):
            drop_frames(outcome)

    def _share(self, base: SharedBase) -> JointPasses:
        members = list(self.members.values())
        first = members[0]
        recipe, view = first.prepared.recipe, base.view()
        if first.strategy.device.type == "cpu" and recipe.train.gradient_checkpointing:
            # Dropout in a pass that is recomputed could not draw each member's numbers again.
            self._say("train.gradient_checkpointing: not used by joint passes on the CPU")
            train = recipe.train.model_copy(update={"gradient_checkpointing": False})
            recipe = recipe.model_copy(update={"train": train})
        base.place(view, first.strategy.device)
        objective = wrap_model(
            replace(first.prepared, recipe=recipe, model=view), first.strategy, self._say
        )
        if recipe.train.kernels == "auto":
            use_fast_operators(view, recomputes=bool(recipe.train.gradient_checkpointing))
        joiner = self._joiner()
        if isinstance(objective, CausalObjective):
            objective.longest_row = joiner.longest_row
        batches = {index: member.batches for index, member in self.members.items()}
        trunk = Trunk(view, {i: m.prepared for i, m in self.members.items()}, batches)
        if trunk.separate:
            self._say("members take their steps one after another: their experts are adapted")
        parts = {index: member.part() for index, member in self.members.items()}
        graphs, device = None, first.strategy.device
        if device.type == "cuda":
            replays = replays_joint_passes(first.prepared, device, len(members))
            graphs = JointGraphs(device, replays, self._say)
        self._evaluations = JointEvaluations(trunk, objective, parts, self._partners, self._say)
        for index, member in self.members.items():
            member.scorer = partial(self._evaluations.scorer, index)
        return JointPasses(trunk, objective, parts, joiner, graphs, self._say)

    def _partners(self, index: int) -> list[int]:
        own = self.members[index]
        return [other for other, each in self.members.items() if each.evaluates_like(own)]

    def _joiner(self) -> Joiner:
        members = list(self.members.values())
        tasks = [member.prepared.recipe.task for member in members]
        longest = None if tasks[0].packing else max(task.max_length for task in tasks)
        return Joiner(
            members[0].prepared.tokenizer.pad_token_id,
            max(getattr(member.objective, "longest_row", 0) for member in members) or 1,
            longest if members[0].strategy.device.type == "cuda" else None,
        )


def _named(recipe: Recipe, say: Say) -> Say:
    name = Path(recipe.train.output_dir).name
    return lambda text: say("\n".join(f"{name}: {line}" for line in text.splitlines()))
