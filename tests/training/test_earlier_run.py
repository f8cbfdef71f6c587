"""``--overwrite``: a new run replaces the one in its output directory, once it has started."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import NoReturn

import pytest

import lorakit
from lorakit.cli.main import run
from lorakit.errors import TargetError, TrainingError, UserError, WriteFailed
from lorakit.training.output_dir import exclusive_run, find_start
from lorakit.training.run import train
from tests.training.processes import Launcher
from tests.training.runs import (
    adapter_bytes,
    changed,
    checkpoint_names,
    learning,
    recipe_for,
    run_json,
    tree,
    write_recipe_file,
)


def test_a_complete_run_is_replaced(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, tiny_llama, train__save_every_steps=3)
    other = changed(recipe, train__seed=8, train__epochs=1.0, adapter__r=2)
    fresh = changed(other, train__output_dir=str(tmp_path / "fresh"))
    train(recipe)
    folder = tmp_path / "run"
    (folder / "notes.txt").write_text("mine")
    before = tree(folder)
    with pytest.raises(UserError, match=r"contains a finished run; .* replace it with --overwrite"):
        train(other)
    with pytest.raises(UserError, match="--resume and --overwrite are mutually exclusive"):
        train(other, "auto", overwrite=True)
    with pytest.raises(TargetError, match="nowhere"):
        train(changed(other, adapter__target_modules=["nowhere"]), overwrite=True)
    assert tree(folder) == before
    train(other, overwrite=True)
    train(fresh)
    assert adapter_bytes(folder) == adapter_bytes(tmp_path / "fresh")
    assert learning(folder) == learning(tmp_path / "fresh")
    assert checkpoint_names(folder) == ["step-3", "step-4"]
    assert (folder / "notes.txt").read_text() == "mine"
    assert run_json(folder)["exit_reason"] == "completed"
    assert not [name for name in tree(folder) if "earlier-run" in name]


def test_a_failure_does_not_name_a_checkpoint_of_the_earlier_run(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> NoReturn:
        raise WriteFailed("weights: cannot be written", hint="free some space")

    recipe = recipe_for(tmp_path, tiny_llama)
    train(recipe)
    before = tree(tmp_path / "run")
    monkeypatch.setattr("lorakit.training.loop.save_checkpoint", fails)
    message = (
        "weights: cannot be written; no checkpoint was written yet, and the earlier run is back; "
        "free some space, then start again"
    )
    with pytest.raises(TrainingError, match=f"^{message}$"):
        train(changed(recipe, train__seed=8), overwrite=True)
    assert tree(tmp_path / "run") == before


def test_what_a_launcher_starts_again_names_its_own_checkpoint(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``--overwrite``, which the first start has followed."""

    def fails(*_: object) -> NoReturn:
        raise WriteFailed("weights: cannot be written", hint="free some space")

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/logs/launch/attempt_0/0/error.json")
    recipe = recipe_for(tmp_path, tiny_llama, train__save_every_steps=3)
    train(recipe)
    run = tmp_path / "run"
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / checkpoint_names(run)[-1])
    monkeypatch.setattr("lorakit.training.loop.save_checkpoint", fails)
    last = run / "checkpoints" / checkpoint_names(run)[-1]
    with pytest.raises(
        TrainingError, match=f"; last good checkpoint: {last}; free some space, then "
    ):
        train(recipe, overwrite=True)


