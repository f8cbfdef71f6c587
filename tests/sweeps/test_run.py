"""Sweeps in this process: each member equals its recipe trained alone."""

from __future__ import annotations

import json
import shutil
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

import lorakit
from lorakit.api import plan_sweep
from lorakit.errors import UserError
from tests.sweeps.files import sweep_json, write_sweep
from tests.training.processes import Launcher
from tests.training.runs import adapter_bytes, learning, run_json, tree

GRID = {"adapter.r": [1, 2], "train.seed": [1, 2]}


@pytest.mark.parametrize("joint", [False, True])
def test_members_equal_their_recipes_alone(joint: bool, still_bert: Path, tmp_path: Path) -> None:
    file = write_sweep(tmp_path, still_bert, "glue/sst2", grid=GRID, joint=joint)
    result = lorakit.sweep(file)
    out = tmp_path / "out"
    assert [member.status for member in result.members] == ["completed"] * 4
    assert sorted(path.name for path in out.iterdir()) == [
        "members", "plots", "sweep.json", "sweep.yaml", "table.csv", "table.md"
    ]  # fmt: skip
    for member in result.members:
        folder = out / "members" / member.name
        assert member.adapter_dir == folder / "adapter"
        assert member.metrics == run_json(folder)["metrics"]
        alone = lorakit.load_recipe(
            folder / "recipe.yaml", {"train.output_dir": str(tmp_path / "alone" / member.name)}
        )
        run = lorakit.train(alone)
        assert member.metrics == pytest.approx(run.metrics, abs=1e-5)
        if not joint:
            assert adapter_bytes(run.output_dir) == adapter_bytes(folder)
            assert learning(run.output_dir) == learning(folder)
    assert result.best is not None
    assert sweep_json(out, timed=True) == json.loads(json.dumps(result.as_json()))


def test_a_member_that_fails_does_not_end_the_others(still_bert: Path, tmp_path: Path) -> None:
    grid = {"adapter.target_modules": [["no_such"], ["q"]], "train.learning_rate": [1e-3, 1e15]}
    file = write_sweep(tmp_path, still_bert, "glue/sst2", grid=grid)
    result = lorakit.sweep(file)
    assert [member.status for member in result.members] == [
        "failed", "failed", "completed", "failed"
    ]  # fmt: skip
    first, _, completed, diverged = result.members
    assert first.error is not None and "no_such" in first.error
    assert diverged.error is not None and "is not finite" in diverged.error
    assert (diverged.metrics, diverged.adapter_dir) == ({}, None)
    assert result.best is completed
    assert [group.n for group in result.groups] == [0, 0, 1, 0]
    before = sweep_json(tmp_path / "out")
    lorakit.sweep(file, resume=True)
    assert sweep_json(tmp_path / "out") == before


def test_members_train_alone_if_joint_training_fails(
    still_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """By then nothing refers to what joint training had on the device."""
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def failing(*args: Any, **options: Any) -> None:
        base = torch.zeros(4)
        held.append(weakref.ref(base))
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("lorakit.sweeps.member_runs.train_joint", failing)
    grid = {"adapter.r": [1, 2]}
    file = write_sweep(tmp_path, still_bert, "glue/sst2", grid=grid, joint=True)
    hook = register_module_forward_pre_hook(lambda *_: alive.append(held[0]() is not None))
    try:
        result = lorakit.sweep(file)
    finally:
        hook.remove()
    assert [member.status for member in result.members] == ["completed"] * 2
    said = capsys.readouterr().err
    assert "joint training failed: RuntimeError: no such kernel" in said
    assert "training what is left one after another" in said
    assert alive and not any(alive)


def test_a_users_file_that_fails(still_bert: Path, in_tmp: Path) -> None:
    Path("my_task.py").write_text(
        "from lorakit.tasks.classification import Classification\n"
        "class Mine(Classification):\n"
        "    def eval_split(self, config):\n"
        "        return {}['no_such']\n"
    )
    file = write_sweep(in_tmp, still_bert, "classification", grid={"train.seed": [1]})
    keys = json.loads(file.read_text())
    settings = {"task.name": "./my_task.py:Mine", "task.text_column": "sentence"}
    with pytest.raises(UserError, match=r"my_task\.py:4: KeyError: 'no_such'"):
        lorakit.sweep({**keys, "set": settings})
    assert not (in_tmp / "out").exists()


@pytest.mark.parametrize(
    "metrics", [{"loss": "x"}, [1], {"loss": float("nan")}, {"loss": 10**400}], ids=str
)
def test_a_damaged_record_of_a_member(still_bert: Path, in_tmp: Path, metrics: object) -> None:
    file = write_sweep(in_tmp, still_bert, "glue/sst2", grid={"adapter.r": [1]})
    lorakit.sweep(file)
    record = in_tmp / "out" / "members" / "r=1" / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"metrics": metrics}))
    before = tree(in_tmp / "out")
    with pytest.raises(UserError, match=r"r=1/run\.json: metrics = .*allowed: finite numbers"):
        lorakit.sweep(file, resume=True)
    assert tree(in_tmp / "out") == before


