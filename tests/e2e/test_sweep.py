"""``lorakit sweep`` as a process: output, exit codes, and kills at any moment."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shlex
import shutil
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lorakit.cli.main import run
from lorakit.training.checkpoint import checkpoints
from tests.sweeps.files import sweep_json, write_sweep
from tests.training.processes import Ended, Launcher
from tests.training.runs import adapter_bytes, learning, tree, write_recipe_file

GRID = {"adapter.r": [1, 2], "train.seed": [1, 2]}
SETTINGS = {"train.save_every_steps": 2, "adapter.lora_dropout": 0.1}


def printed(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    capsys.readouterr()
    assert run(["sweep", *map(str, arguments)]) == code
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert run(["sweep", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


def test_a_sweep_file(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_sweep(tmp_path, tiny_llama, grid=GRID)
    lines = printed(capsys, file).splitlines()
    assert lines[0].split() == ["r", "loss", "n", "parameters", "seconds", "best"]
    assert [line.split()[0] for line in lines[1:3]] == ["1", "2"]
    best = sweep_json(tmp_path / "out")["best"]
    adapter = tmp_path / "out" / "members" / best / "adapter"
    assert lines[3].startswith(f"best: {best}, loss ")
    assert lines[3].endswith(f": {adapter}")
    assert "contains a sweep; continue it with --resume" in refused(capsys, file)
    assert json.loads(printed(capsys, file, "--resume", "--json")) == sweep_json(
        tmp_path / "out", timed=True
    )


def test_a_recipe_with_a_grid(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe_file(tmp_path, tiny_llama, "completion", train__epochs=1)
    out = printed(
        capsys, recipe, "--grid", "adapter.target_modules=[q],[q,no_such]",
        "--set", "train.seed=3", "--metric", "perplexity", code=1,
    )  # fmt: skip
    lines = out.splitlines()
    assert lines[1].split()[-1] == "*"
    assert lines[3].startswith("failed: target_modules=q+no_such: adapter.target_modules")
    found = sweep_json(tmp_path / "run-sweep")
    assert [member["status"] for member in found["members"]] == ["completed", "failed"]
    assert found["metric"] == "perplexity"


def test_a_dry_run(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_sweep(tmp_path, tiny_llama, grid=GRID)
    before = tree(tmp_path)
    lines = printed(capsys, file, "--dry-run").splitlines()
    assert lines[0].split() == ["r=1,seed=1", "224", "parameters"]
    assert lines[4:] == [
        "job 1: 4 members together: r=1,seed=1 to r=2,seed=2",
        f"4 members, compared by loss, in {tmp_path / 'out'}",
    ]
    lines = printed(capsys, file, "--dry-run", "--joint", "False").splitlines()
    assert lines[4] == "job 1: r=1,seed=1 alone: joint is false"
    plan = json.loads(printed(capsys, file, "--dry-run", "--json"))
    assert list(plan) == ["output_dir", "metric", "members", "jobs"]
    assert plan["jobs"] == [{"members": [m["name"] for m in plan["members"]], "reason": None}]
    assert [member["trainable_parameters"] for member in plan["members"]] == [224, 224, 448, 448]
    assert tree(tmp_path) == before


def test_members_without_the_metric_cannot_be_compared(
    tiny_bert: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("my_task.py").write_text(
        "from lorakit.tasks.classification import Classification\n"
        "class Mine(Classification): pass\n"
    )
    mine = {"task.name": "./my_task.py:Mine", "task.text_column": "sentence"}
    file = write_sweep(in_tmp, tiny_bert, "classification", grid={"train.seed": [1]}, set=mine)
    assert run(["sweep", str(file), "--metric", "bleu"]) == 1
    note = "no member measured bleu, so the members cannot be compared"
    assert note in capsys.readouterr().err.splitlines()
    (member,) = sweep_json(in_tmp / "out")["members"]
    assert member["status"] == "completed"


def test_a_missing_validation_split_is_reported_before_members_start(
    tiny_bert: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = {"task.path": {"train": "data/train.jsonl"}, "task.text_column": "sentence"}
    file = write_sweep(in_tmp, tiny_bert, "classification", grid={"train.seed": [1]}, set=train)
    assert run(["sweep", str(file)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("no validation split: members will not be compared; hint: ")
    assert any(line.startswith("sweep finished in ") for line in lines)


def test_bad_sweeps_write_nothing(
    tiny_llama: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sweep(in_tmp, tiny_llama, grid={"adapter.r": [0, 1]})
    before = tree(in_tmp)
    assert refused(capsys, "sweep.yaml").startswith(
        "error: sweep.yaml, line 1: member r=0: adapter.r = 0: out of range; allowed: an integer > 0"
    )
    assert "is a recipe, not a sweep file" in refused(capsys, "recipe.yaml")
    assert "no such file" in refused(capsys, "nothing.yaml")
    assert tree(in_tmp) == before


@dataclass
class Whole:
    """A sweep file, and the directory of its uninterrupted run."""

    file: Path
    folder: Path


@pytest.fixture(scope="module", params=["joint", "alone"])
def whole(
    request: pytest.FixtureRequest,
    tiny_llama: Path,
    launcher: Launcher,
    tmp_path_factory: pytest.TempPathFactory,
) -> Whole:
    """A sweep of 4 members with 4 steps each, one of which fails."""
    grid = {**GRID, "adapter.r": [1, 2, 4], "train.seed": [1]}
    members = [{"name": "fails", "set": {"train.learning_rate": 1e15}}]
    folder = tmp_path_factory.mktemp("sweep")
    file = write_sweep(
        folder, tiny_llama, grid=grid, members=members, set=SETTINGS,
        joint=request.param == "joint",
    )  # fmt: skip
    ended = start(launcher, file, folder / "whole")
    assert ended.code == 1, ended.err
    return Whole(file, folder / "whole")


def start(launcher: Launcher, sweep: Path, folder: Path, *more: Any, **signals: Any) -> Ended:
    return launcher.run(["sweep", sweep, "--output-dir", folder, *more], **signals)


def assert_same(folder: Path, whole: Whole) -> None:
    text = json.dumps(sweep_json(folder)).replace(str(folder), str(whole.folder))
    assert json.loads(text) == sweep_json(whole.folder)
    for member in sweep_json(whole.folder)["members"]:
        if member["status"] == "completed":
            run, other = (path / "members" / member["name"] for path in (folder, whole.folder))
            assert adapter_bytes(run) == adapter_bytes(other)
            assert learning(run) == learning(other)
    assert (folder / "table.md").is_file()


def killed_and_resumed(
    launcher: Launcher, whole: Whole, folder: Path, event: tuple[str, str, int]
) -> Ended:
    """Start the sweep of ``whole`` in ``folder``, kill it at ``event``, and resume it."""
    ended = start(launcher, whole.file, folder, at_event=event)
    assert ended.code == -signal.SIGKILL, ended.err
    return start(launcher, whole.file, folder, "--resume")


#: Where a kill could leave something half done.
EVENTS = {
    "before anything": ("os.mkdir", r"/killed$", 1),
    "no sweep.yaml": ("os.rename", r"/\.sweep\.yaml\.\w+\.new", 1),
    "no sweep.json": ("os.rename", r"/\.sweep\.json\.\w+\.new", 1),
    "recipes incomplete": ("os.mkdir", r"/members/r=2,seed=1", 1),
    "a member complete, not recorded": ("os.rename", r"/\.sweep\.json\.\w+\.new", 3),
    "at a checkpoint": ("os.rename", r"/r=4,.*/\.step-2\.\w+\.new", 1),
    "a failure not recorded": ("os.rename", r"/\.sweep\.json\.\w+\.new", 5),
    "tables incomplete": ("os.rename", r"/\.table\.csv\.\w+\.new", 1),
    "plots incomplete": ("os.rename", r"/\.r\.svg\.\w+\.new", 1),
}
#: Those that are tested in each CI run.
QUICK = {"a member complete, not recorded", "at a checkpoint", "one member a checkpoint ahead"}


def points_of(events: Iterable[str]) -> list[Any]:
    """A joint sweep at each of them."""
    return [
        pytest.param("joint", point, marks=() if point in QUICK else pytest.mark.slow)
        for point in events
    ]


@pytest.mark.parametrize(
    ("whole", "point"),
    [*points_of(EVENTS), ("alone", "a member complete, not recorded")],
    indirect=["whole"],
)
def test_sigkill_at_critical_points(
    point: str, whole: Whole, launcher: Launcher, tmp_path: Path
) -> None:
    ended = killed_and_resumed(launcher, whole, tmp_path / "killed", EVENTS[point])
    assert ended.code == 1, ended.err
    assert_same(tmp_path / "killed", whole)


def test_a_kill_keeps_what_is_recorded(whole: Whole, launcher: Launcher, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(whole.folder, folder)
    second = ("os.rename", r"/\.sweep\.json\.\w+\.new", 2)
    ended = start(launcher, whole.file, folder, "--resume", at_event=second)
    assert ended.code == -signal.SIGKILL, ended.err
    statuses = [member["status"] for member in sweep_json(folder)["members"]]
    assert statuses == ["completed", "completed", "completed", "pending"]
    lines = [line for line in ended.err.splitlines() if "fails: " not in line]
    assert lines == ["3 of 4 members had already finished"]


@pytest.mark.slow
def test_sigkill_at_random_moments(whole: Whole, launcher: Launcher, tmp_path: Path) -> None:
    moments, kills, folder = random.Random(3), 0, tmp_path / "killed"
    for _ in range(4):
        before = list(folder.glob("members/*/checkpoints/*"))
        ended = start(
            launcher, whole.file, folder, "--resume",
            signal_when=lambda before=before: list(folder.glob("members/*/checkpoints/*")) != before,
            delay_seconds=moments.random() * 0.1,
        )  # fmt: skip
        kills += ended.code == -signal.SIGKILL
    assert kills
    assert start(launcher, whole.file, folder, "--resume").code == 1
    assert_same(folder, whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_what_runs(
    number: int, code: int, whole: Whole, launcher: Launcher, tmp_path: Path
) -> None:
    folder = tmp_path / "interrupted"
    member = folder / "members" / "r=2,seed=1"
    call = ("lorakit.training.loop:Loop.save", 4)  # the second member's first
    ended = start(launcher, whole.file, folder, at_call=call, number=number)
    assert ended.code == code, ended.err
    text, advice = ended.err.splitlines()[-2:]
    if json.loads(whole.file.read_text())["joint"]:
        ended_before = ["pending", "pending", "pending", "failed"]
        assert text.startswith("interrupted; 1 of 4 members")
    else:
        ended_before = ["completed", "pending", "pending", "pending"]
        assert text.startswith("r=2,seed=1: interrupted at step 3 of 4; saved ")
    assert text.endswith("; 1 of 4 members have finished")
    command = ["lorakit", "sweep", str(folder / "sweep.yaml"), "--resume"]
    assert advice == f"resume with: {shlex.join(command)}"
    assert [path.name for path in checkpoints(member / "checkpoints")] == ["step-2", "step-3"]
    assert [m["status"] for m in sweep_json(folder)["members"]] == ended_before
    assert start(launcher, whole.file, folder, "--resume").code == 1
    assert_same(folder, whole)


#: Where a kill could change who stops.
HALVING_EVENTS = {
    "a score not recorded": ("os.rename", r"/\.halving\.json\.\w+\.new", 2),
    "a decision not recorded": ("os.rename", r"/\.halving\.json\.\w+\.new", 6),
    "one member a checkpoint ahead": (
        "os.rename",
        r"/learning_rate=0.001/.*/\.step-2\.\w+\.new",
        1,
    ),
    "a stopped member incomplete": ("os.rename", r"/learning_rate=1e-06/\.adapter\.\w+\.new", 1),
}


@pytest.fixture(scope="module", params=["joint", "alone"])
def halved(
    request: pytest.FixtureRequest,
    tiny_llama: Path,
    launcher: Launcher,
    tmp_path_factory: pytest.TempPathFactory,
) -> Whole:
    """A sweep of which members stop at two points."""
    folder = tmp_path_factory.mktemp("halved")
    file = write_sweep(
        folder, tiny_llama, grid={"train.learning_rate": [0.01, 0.001, 1e-6, 3.0]},
        set={"train.eval_every_steps": 1, "train.save_every_steps": 1},
        halving=[2, 3], joint=request.param == "joint",
    )  # fmt: skip
    ended = start(launcher, file, folder / "whole")
    assert ended.code == 0, ended.err
    return Whole(file, folder / "whole")


@pytest.mark.parametrize(
    ("halved", "point"),
    [*points_of(HALVING_EVENTS), ("alone", "one member a checkpoint ahead")],
    indirect=["halved"],
)
def test_a_killed_halving_stops_the_same_members(
    point: str, halved: Whole, launcher: Launcher, tmp_path: Path
) -> None:
    ended = killed_and_resumed(launcher, halved, tmp_path / "killed", HALVING_EVENTS[point])
    assert ended.code == 0, ended.err
    assert_same(tmp_path / "killed", halved)


def test_two_sweeps_in_one_directory(whole: Whole, tmp_path: Path, launcher: Launcher) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    ended = start(launcher, whole.file, folder)
    os.close(handle)
    assert ended.code == 2
    assert ended.err.startswith(
        f"error: --output-dir: output_dir: {folder}: another sweep is writing to it"
    )
