"""A member: one run of several that are trained together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from lorakit.distributed.build import build_strategy
from lorakit.distributed.strategy import Strategy
from lorakit.evaluation.scorer import Scorer
from lorakit.notes import Say
from lorakit.recipe.check import check_recipe
from lorakit.recipe.sections import Recipe
from lorakit.training.batching import build_batching
from lorakit.training.build import Objective, build_loop, build_objective, plan_lines
from lorakit.training.clock import Clock
from lorakit.training.control import Schedule, StopRequest
from lorakit.training.engine import StepResult
from lorakit.training.engine.eager import EagerEngine
from lorakit.training.execution import Execution
from lorakit.training.guard import Guard, naming_checkpoints
from lorakit.training.joint.base import SharedBase
from lorakit.training.joint.member_random import MemberRandom
from lorakit.training.joint.parts import Part
from lorakit.training.loop import Loop
from lorakit.training.output_dir import find_start
from lorakit.training.run import check_resumable, check_support, finished_run
from lorakit.training.session import RunResult, Session
from lorakit.training.setup import Prepared
from lorakit.training.steps import StepRequest, Steps
from lorakit.training.tracking import Display, Recorder


class NotesOnly(Display):
    """Passes on what a run says, but shows no progress: several bars would overwrite each other."""

    def __init__(self, say: Say, total_steps: int, done: int) -> None:
        super().__init__(total_steps, done, quiet=True)
        self._pass_on = say

    def say(self, text: str) -> None:
        self._pass_on(text)

    def log(self, line: dict[str, object]) -> None:
        """The lines are in metrics.jsonl."""


@dataclass
class Member:
    """``request`` is its next step, ``outcome`` how it ended; one of them is set once it has
    started. ``built`` has what it trains with, and the id of its batches, see
    ``SharedBase.share_steps``. ``scorer`` returns what its next evaluation measures with.
    ``has_advanced``: it has finished its work after the members' latest step (logging, evaluation,
    checkpoint)."""

    prepared: Prepared
    strategy: Strategy
    random: MemberRandom
    steps: Steps[RunResult]
    resumed: bool
    built: list[tuple[Objective, Loop, int]]
    request: StepRequest | None = None
    outcome: RunResult | Exception | None = None
    scorer: Callable[[], Scorer | None] = lambda: None
    has_advanced: bool = False

    @property
    def objective(self) -> Objective:
        return self.built[0][0]

    @property
    def batches(self) -> int:
        return self.built[0][2]

    def evaluates_like(self, other: Member) -> bool:
        """Whether the member, which has just taken a step, will evaluate what ``other`` does."""
        loop, data = self.built[0][1], self.prepared.evaluation
        due = loop.schedule.due(loop.progress.step + 1, loop.schedule.eval_every_steps)
        same_rows = data is not None and data is other.prepared.evaluation
        sizes = [each.prepared.recipe.eval_batch_size for each in (self, other)]
        return due and same_rows and sizes[0] == sizes[1] and not self.has_advanced

    @property
    def engine(self) -> EagerEngine:
        engine = self.built[0][1].engine
        assert isinstance(engine, EagerEngine)
        return engine

    def part(self) -> Part:
        rows = self.prepared.recipe.train.units_per_batch
        return Part(self.engine, self.objective, self.random, self.batches, rows)

    def advance(self, result: StepResult | Exception | None) -> None:
        """Give the member the result of its step, or the error in it, or None to stop it early; run
        it up to its next step or to its end."""
        with self.random.active(only_torch=self._only_logs(result)):
            try:
                if isinstance(result, Exception):
                    self.request = self.steps.throw(result)
                else:
                    self.request = self.steps.send(result)
            except StopIteration as end:
                self.request, self.outcome = None, end.value
            except Exception as error:
                self.request, self.outcome = None, error

    def _only_logs(self, result: StepResult | Exception | None) -> bool:
        """Whether nothing follows the step but the next one."""
        if not isinstance(result, StepResult) or not self.built:
            return False
        loop = self.built[0][1]
        schedule, step = loop.schedule, loop.progress.step + 1
        every = (schedule.eval_every_steps, schedule.save_every_steps)
        return not loop.stop and not any(schedule.due(step, steps) for steps in every)

    def abort(self, error: BaseException) -> None:
        """End the member because of an error of the whole process."""
        try:
            self.steps.throw(error)
        except BaseException:
            return


def start_member(
    recipe: Recipe,
    resume: str | None,
    base: SharedBase,
    stop: StopRequest,
    say: Say,
    display: Callable[[int, int], Display],
    clock: Clock,
) -> Member | RunResult:
    """Prepare the run of ``recipe`` on a view of ``base``; return its result if it is complete.
    ``clock`` is that of all members. Raises UserError as ``train`` does before it writes
    anything."""
    check_recipe(recipe)
    start = find_start(recipe, resume, say)
    if start.finished is not None:
        return finished_run(recipe, start.finished, say)
    check_support(recipe)
    strategy = build_strategy(recipe.model.dtype)
    strategy.check(recipe)
    prepared = base.prepare(recipe, say)
    batching = build_batching(prepared, strategy.device, strategy.share)
    check_resumable(prepared, batching, start, say)
    for line in plan_lines(prepared, batching):
        say(line)
    built: list[tuple[Objective, Loop, int]] = []

    def build(schedule: Schedule, recorder: Recorder, guard: Guard | None) -> Loop:
        base.place(prepared.model, strategy.device)
        objective = build_objective(prepared, strategy, say)
        loop = build_loop(
            prepared, objective, strategy, batching.steps, schedule, recorder, stop, guard, say,
            Execution("joint"),
        )  # fmt: skip
        if loop.evaluate is not None:
            loop.evaluate = replace(loop.evaluate, scorer=lambda: member.scorer())
        loop.clock = clock
        built.append((objective, loop, base.share_steps(prepared, loop.loader)))
        return loop

    session = Session(prepared, strategy, batching, start, build, display, say)
    resumed = start.checkpoint is not None
    member = Member(prepared, strategy, MemberRandom(), _steps(session), resumed, built)
    return member


def _steps(session: Session) -> Steps[RunResult]:
    with naming_checkpoints(Path(session.prepared.recipe.train.output_dir)):
        return (yield from session.steps())