@pytest.mark.parametrize("bad", [["bad.jsonl"], ["bad.jsonl", "good.jsonl"]])
def test_data_that_no_member_can_read(still_bert: Path, in_tmp: Path, bad: list[str]) -> None:
    """It fails before the start; if one member has other data, only its own run fails."""
    rows = [{"sentence": f"word {i}", "label": i % 2} for i in range(8)]
    for name, changes in (("good", {}), ("bad", {"label": None})):
        text = "".join(json.dumps(row | changes) + "\n" for row in rows)
        Path(f"{name}.jsonl").write_text(text)
    settings = {"task.name": "classification", "task.text_column": "sentence"}
    file = write_sweep(in_tmp, still_bert, "classification", grid={"task.path": bad})
    sweep = {**json.loads(file.read_text()), "set": settings}
    if len(bad) == 1:
        with pytest.raises(UserError, match=r"bad\.jsonl, row 1"):
            lorakit.sweep(sweep)
        assert not (in_tmp / "out").exists()
    else:
        result = lorakit.sweep(sweep)
        assert [member.status for member in result.members] == ["failed", "completed"]


def test_a_complete_sweep_is_kept(still_bert: Path, tmp_path: Path) -> None:
    file = write_sweep(tmp_path, still_bert, "glue/sst2", grid=GRID)
    lorakit.sweep(file)
    out = tmp_path / "out"
    before = tree(out)
    with pytest.raises(
        UserError, match=r"line 1: output_dir = .*: contains a sweep; continue it with --resume"
    ):
        lorakit.sweep(file)
    assert tree(out) == before
    shutil.rmtree(out / "plots")
    (out / "sweep.json").unlink()
    lorakit.sweep(file, resume=True)
    after = tree(out)
    assert {**after, "sweep.json": b""} == {**before, "sweep.json": b""}
    assert sweep_json(out)["best"] is not None


def test_a_member_whose_replacement_was_killed_is_put_back(
    still_bert: Path, tmp_path: Path
) -> None:
    file = write_sweep(tmp_path, still_bert, "glue/sst2", grid={"adapter.r": [1]})
    [member] = lorakit.sweep(file).members
    folder = tmp_path / "out/members" / member.name
    before = tree(folder)
    ended = Launcher(tmp_path).run(
        ["train", folder / "recipe.yaml", "--overwrite", "--set", "adapter.r=2"],
        at_event=("os.rename", r"\.step-4\.\w+\.new", 1),
    )
    assert ended.code == -signal.SIGKILL, ended.err
    said: list[str] = []
    result = lorakit.sweep(file, resume=True, say=said.append)
    assert any(f"{folder}: restored the earlier run" in line for line in said)
    assert result.members[0].status == "completed"
    after = tree(folder)
    assert {name: after.get(name) for name in before} == before


def test_resume_refuses_another_sweep(still_bert: Path, tmp_path: Path) -> None:
    file = write_sweep(tmp_path, still_bert, "glue/sst2", grid={"adapter.r": [1]})
    lorakit.sweep(file, resume=True)  # starts it
    before = tree(tmp_path / "out")
    changed = write_sweep(
        tmp_path, still_bert, "glue/sst2", grid={"adapter.r": [1, 2]}, metric="loss"
    )
    with pytest.raises(UserError) as caught:
        lorakit.sweep(changed, resume=True)
    assert str(caught.value) == (
        f"--resume: the sweep differs from {tmp_path / 'out' / 'sweep.yaml'}: grid.adapter.r: was "
        '[1], now [1, 2]; metric: was null, now "loss"'
    )
    file = write_sweep(tmp_path, still_bert, "glue/sst2", grid={"adapter.r": [1]}, max_joint=2)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace('"learning_rate": 0.01', '"learning_rate": 0.02'))
    with pytest.raises(UserError, match=r"train.learning_rate: was 0.01, now 0.02"):
        lorakit.sweep(file, resume=True)
    assert tree(tmp_path / "out") == before


