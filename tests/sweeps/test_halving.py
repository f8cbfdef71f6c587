"""Successive halving: who stops, and when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.api import SweepResult, load_sweep, plan_sweep
from lorakit.errors import RecipeError, UserError
from lorakit.sweeps.halving import Halving
from lorakit.sweeps.results import MemberResult
from tests.sweeps.files import sweep_json, write_sweep
from tests.training.runs import run_json

RECIPE = """\
model: {name_or_path: no/such/model}
adapter: {r: 8, target_modules: [q, v]}
task: {name: glue/rte}
train: {output_dir: run}
"""
#: Rates at which a tiny model learns much, little, nothing, and something.
RATES = [1e-2, 1e-3, 1e-6, 3.0]


def halving(points: list[float], metric: str = "accuracy", **grid: list[Any]) -> Halving:
    Path("recipe.yaml").write_text(RECIPE)
    Path("out").mkdir(exist_ok=True)
    keys = {key.replace("__", "."): values for key, values in grid.items()}
    sweep = load_sweep({"recipe": "recipe.yaml", "output_dir": "out", "grid": keys})
    return Halving(points, SweepResult(sweep.output_dir, metric, sweep.members))


def test_the_worse_half_stops(in_tmp: Path) -> None:
    found = halving([0.25, 0.5], adapter__r=[1, 2, 3, 4, 5])
    names = [f"r={r}" for r in range(1, 6)]
    for name, accuracy in zip(names, [0.1, 0.5, 0.3, 0.2, 0.4], strict=True):
        found.started(name, 100)
        found.evaluated(name, 20, {"accuracy": 1.0, "loss": 1.0})
        found.evaluated(name, 25, {"accuracy": accuracy, "loss": 1.0})
    assert [found.stops(name, 25) for name in names] == [True, False, False, True, False]
    assert not found.stops("r=2", 30), "each point counts once"
    for name, accuracy in (("r=2", 0.5), ("r=3", 0.9), ("r=5", 0.4)):
        found.evaluated(name, 60, {"accuracy": accuracy, "loss": 1.0})
    assert [found.stops(name, 60) for name in ("r=2", "r=3", "r=5")] == [False, False, True]
    again = halving([0.25, 0.5], adapter__r=[1, 2, 3, 4, 5])
    assert [again.stops(name, 60) for name in names] == [True, False, False, True, True]


def test_of_equal_scores_the_lower_loss_is_better(in_tmp: Path) -> None:
    found = halving([10], adapter__r=[1, 2, 3, 4])
    losses = {"r=1": 0.6, "r=2": 0.4, "r=3": 0.5, "r=4": 0.3}
    for name, loss in losses.items():
        found.started(name, 20)
        found.evaluated(name, 10, {"accuracy": 0.75, "loss": loss})
    assert [found.stops(name, 10) for name in losses] == [True, False, True, False]


def test_a_stopped_member_has_the_metrics_that_were_compared(in_tmp: Path) -> None:
    """The model that it keeps, of its best step, may have better ones."""
    found = halving([10], adapter__r=[1, 2])
    for name, accuracy in (("r=1", 0.5), ("r=2", 0.6)):
        found.started(name, 20)
        found.evaluated(name, 10, {"accuracy": accuracy, "loss": 1.0})
    assert found.stops("r=1", 10)
    member = MemberResult("r=1", {}, "completed", {"accuracy": 0.7, "loss": 0.9})
    found.record(member)
    assert (member.status, member.metrics["accuracy"]) == ("stopped", 0.7)
    assert member.stopped_metrics == {"accuracy": 0.5, "loss": 1.0}


def test_groups_are_compared_by_their_means(in_tmp: Path) -> None:
    found = halving([10], "loss", adapter__r=[1, 2], train__seed=[1, 2])
    losses = {"r=1,seed=1": 1.0, "r=1,seed=2": 3.0, "r=2,seed=1": 1.5, "r=2,seed=2": 1.5}
    for name, loss in losses.items():
        found.started(name, 20)
        found.evaluated(name, 10, {"loss": loss})
    assert [found.stops(name, 10) for name in losses] == [True, True, False, False]


def test_members_that_run_one_after_another(in_tmp: Path) -> None:
    found = halving([10], adapter__r=[1, 2, 3])
    stopped = []
    for name, accuracy in (("r=1", 0.5), ("r=2", 0.4), ("r=3", 0.6)):
        found.started(name, 20)
        found.evaluated(name, 10, {"accuracy": accuracy})
        stopped.append(found.stops(name, 10))
        found.evaluated(name, 20, {"accuracy": 0.0})
        assert found.stops(name, 20) == stopped[-1]
    assert stopped == [False, True, False]


def test_the_loss_where_the_metric_is_measured_at_the_end_only(in_tmp: Path) -> None:
    found = halving([10], adapter__r=[1, 2])
    for name, loss in (("r=1", 0.5), ("r=2", 0.4)):
        found.started(name, 20)
        found.evaluated(name, 10, {"loss": loss})
    assert [found.stops(name, 10) for name in ("r=1", "r=2")] == [True, False]


@pytest.mark.parametrize("joint", [True, False])
def test_a_sweep(joint: bool, tiny_llama: Path, tmp_path: Path) -> None:
    file = write_sweep(
        tmp_path, tiny_llama, grid={"train.learning_rate": RATES}, joint=joint, halving=[2, 3],
        set={"train.eval_every_steps": 1},
    )  # fmt: skip
    result = lorakit.sweep(file)
    stopped = [member.stopped_at_step for member in result.members]
    assert stopped == [None, 2, 2, 3]
    assert [member.status for member in result.members] == ["completed", *["stopped"] * 3]
    assert result.best is result.members[0]
    assert [group.n for group in result.groups] == [1, 0, 0, 0]
    found = sweep_json(tmp_path / "out")["members"]
    assert "stopped_at_step" not in found[0]
    assert found[3]["stopped_at_step"] == 3
    assert found[2]["metrics"]["loss"] > 0
    for member in result.members[1:]:
        assert (
            run_json(tmp_path / "out" / "members" / member.name)["steps"] == member.stopped_at_step
        )
    before = sweep_json(tmp_path / "out")
    lorakit.sweep(file, resume=True)
    assert sweep_json(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([0.5, 0.25], "is not in ascending order"),
        ([0.5, 10], "mixes steps and fractions"),
        ([], "must not be empty"),
        ([1.5], "contains an invalid value"),
        (3, "wrong type"),
        (True, "member seed=1 is only evaluated at its end; allowed: with train.eval_every_steps"),
    ],
)
def test_wrong_points(points: object, message: str, tiny_llama: Path, tmp_path: Path) -> None:
    file = write_sweep(tmp_path, tiny_llama, grid={"train.seed": [1, 2]}, halving=points)
    with pytest.raises(RecipeError) as caught:
        load_sweep(file)
    assert "halving" in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(
    ("points", "every", "acts"),
    [
        ([3], 2, True),
        ([3], 3, True),
        ([0.5], 5, True),
        ([4], 3, False),
        (True, 6, False),
    ],
)
def test_a_halving_that_cannot_act_is_refused(
    points: object, every: int, acts: bool, in_tmp: Path
) -> None:
    """Runs of 6 steps: the evaluation at step 6 is that of the end."""
    Path("recipe.yaml").write_text(RECIPE)
    keys = {"train.max_steps": 6, "train.eval_every_steps": every}
    sweep = {
        "recipe": "recipe.yaml",
        "output_dir": "out",
        "set": keys,
        "grid": {"adapter.r": [1, 2]},
    }
    if acts:
        load_sweep({**sweep, "halving": points})
        return
    with pytest.raises(RecipeError, match="halving would never act"):
        load_sweep({**sweep, "halving": points})


def test_seeds_alone_are_not_halved(tiny_llama: Path, tmp_path: Path) -> None:
    file = write_sweep(
        tmp_path, tiny_llama, grid={"train.seed": [1, 2]}, halving=[2],
        set={"train.eval_every_steps": 1},
    )  # fmt: skip
    notes: list[str] = []
    plan_sweep(file, say=notes.append)
    assert "halving: the members differ only in their seeds, so none would be stopped" in notes


def test_not_on_a_cluster(tiny_llama: Path, tmp_path: Path) -> None:
    file = write_sweep(
        tmp_path, tiny_llama, grid={"train.seed": [1, 2]}, halving=[2],
        set={"train.eval_every_steps": 1},
    )  # fmt: skip
    with pytest.raises(UserError, match="--ray cannot be combined with halving"):
        lorakit.sweep(file, ray="local")
    with pytest.raises(UserError, match="--ray cannot be combined with halving"):
        plan_sweep(file, ray="local")
    assert json.loads(file.read_text())["halving"] == [2]


def test_a_lost_record_is_an_error(in_tmp: Path) -> None:
    """Members that were stopped would count as completed."""
    halving([10], adapter__r=[1, 2])
    stopped = {"members": [{"name": "r=1", "status": "stopped", "stopped_at_step": 10}]}
    Path("out/sweep.json").write_text(json.dumps(stopped))
    for text in (None, "{}", '{"r=1": {}}'):
        if text is not None:
            Path("out/halving.json").write_text(text)
        with pytest.raises(UserError, match=r"^out/halving\.json: does not have the member r=1"):
            halving([10], adapter__r=[1, 2])
    Path("out/halving.json").write_text('{"r=1": {"stopped_at_step": 10}}')
    again = halving([10], adapter__r=[1, 2])
    assert [again.stops("r=1", step) for step in (5, 10)] == [False, True]


@pytest.mark.parametrize(
    "text",
    [
        '{"a"',
        "[]",
        '{"r=1": {"rank": 1}}',
        '{"r=1": {"steps": ["x"]}}',
        '{"r=1": {"passed": -5}}',
        '{"r=1": {"passed": 1}}',
        '{"r=1": {"passed": 1e400}}',
        '{"r=1": {"steps": [1], "evaluations": [{"loss": NaN}]}}',
        '{"r=1": {"steps": [1], "evaluations": [{"loss": true}]}}',
        '{"r=1": {"steps": [1], "evaluations": [[1]]}}',
    ],
)
def test_a_corrupt_record_is_an_error(text: str, in_tmp: Path) -> None:
    Path("out").mkdir()
    Path("out/halving.json").write_text(text)
    with pytest.raises(UserError, match=r"^out/halving\.json: cannot be read"):
        halving([10], adapter__r=[1, 2])


def test_a_point_after_the_end_is_an_error(in_tmp: Path) -> None:
    Path("recipe.yaml").write_text(RECIPE)
    keys = {"recipe": "recipe.yaml", "output_dir": "out", "grid": {"adapter.r": [1, 2]}}
    steps = {"train.max_steps": 60, "train.eval_every_steps": 5}
    with pytest.raises(RecipeError, match="ends at step 60, before the last point"):
        load_sweep({**keys, "set": steps, "halving": [6, 60]})
    load_sweep({**keys, "set": steps, "halving": [6, 59]})
