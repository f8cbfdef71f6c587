"""``--overwrite``: a new run replaces the one in its output directory, once it has started."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.cli.main import run
from lorakit.errors import TargetError, UserError
from lorakit.training.output_dir import exclusive_run, find_start
from lorakit.training.run import train
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