def test_resume_compares_the_members(still_bert: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = json.loads(write_sweep(tmp_path, still_bert, "glue/sst2").read_text())
    seed, r = ("train.seed", [1]), ("adapter.r", [1, 2])
    lorakit.sweep({**keys, "grid": dict([r, seed])})
    before = tree(tmp_path / "out")
    with pytest.raises(UserError) as caught:
        lorakit.sweep({**keys, "grid": dict([seed, r])}, resume=True)
    assert str(caught.value) == (
        f"--resume: the sweep differs from {tmp_path / 'out' / 'sweep.yaml'}: names of members: "
        "was r=1,seed=1 and 1 more, now seed=1,r=1 and 1 more"
    )
    with pytest.raises(UserError, match=r"set\.train\.max_steps: was not set, now 5$"):
        lorakit.sweep({**keys, "grid": dict([r, seed]), "set": {"train.max_steps": 5}}, resume=True)
    assert tree(tmp_path / "out") == before
    notes: list[str] = []
    lorakit.sweep(
        {**keys, "grid": {"adapter.r": [2, 1], "train.seed": [1]}}, resume=True, say=notes.append
    )
    assert notes == ["2 of 2 members had already finished"]
    smaller = {"train.per_device_eval_batch_size": 2}  # an evaluation may not have fit
    lorakit.sweep({**keys, "grid": dict([r, seed]), "set": smaller}, resume=True, say=notes.append)
    assert notes[1:] == notes[:1]


def test_a_directory_with_something_else(still_bert: Path, tmp_path: Path) -> None:
    file = write_sweep(tmp_path, still_bert, "glue/sst2", grid={"adapter.r": [1]})
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(UserError, match="is not empty, and has no sweep; allowed: a new"):
            lorakit.sweep(file, resume=resume)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    shutil.rmtree(out)
    out.write_text("mine")
    with pytest.raises(UserError, match="a file with that name exists"):
        lorakit.sweep(file)
    below = json.loads(file.read_text()) | {"output_dir": str(out / "sweep")}
    with pytest.raises(UserError, match=r"output_dir = .*: (cannot be created|.* is a file)"):
        plan_sweep(below)


def test_an_error_before_the_start_writes_nothing(still_bert: Path, tmp_path: Path) -> None:
    keys = json.loads(write_sweep(tmp_path, still_bert, "glue/sst2").read_text())
    members = [
        {"set": {"task.name": "glue/stsb"}},
        {"set": {"train.seed": 1}},
    ]
    with pytest.raises(UserError, match="metric: the members' tasks have several; allowed: acc"):
        lorakit.sweep({**keys, "members": members})
    members = [{"set": {"adapter.method": "full"}}, {"set": {"train.seed": 1}}]
    with pytest.raises(UserError, match=r"joint = true: member method=full: "):
        lorakit.sweep({**keys, "members": members, "joint": True})
    with pytest.raises(
        UserError,
        match=r'metric = "bleu": the task glue/sst2 does not measure it; allowed: null, accuracy, loss$',
    ):
        lorakit.sweep({**keys, "members": members[1:], "metric": "bleu"})
    assert not (tmp_path / "out").exists()


def test_metrics_of_generated_text(tiny_llama: Path, tmp_path: Path) -> None:
    keys = json.loads(write_sweep(tmp_path, tiny_llama, grid={"train.seed": [1]}).read_text())
    scored = {"task.eval_generate": "end"}
    assert plan_sweep({**keys, "metric": "exact_match", "set": scored}).metric == "exact_match"
    with pytest.raises(UserError, match=r"allowed: null, exact_match, loss, perplexity$"):
        plan_sweep({**keys, "metric": "bleu", "set": scored})
    never = {"task.eval_generate": "never"}
    with pytest.raises(UserError, match=r"allowed: null, loss, perplexity$"):
        plan_sweep({**keys, "metric": "exact_match", "set": never})