def fail_after_writing(folder: Path, error: BaseException) -> None:
    assert not (folder / "run.json").exists()
    (folder / "adapter").mkdir()
    (folder / "run.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("{}")
    raise error


@pytest.mark.parametrize("keep", ["checkpoints", "adapter"])
def test_an_error_before_the_first_checkpoint_puts_it_back(
    keep: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """Of a run that is partial, or whose checkpoints were deleted."""
    recipe = recipe_for(tmp_path, tiny_llama, train__epochs=1)
    train(recipe)
    folder = tmp_path / "run"
    for path in (folder / "checkpoints", folder / "adapter"):
        if path.name != keep:
            for file in sorted(path.rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
            path.rmdir()
    before = tree(folder)
    for error in (UserError("refused"), RuntimeError("failed"), KeyboardInterrupt()):
        start = find_start(recipe, None, overwrite=True)
        assert start.replaces
        with pytest.raises(type(error)), exclusive_run(recipe, start):
            fail_after_writing(folder, error)
        assert tree(folder) == before


#: Just before its first checkpoint is complete.
FIRST_CHECKPOINT = (r"\.step-2\.\w+\.new", 1)
#: While files are moved: two checkpoints, four files, the directory of the checkpoints.
MOVED = r"\.earlier-run"


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    return Launcher(tmp_path_factory.mktemp("launcher"))


@pytest.fixture(scope="module")
def earlier(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a complete run with checkpoints at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("earlier")
    recipe_for(folder, tiny_llama, train__epochs=1, train__save_every_steps=2)
    train(lorakit.load_recipe(folder / "recipe.yaml"))
    return folder / "recipe.yaml"


def command(recipe: Path, run: Path, *more: str) -> list[str]:
    if not run.exists():
        shutil.copytree(recipe.parent / "run", run)
    return ["train", str(recipe), "--set", f"train.output_dir={run}", *more]


def replace_and_kill(launcher: Launcher, recipe: Path, run: Path, pattern: str, count: int) -> None:
    """Kill a run with another seed just before the ``count``-th rename of such a path."""
    ended = launcher.run(
        command(recipe, run, "--overwrite", "--set", "train.seed=8"),
        at_event=("os.rename", pattern, count),
    )
    assert ended.code == -signal.SIGKILL, ended.err


@pytest.mark.parametrize(
    ("pattern", "count"), [(MOVED, 1), (MOVED, 2), (MOVED, 5), (MOVED, 7), FIRST_CHECKPOINT]
)
def test_the_next_command_puts_it_back_after_a_kill(
    pattern: str, count: int, launcher: Launcher, earlier: Path, tmp_path: Path
) -> None:
    """Also if that command is killed while it does."""
    run = tmp_path / "run"
    replace_and_kill(launcher, earlier, run, pattern, count)
    assert tree(run) != tree(earlier.parent / "run")
    at = {FIRST_CHECKPOINT: 4, (MOVED, 7): 3}.get((pattern, count))
    if at is not None:
        ended = launcher.run(command(earlier, run), at_event=("os.rename", MOVED, at))
        assert ended.code == -signal.SIGKILL, ended.err
    ended = launcher.run(command(earlier, run))
    assert ended.code == 2
    assert f"{run}: restored the earlier run: the run replacing it" in ended.err
    assert "contains a finished run; choose another directory" in ended.err
    left = tree(run)  # and what the killed run has of its checkpoint
    before = tree(earlier.parent / "run")
    assert {name: left.get(name) for name in before} == before
    assert all(".new" in name for name in left.keys() - before.keys())
    ended = launcher.run(command(earlier, run, "--resume", "auto"))
    assert (ended.code, "restored the earlier" in ended.err) == (0, False)
    assert "the run is complete; nothing to do" in ended.err


@pytest.mark.parametrize("option", [["--resume", "auto"], ["--overwrite"]])
def test_every_option_puts_it_back_first(
    option: list[str], launcher: Launcher, earlier: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    replace_and_kill(launcher, earlier, run, *FIRST_CHECKPOINT)
    ended = launcher.run(command(earlier, run, *option))
    assert ended.code == 0, ended.err
    assert "restored the earlier run" in ended.err
    assert adapter_bytes(run) == adapter_bytes(earlier.parent / "run")
    assert not [name for name in tree(run) if "earlier-run" in name]


def test_it_stays_deleted_once_the_new_run_has_a_checkpoint(
    launcher: Launcher, earlier: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    replace_and_kill(launcher, earlier, run, r"\.earlier-run\.\w{8}\.removed", 1)
    assert (run / "checkpoints/.earlier-run").is_dir()
    again = command(earlier, run, "--resume", "auto", "--set", "train.seed=8")
    ended = launcher.run(again)
    assert (ended.code, "restored the earlier" in ended.err) == (0, False), ended.err
    assert run_json(run)["seed"] == 8
    assert not [name for name in tree(run) if "earlier-run" in name]


def test_it_is_not_put_back_while_the_new_run_goes_on(earlier: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command(earlier, run)
    recipe = lorakit.load_recipe(earlier, {"train.output_dir": str(run)})
    start = find_start(recipe, None, overwrite=True)
    with exclusive_run(recipe, start):
        for resume, overwrite in ((None, False), ("auto", False), (None, True)):
            with pytest.raises(UserError, match="another run is writing to it"):
                find_start(recipe, resume, overwrite=overwrite)
        assert (run / "checkpoints/.earlier-run/step-4").is_dir()


def test_what_is_no_run_is_left_alone(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, tiny_llama, train__epochs=1)
    folder = tmp_path / "run"
    for name in ("checkpoints/step-old", "lorakit", "data"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text("mine")
    (folder / "run.json").write_text('{"process": "of another tool"}')
    before = tree(folder)
    assert not find_start(recipe, None, overwrite=True).replaces
    train(recipe, overwrite=True)
    after = tree(folder)
    assert {name: after[name] for name in before if name != "run.json"} == {
        name: value for name, value in before.items() if name != "run.json"
    }


def test_the_command(tiny_llama: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write_recipe_file(in_tmp, tiny_llama, "completion", train__max_steps=2,
                                 train__epochs=None))  # fmt: skip
    for _ in range(2):
        assert run(["train", file, "--overwrite"]) == 0
    capsys.readouterr()
    assert run(["train", file, "--overwrite", "--resume", "auto"]) == 2
    message = "error: --resume and --overwrite are mutually exclusive; allowed: one of them\n"
    assert capsys.readouterr().err == message
    assert run_json(in_tmp / "run")["steps"] == 2
