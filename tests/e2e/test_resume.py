"""A run that was stopped at any moment, in any way, ends like an uninterrupted one."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorakit.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from tests.training.processes import Ended, Launcher
from tests.training.runs import (
    adapter_bytes,
    checkpoint_names,
    learning,
    run_json,
    tree,
    write_recipe_file,
)

SETTINGS = {
    "adapter__lora_dropout": 0.1,
    "train__epochs": 8,
    "train__log_every_steps": 2,
    "train__save_every_steps": 3,
    "train__eval_every_steps": 4,
}


@pytest.fixture(scope="module")
def recipe(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with 32 steps, dropout and shuffling."""
    folder = tmp_path_factory.mktemp("resume")
    return write_recipe_file(folder, tiny_llama, "completion", **SETTINGS)


@pytest.fixture(scope="module")
def whole(recipe: Path, launcher: Launcher) -> Path:
    """The uninterrupted run."""
    folder = recipe.parent / "whole"
    assert train(launcher, recipe, folder).code == 0
    return folder


def train(
    launcher: Launcher, recipe: Path, folder: Path, *more: object, **signals: object
) -> Ended:
    arguments = ["train", recipe, "--output-dir", folder, *more]
    return launcher.run(arguments, **signals)  # type: ignore[arg-type]


def assert_same(run: Path, whole: Path) -> None:
    assert adapter_bytes(run) == adapter_bytes(whole)
    assert learning(run) == learning(whole)
    ours, theirs = run_json(run), run_json(whole)
    assert ours["exit_reason"] == "completed"
    for key in ("steps", "trained_tokens", "metrics", "best_step", "data", "seed"):
        assert ours[key] == theirs[key]
    assert checkpoint_names(run) == checkpoint_names(whole)


def test_sigkill_at_random_moments(
    recipe: Path, whole: Path, launcher: Launcher, tmp_path: Path
) -> None:
    moments, kills = random.Random(5), 0
    for index in range(3):
        run = tmp_path / f"run-{index}"
        for _ in range(3):
            before = checkpoints(run / "checkpoints")
            ended = train(
                launcher, recipe, run, "--resume", "auto",
                signal_when=lambda run=run, before=before: checkpoints(run / "checkpoints") != before,
                delay_seconds=moments.random() * 0.12,
            )  # fmt: skip
            kills += ended.code == -signal.SIGKILL
            if ended.code == 0:
                break
        ended = train(launcher, recipe, run, "--resume", "auto")
        assert ended.code == 0, ended.err
        assert_same(run, whole)
    assert kills >= 3


#: Where a kill could leave something half done: an operation on a path, and which of them.
EVENTS = {
    "no checkpoint yet": ("os.mkdir", r"/\.step-3\.", 1),
    "before a checkpoint's last file": ("open", r"/\.step-6\..*/state\.json", 1),
    "a checkpoint complete, not renamed": ("os.rename", r"/\.step-9\.\w+\.new", 1),
    "renamed, the old ones still there": ("os.rename", r"/\.step-3\.\w+\.removed", 1),
    "an old one renamed, not deleted": ("shutil.rmtree", r"/\.step-3\.\w+\.removed", 1),
    "the adapter incomplete": ("open", r"/\.adapter\..*/adapter_config\.json", 1),
    "the adapter complete, not renamed": ("os.rename", r"/\.adapter\.\w+\.new", 1),
    "all but run.json": ("os.rename", r"/\.run\.json\.\w+\.new", 2),
}
CALLS = {
    "before an evaluation": ("lorakit.training.control:Evaluator.__call__", 3),
    "measured, not recorded": ("lorakit.training.tracking:Recorder.evaluation", 5),
    "before the final evaluation": ("lorakit.training.loop:Loop.finish", 1),
    "before the adapter": ("lorakit.training.adapter_export:save_adapter", 1),
}
POINTS = {
    **{name: {"at_event": event} for name, event in EVENTS.items()},
    **{name: {"at_call": call} for name, call in CALLS.items()},
}


