"""Faults while a run goes on: each ends it with one line, and nothing complete is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import lorakit
from lorakit.training.checkpoint import checkpoints, load_checkpoint
from tests.e2e.processes import launch, start
from tests.e2e.shared_runs import wait_for
from tests.training.processes import NO_DISK, Ended, Launcher
from tests.training.runs import (
    adapter_bytes,
    learning,
    log_lines,
    run_json,
    tree,
    write_recipe_file,
)

SETTINGS = {"train__epochs": 3, "train__save_every_steps": 3, "train__save_total_limit": None}


@pytest.fixture(scope="module")
def recipe(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with 12 steps."""
    folder = tmp_path_factory.mktemp("faults")
    return write_recipe_file(folder, tiny_llama, "completion", **SETTINGS)


@pytest.fixture(scope="module")
def whole(recipe: Path, launcher: Launcher) -> Path:
    """The uninterrupted run."""
    folder = recipe.parent / "whole"
    assert train(launcher, recipe, folder).code == 0
    return folder


def train(launcher: Launcher, recipe: Path, folder: Path, *more: object, **faults: object) -> Ended:
    arguments = ["train", recipe, "--output-dir", folder, "--resume", "auto", *more]
    return launcher.run(arguments, **faults)  # type: ignore[arg-type]


def failed(ended: Ended, *parts: str) -> None:
    assert ended.code == 1, ended.err
    assert "Traceback" not in ended.err + ended.out
    (line,) = [x for x in ended.err.splitlines() if x.startswith("error: ")]
    assert "the traceback is in" not in line
    for part in parts:
        assert part in line


def assert_intact(run: Path) -> None:
    """No temporary files, complete checkpoints, and metrics.jsonl in whole lines."""
    assert list(run.rglob(".*")) == []
    for checkpoint in checkpoints(run / "checkpoints"):
        load_checkpoint(checkpoint)
    if (run / "metrics.jsonl").is_file():
        learning(run)


def assert_continues(launcher: Launcher, recipe: Path, run: Path, whole: Path) -> None:
    ended = train(launcher, recipe, run)
    assert ended.code == 0, ended.err
    assert adapter_bytes(run) == adapter_bytes(whole)
    assert learning(run) == learning(whole)
    assert run_json(run)["exit_reason"] == "completed"


def size(file: Path) -> int:
    return file.stat().st_size