@pytest.mark.parametrize("point", POINTS)
def test_sigkill_at_critical_points(
    point: str, recipe: Path, whole: Path, launcher: Launcher, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert train(launcher, recipe, run, **POINTS[point]).code == -signal.SIGKILL
    ended = train(launcher, recipe, run, "--resume", "auto")
    assert ended.code == 0, ended.err
    assert_same(run, whole)
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_ends(
    number: int, code: int, recipe: Path, whole: Path, launcher: Launcher, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ended = train(
        launcher,
        recipe,
        run,
        number=number,
        at_call=("lorakit.training.engine.eager:EagerEngine.step", 11),
    )
    assert ended.code == code
    assert ended.out == ""
    announced, saved, advice = ended.err.splitlines()[-3:]
    assert announced.startswith(f"received {signal.Signals(number).name}: stopping after saving")
    assert saved == f"interrupted at step 11 of 32; saved {run}/checkpoints/step-11"
    command = ["lorakit", "train", str(recipe), "--output-dir", str(run), "--resume", "auto"]
    assert shlex.split(advice.removeprefix("resume with: ")) == command
    assert "error: " not in ended.err
    assert "Traceback" not in ended.err
    record = run_json(run)
    assert record["exit_reason"] == "interrupted"
    assert record["steps"] == 11
    assert checkpoint_names(run) == ["step-11", "step-9"]
    assert not (run / "adapter").exists()
    assert train(launcher, recipe, run, "--resume", "auto").code == 0
    assert_same(run, whole)


@pytest.mark.parametrize("call", [1, 8])
def test_a_signal_during_an_evaluation(
    call: int, recipe: Path, whole: Path, launcher: Launcher, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    point = ("lorakit.training.control:evaluate_model", call)
    ended = train(launcher, recipe, run, number=signal.SIGINT, at_call=point)
    assert ended.code == 130
    assert f"interrupted at step {4 * call} of 32" in ended.err
    assert run_json(run)["exit_reason"] == "interrupted"
    assert train(launcher, recipe, run, "--resume", "auto").code == 0
    assert_same(run, whole)


def test_signal_then_kill_during_the_same_evaluation(
    recipe: Path, whole: Path, launcher: Launcher, tmp_path: Path
) -> None:
    """The checkpoint of an interrupted evaluation is resumed twice; its log line occurs once."""
    run = tmp_path / "run"
    point = ("lorakit.training.control:evaluate_model", 2)
    train(launcher, recipe, run, number=signal.SIGINT, at_call=point)
    step = ("lorakit.training.engine.eager:EagerEngine.step", 1)
    assert train(launcher, recipe, run, "--resume", "auto", at_call=step).code == -9
    assert train(launcher, recipe, run, "--resume", "auto").code == 0
    assert_same(run, whole)


def test_the_best_weights_survive_a_kill(
    tiny_llama: Path, launcher: Launcher, tmp_path: Path
) -> None:
    """The loss is lowest early, and the run is killed much later."""
    settings = {
        **SETTINGS,
        "train__learning_rate": 3.0,
        "train__lr_scheduler": "constant",
        "train__max_grad_norm": None,
        "train__eval_every_steps": 2,
    }
    recipe = write_recipe_file(tmp_path, tiny_llama, "completion", **settings)
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(launcher, recipe, whole).code == 0
    best = run_json(whole)["best_step"]
    assert best < 20
    point = ("lorakit.training.engine.eager:EagerEngine.step", 27)
    assert train(launcher, recipe, run, at_call=point).code == -9
    assert train(launcher, recipe, run, "--resume", "auto").code == 0
    assert_same(run, whole)
    assert run_json(run)["best_step"] == best


def test_an_encoder_and_its_head(tiny_bert: Path, launcher: Launcher, tmp_path: Path) -> None:
    """The head is random at each start, and the base has dropout."""
    recipe = write_recipe_file(tmp_path, tiny_bert, "glue/sst2", **SETTINGS)
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(launcher, recipe, whole).code == 0
    point = ("lorakit.training.engine.eager:EagerEngine.step", 15)
    assert train(launcher, recipe, run, at_call=point).code == -9
    assert train(launcher, recipe, run, "--resume", "auto").code == 0
    assert_same(run, whole)


def test_sgd_and_no_validation(tiny_llama: Path, launcher: Launcher, tmp_path: Path) -> None:
    """An optimizer without state; without evaluations the last model is the result."""
    settings = {**SETTINGS, "train__optimizer": "sgd", "train__eval_every_steps": None}
    recipe = write_recipe_file(tmp_path, tiny_llama, "completion", **settings)
    (tmp_path / "data" / "validation.jsonl").unlink()
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(launcher, recipe, whole).code == 0
    assert run_json(whole)["metrics"] == {}
    assert run_json(whole)["best_step"] is None
    point = ("lorakit.training.engine.eager:EagerEngine.step", 15)
    assert train(launcher, recipe, run, at_call=point).code == -9
    assert train(launcher, recipe, run, "--resume", "auto").code == 0
    assert_same(run, whole)


def copied(whole: Path, folder: Path, *drop: str) -> Path:
    import shutil

    shutil.copytree(whole, folder)
    for name in drop:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def test_from_a_named_checkpoint(
    recipe: Path, whole: Path, launcher: Launcher, tmp_path: Path
) -> None:
    """Resume from an older checkpoint, and from one in another directory."""
    run = tmp_path / "run"
    point = ("lorakit.training.engine.eager:EagerEngine.step", 14)
    train(launcher, recipe, run, at_call=point)
    assert checkpoint_names(run) == ["step-12", "step-9"]
    ended = train(launcher, recipe, tmp_path / "other", "--resume", run / "checkpoints" / "step-9")
    assert ended.code == 0, ended.err
    assert adapter_bytes(tmp_path / "other") == adapter_bytes(whole)
    ended = train(launcher, recipe, run, "--resume", run / "checkpoints" / "step-9")
    assert ended.code == 0, ended.err
    assert_same(run, whole)


def test_resuming_an_older_checkpoint_deletes_later_ones(
    recipe: Path, whole: Path, launcher: Launcher, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    point = ("lorakit.training.engine.eager:EagerEngine.step", 14)
    train(launcher, recipe, run, at_call=point)
    old = run / "checkpoints" / "step-9"
    assert (
        train(
            launcher,
            recipe,
            run,
            "--resume",
            old,
            at_call=("lorakit.training.engine.eager:EagerEngine.step", 2),
        ).code
        == -9
    )
    assert checkpoint_names(run) == ["step-9"]
    assert train(launcher, recipe, run, "--resume", "auto").code == 0
    assert_same(run, whole)


def test_a_run_directory_stands_for_its_newest_checkpoint(
    recipe: Path, whole: Path, launcher: Launcher, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    point = ("lorakit.training.engine.eager:EagerEngine.step", 14)
    train(launcher, recipe, run, at_call=point)
    ended = train(launcher, recipe, run, "--resume", run)
    assert ended.code == 0, ended.err
    assert "resumed from" in ended.err
    assert "step-12" in ended.err
    assert_same(run, whole)


def test_another_run_is_not_overwritten_from_a_checkpoint(
    recipe: Path, whole: Path, launcher: Launcher, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(launcher, recipe, run, at_call=("lorakit.training.engine.eager:EagerEngine.step", 5))
    before = tree(run)
    checkpoint = whole / "checkpoints" / "step-30"
    refused(train(launcher, recipe, run, "--resume", checkpoint), str(run), "a run at step-3")
    assert tree(run) == before


def test_auto_on_an_empty_directory_starts_a_run(
    recipe: Path, whole: Path, launcher: Launcher, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    assert train(launcher, recipe, tmp_path / "run", "--resume", "auto").code == 0
    assert_same(tmp_path / "run", whole)


def test_auto_on_a_completed_run_does_nothing(
    recipe: Path, whole: Path, launcher: Launcher
) -> None:
    before = tree(whole)
    ended = train(launcher, recipe, whole, "--resume", "auto", "--json")
    assert ended.code == 0
    assert "the run is complete" in ended.err
    assert json.loads(ended.out)["metrics"] == run_json(whole)["metrics"]
    assert tree(whole) == before


def refused(ended: Ended, *parts: str) -> None:
    assert ended.code == 2, ended.err
    assert ended.out == ""
    assert "Traceback" not in ended.err
    (line,) = [x for x in ended.err.splitlines() if x.startswith("error: ")]
    for part in parts:
        assert part in line


def test_a_run_is_never_overwritten(recipe: Path, whole: Path, launcher: Launcher) -> None:
    before = tree(whole)
    refused(train(launcher, recipe, whole), str(whole), "a finished run", "another directory")
    assert tree(whole) == before


def test_an_unfinished_run_is_not_overwritten_either(
    recipe: Path, whole: Path, launcher: Launcher, tmp_path: Path
) -> None:
    run = copied(whole, tmp_path / "run", "run.json", "adapter")
    before = tree(run)
    refused(train(launcher, recipe, run), str(run), "step-32", "--resume auto")
    assert tree(run) == before


@pytest.mark.parametrize("unfinished", [False, True])
def test_another_recipe_is_named(
    unfinished: bool, recipe: Path, whole: Path, launcher: Launcher, tmp_path: Path
) -> None:
    run = copied(whole, tmp_path / "run", *(["run.json", "adapter"] if unfinished else []))
    before = tree(run)
    changes = ["--set", "train.learning_rate=0.5", "--set", "adapter.r=2"]
    ended = train(launcher, recipe, run, "--resume", "auto", *changes)
    refused(
        ended, "recipe.yaml", "train.learning_rate: was 0.01, now 0.5", "adapter.r: was 4, now 2"
    )
    assert "seed" not in ended.err
    assert tree(run) == before


def test_keys_that_do_not_affect_the_result_may_change(
    recipe: Path, whole: Path, launcher: Launcher, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    point = ("lorakit.training.engine.eager:EagerEngine.step", 14)
    train(launcher, recipe, run, at_call=point)
    changes = ["--set", "train.log_every_steps=5", "--set", "train.save_total_limit=null"]
    assert train(launcher, recipe, run, "--resume", "auto", *changes).code == 0
    assert adapter_bytes(run) == adapter_bytes(whole)


def test_other_data_is_refused(tiny_llama: Path, launcher: Launcher, tmp_path: Path) -> None:
    recipe = write_recipe_file(tmp_path, tiny_llama, "completion", **SETTINGS)
    run, rows = tmp_path / "run", tmp_path / "data" / "train.jsonl"
    train(launcher, recipe, run, at_call=("lorakit.training.engine.eager:EagerEngine.step", 14))
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join([*lines[:-1], lines[0]]) + "\n")
    before = tree(run)
    refused(train(launcher, recipe, run, "--resume", "auto"), "data", "train")
    assert tree(run) == before


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("how", ["cut", "missing", "flipped", "link"])
def test_a_corrupt_checkpoint_is_skipped_or_refused(
    how: str, named: bool, recipe: Path, whole: Path, launcher: Launcher, tmp_path: Path
) -> None:
    run = copied(whole, tmp_path / "run", "run.json", "adapter")
    newest = run / "checkpoints" / "step-32"
    broken = newest / "weights.safetensors"
    content = broken.read_bytes()
    broken.unlink()
    if how == "link":
        broken.symlink_to(whole / "checkpoints" / "step-32" / "weights.safetensors")
    elif how != "missing":
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        broken.write_bytes(flipped if how == "flipped" else content[: len(content) // 2])
    before = tree(run)
    if named:
        refused(train(launcher, recipe, run, "--resume", newest), "step-32", "weights.safetensors")
        assert tree(run) == before
        return
    ended = train(launcher, recipe, run, "--resume", "auto")
    assert ended.code == 0, ended.err
    (line,) = [x for x in ended.err.splitlines() if "step-32:" in x]
    assert line.startswith("warning: skipped: ")
    assert "weights.safetensors" in line
    assert f"resumed from {run}/checkpoints/step-30" in ended.err
    assert (run / "checkpoints" / "step-32.corrupt").is_dir()
    shutil.rmtree(run / "checkpoints" / "step-32.corrupt")
    assert_same(run, whole)


def test_a_checkpoint_of_another_model_is_skipped(
    recipe: Path, whole: Path, launcher: Launcher, tmp_path: Path
) -> None:
    """It is what its manifest says, but does not fit."""
    run = copied(whole, tmp_path / "run", "run.json", "adapter")
    snapshot = load_checkpoint(run / "checkpoints" / "step-32")
    weights = snapshot.engine.weights
    name = next(iter(weights))
    weights[name] = weights[name].double()
    shutil.rmtree(run / "checkpoints" / "step-32")
    save_checkpoint(run / "checkpoints", snapshot, None)
    ended = train(launcher, recipe, run, "--resume", "auto")
    assert ended.code == 0, ended.err
    assert "step-32: does not match this model and recipe" in ended.err
    shutil.rmtree(run / "checkpoints" / "step-32.corrupt")
    assert_same(run, whole)


def test_nothing_is_written_if_no_checkpoint_can_be_resumed(
    recipe: Path, whole: Path, launcher: Launcher, tmp_path: Path
) -> None:
    run = copied(whole, tmp_path / "run", "run.json", "adapter")
    for checkpoint in checkpoints(run / "checkpoints"):
        (checkpoint / "state.json").write_text("[]")
    before = tree(run)
    refused(train(launcher, recipe, run, "--resume", "auto"), "no checkpoint can be resumed")
    assert tree(run) == before


@pytest.mark.parametrize("name", ["nowhere", "data", ""])
def test_a_directory_without_a_checkpoint(
    name: str, recipe: Path, launcher: Launcher, tmp_path: Path
) -> None:
    named = recipe.parent / name if name else ""
    ended = train(launcher, recipe, tmp_path / "run", "--resume", named)
    refused(ended, "--resume", "not a checkpoint; allowed: auto")
    assert not (tmp_path / "run").exists()


def test_a_real_process_of_the_command_line(recipe: Path, whole: Path, tmp_path: Path) -> None:
    """``python -m lorakit``, killed from outside."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "lorakit", "train", str(recipe), "--output-dir", str(run)]
    with subprocess.Popen(
        [*command, "--set", "train.epochs=800"], stderr=subprocess.PIPE
    ) as process:
        while not checkpoints(run / "checkpoints") and process.poll() is None:
            time.sleep(0.005)
        time.sleep(0.05)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert checkpoints(run / "checkpoints")
    assert run_json(run)["exit_reason"] is None
    assert not (run / "adapter").exists()


@pytest.mark.slow
def test_smollm2_killed_three_times(smollm2: Path, launcher: Launcher, tmp_path: Path) -> None:
    recipe = write_recipe_file(
        tmp_path, smollm2, "completion", model__dtype="bfloat16", adapter__lora_dropout=0.1,
        task__max_length=32, task__limit_eval=2, train__max_steps=12, train__epochs=None,
        train__per_device_batch_size=2, train__save_every_steps=3, train__learning_rate=1e-3,
        train__eval_every_steps=6,
    )  # fmt: skip
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(launcher, recipe, whole).code == 0
    moments = random.Random(1)
    for _ in range(3):
        before = checkpoints(run / "checkpoints")
        train(
            launcher, recipe, run, "--resume", "auto",
            signal_when=lambda before=before: checkpoints(run / "checkpoints") != before,
            delay_seconds=moments.random(),
        )  # fmt: skip
    assert train(launcher, recipe, run, "--resume", "auto").code == 0
    assert_same(run, whole)