LIMITS: dict[str, tuple[Callable[[Path], int], str]] = {
    "recipe.yaml": (lambda whole: size(whole / "recipe.yaml") * 9 // 10, "recipe.yaml: "),
    "run.json": (lambda whole: size(whole / "run.json") * 9 // 10, "run.json: "),
    "a checkpoint": (
        lambda whole: size(whole / "checkpoints/step-3/state.json") - 9, "checkpoints/step-3: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", LIMITS)
def test_a_file_that_cannot_grow(
    what: str, recipe: Path, whole: Path, launcher: Launcher, tmp_path: Path
) -> None:
    limit, where = LIMITS[what]
    run = tmp_path / "run"
    failed(
        train(launcher, recipe, run, max_file_bytes=limit(whole)),
        f"{where}cannot be written: File too large; no checkpoint was written yet; raise the limit "
        "on file sizes (ulimit -f), then start the run again",
    )
    assert_intact(run)
    assert not (run / "adapter").exists()
    assert_continues(launcher, recipe, run, whole)


def test_metrics_that_cannot_grow(
    recipe: Path, whole: Path, launcher: Launcher, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    limit = max(map(size, (whole / "checkpoints/step-12").iterdir())) + 999
    changes = ["--set", "train.epochs=100", "--set", "train.save_every_steps=20"]
    ended = train(launcher, recipe, run, *changes, max_file_bytes=limit)
    failed(ended, "metrics.jsonl: cannot be written: File too large; last good checkpoint: ")
    assert_intact(run)
    assert run_json(run)["exit_reason"] == "failed"
    assert "metrics.jsonl: cannot be written" in run_json(run)["message"]


def blocks(folder: Path) -> int:
    return sum(-(-size(file) // 4096) for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("what", ["a checkpoint", "the adapter"])
def test_a_full_disk(
    what: str, recipe: Path, whole: Path, launcher: Launcher, tmp_path: Path
) -> None:
    """A real disk, too small for the run."""
    disk, run = tmp_path / "disk", tmp_path / "copy" / "run"
    disk.mkdir()
    missing = blocks(whole / "adapter") // 2
    if what == "a checkpoint":
        missing += blocks(whole) // 2
    ended = train(
        launcher, recipe, disk / "run",
        disk=(disk, (blocks(whole) - missing) * 4096, tmp_path / "copy"),
    )  # fmt: skip
    if ended.code == NO_DISK:
        pytest.skip("mounting a disk is not permitted")
    failed(
        ended, "cannot be written: No space left on device; last good checkpoint: ",
        "free some space, then resume with --resume auto",
    )  # fmt: skip
    assert ("run/adapter: cannot" in ended.err) == (what == "the adapter")
    assert_intact(run)
    assert run_json(run)["exit_reason"] in ("failed", None)  # None: not even that has room
    assert_continues(launcher, recipe, run, whole)


def after_step(run: Path, step: int, act: Callable[[], object]) -> Callable[[], bool]:
    """A condition that acts once the checkpoint of a step has been written and the run goes on."""

    def condition() -> bool:
        if (
            not (run / "checkpoints" / f"step-{step}").exists()
            or log_lines(run)[-1]["step"] <= step
        ):
            return False
        act()
        return True

    return condition


def remove(run: Path, aside: Path) -> None:
    run.rename(aside)
    shutil.rmtree(aside)


@pytest.mark.parametrize("how", ["deleted", "renamed"])
def test_the_output_directory_goes(
    how: str, recipe: Path, launcher: Launcher, tmp_path: Path
) -> None:
    run, aside = tmp_path / "run", tmp_path / "aside"
    act = (lambda: remove(run, aside)) if how == "deleted" else (lambda: run.rename(aside))
    ended = train(
        launcher, recipe, run, "--set", "train.epochs=2000",
        signal_when=after_step(run, 3, act), number=0,
    )  # fmt: skip
    (saved,) = checkpoints(run / "checkpoints")
    failed(ended, f"{run} was deleted or renamed during the run; saved {saved}; resume with")
    assert_intact(run)
    if how == "renamed":
        assert_intact(aside)
    changes = ["--set", "train.epochs=2000"]
    ended = train(
        launcher, recipe, run, *changes, at_call=("lorakit.training.loop:Loop.save", 2), number=2
    )
    assert ended.code == 130, ended.err
    assert f"resumed from {saved}" in ended.err


def test_another_directory_in_its_place(recipe: Path, launcher: Launcher, tmp_path: Path) -> None:
    run, aside = tmp_path / "run", tmp_path / "aside"

    def replace() -> None:
        run.rename(aside)
        run.mkdir()
        (run / "mine.txt").write_text("mine")

    ended = train(
        launcher, recipe, run, "--set", "train.epochs=2000",
        signal_when=after_step(run, 3, replace), number=0,
    )  # fmt: skip
    failed(ended, f"{run} was replaced by another directory", "move the original back")
    assert tree(run) == {"mine.txt": b"mine"}
    assert_intact(aside)


def test_another_host_takes_the_directory(recipe: Path, launcher: Launcher, tmp_path: Path) -> None:
    """Where no lock reaches it, a run notices that another one has started."""
    run = tmp_path / "run"

    def take() -> None:
        record = run_json(run) | {"process": "other-host:42:0123abcd"}
        new = tmp_path / "run.json"
        new.write_text(json.dumps(record))
        new.replace(run / "run.json")

    ended = train(
        launcher, recipe, run, "--set", "train.epochs=2000",
        signal_when=after_step(run, 3, take), number=0,
    )  # fmt: skip
    failed(ended, "another run (process 42 on other-host) has started in this directory; stopping")
    assert run_json(run)["process"].startswith("other-host")
    assert run_json(run)["exit_reason"] is None
    assert_intact(run)


def test_a_second_run_takes_over_where_no_lock_reaches(recipe: Path, tmp_path: Path) -> None:
    """It resumes while the first one goes on, which ends at its next checkpoint."""
    run = tmp_path / "run"
    command = ["-m", "lorakit", "train", recipe, "--output-dir", run, "--set", "train.epochs=2000"]
    there = {0: {"no_locks": True}}
    [first] = start(1, *command, faults=there)
    wait_for(run / "checkpoints" / "step-3")
    first.send_signal(signal.SIGSTOP)  # so that it writes nothing while the other one starts
    process = run_json(run)["process"]
    [(code, _, err)] = launch(1, *command, faults=there)
    assert (code, "contains a run at step-" in err) == (2, True), err
    [second] = start(1, *command, "--resume", "auto", faults=there)
    while run_json(run)["process"] == process:
        assert second.is_alive()
        time.sleep(0.02)
    first.send_signal(signal.SIGCONT)
    failed(first.wait(60), ") has started in this directory; stopping this one")
    second.send_signal(signal.SIGTERM)
    stopped = second.wait(60)
    assert stopped.code == 143, stopped.err
    assert "resumed from" in stopped.err
    assert run_json(run)["exit_reason"] == "interrupted"
    steps = [line["step"] for line in log_lines(run)]
    assert steps == list(range(1, len(steps) + 1))
    assert_intact(run)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_becomes_read_only(recipe: Path, launcher: Launcher, tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = run / "checkpoints"
    try:
        ended = train(
            launcher, recipe, run, "--set", "train.epochs=2000",
            signal_when=after_step(run, 3, lambda: folder.chmod(0o500)), number=0,
        )  # fmt: skip
    finally:
        folder.chmod(0o700)
    failed(ended, "cannot be written: Permission denied; last good checkpoint", "make it writable")


def test_a_clock_that_jumps(
    recipe: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing depends on the time of day."""
    real, calls = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: real() + (-1) ** next(calls) * 10**8)
    run = tmp_path / "run"
    lorakit.train(lorakit.load_recipe(recipe, overrides={"train.output_dir": str(run)}))
    assert adapter_bytes(run) == adapter_bytes(whole)
    assert learning(run) == learning(whole)
    assert all(
        line["tokens_per_second"] > 0
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "loss" in line
    )
