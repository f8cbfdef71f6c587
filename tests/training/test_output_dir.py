"""One run at a time per directory, and unexpected files in it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from lorakit.cli.main import run
from lorakit.errors import TrainingError, UserError
from lorakit.recipe.load import load_recipe
from lorakit.recipe.sections import Recipe
from lorakit.training.loop import Loop
from lorakit.training.output_dir import Start, exclusive_run, find_start
from lorakit.training.run import train
from lorakit.training.same_run import check_same_data
from tests.training.runs import recipe_for


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model: {{name_or_path: x}}\nadapter: {{}}\ntask: {{name: text, path: d.jsonl}}\n"
        f"train: {{output_dir: {tmp_path / 'run'}}}\n"
    )
    return load_recipe(file)


def test_a_second_run_is_refused_while_the_first_goes_on(recipe: Recipe) -> None:
    with (
        exclusive_run(recipe, Start()) as folder,
        pytest.raises(UserError, match="another run is writing to it"),
        exclusive_run(recipe, Start()),
    ):
        pass
    assert folder.is_dir()
    with exclusive_run(recipe, Start()):
        pass


def test_a_run_that_started_meanwhile_is_not_overwritten(recipe: Recipe) -> None:
    folder = Path(recipe.train.output_dir)
    (folder / "checkpoints/step-3").mkdir(parents=True)
    with pytest.raises(UserError, match="has just written to it"), exclusive_run(recipe, Start()):
        pass


@pytest.mark.parametrize("text", ["[]", "1", "null", "{", '{"exit_reason": "completed"}'])
def test_an_invalid_run_json_is_not_a_finished_run(recipe: Recipe, text: str) -> None:
    folder = Path(recipe.train.output_dir)
    (folder / "adapter").mkdir(parents=True)
    (folder / "run.json").write_text(text)
    assert find_start(recipe, "auto") == Start()


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("adapter: {}", "adapter: {method: './evil.py:Evil'}", 'method: was "./evil.py:Evil"'),
        ("name: text", "name: ./evil.py:Evil", 'task.name: was "./evil.py:Evil", now "text"'),
        ("name: text", "name: evil.yaml", 'task.name: was "evil.yaml", now "text"'),
        ("name: text", "name: '${EVIL}'", 'task.name: was "${EVIL}", now "text"'),
    ],
)  # fmt: skip
def test_code_that_only_the_output_directory_names_is_not_run(
    old: str, new: str, told: str, recipe: Recipe, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVIL", "./evil.py:Evil")
    (in_tmp / "evil.py").write_text("open('pwned', 'w')\nclass Evil: pass\n")
    (in_tmp / "evil.yaml").write_text("metrics: ./evil.py:Evil\n")
    text = (in_tmp / "recipe.yaml").read_text()
    assert old in text
    (in_tmp / "run/checkpoints/step-3").mkdir(parents=True)
    (in_tmp / "run/recipe.yaml").write_text(text.replace(old, new))
    with pytest.raises(UserError, match="the recipe differs from") as caught:
        find_start(recipe, "auto")
    assert told in str(caught.value)
    assert not (in_tmp / "pwned").exists()


@pytest.mark.parametrize(
    "record",
    [
        {"data": []}, {"data": {"train": 1}}, {"data": {"train": {"tokens": "x", "source": 1}}},
        {"hardware": {"processes": "2"}}, {"hardware": 1},
        {"exit_reason": "completed", "metrics": {"loss": "low"}, "steps": "9", "diverged": 1},
    ],
)  # fmt: skip
def test_a_record_of_wrong_types_is_ignored(recipe: Recipe, record: Any) -> None:
    folder = Path(recipe.train.output_dir)
    (folder / "adapter").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "adapter" / name).touch()
    (folder / "run.json").write_text(json.dumps(record))
    found = find_start(recipe, "auto").finished
    assert found == ({"exit_reason": "completed", "metrics": {}} if "steps" in record else None)
    data = {"train": {"source": "x", "fingerprint": "0", "tokens": 1}}
    if record.get("data") == {"train": {"tokens": "x", "source": 1}}:
        with pytest.raises(UserError, match="the train data has changed"):
            check_same_data(data, folder / "checkpoints" / "step-3", print)
    else:
        check_same_data(data, folder / "checkpoints" / "step-3", print)


def test_what_the_same_launcher_has_started_continues(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without ``--resume``, and unlike a run in the same directory that another one started."""
    folder, said = Path(recipe.train.output_dir), list[str]()
    (folder / "adapter").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "adapter" / name).touch()
    finished = {"exit_reason": "completed", "launch": "/logs/first"}
    (folder / "run.json").write_text(json.dumps(finished))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/logs/other/attempt_1/0/error.json")
    with pytest.raises(UserError, match="contains a finished run"):
        find_start(recipe, None, said.append)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/logs/first/attempt_1/0/error.json")
    assert find_start(recipe, None, said.append).finished == finished
    assert said == ["restarted by the launcher: continuing as with --resume auto"]
    assert find_start(recipe, "auto", said.append).finished == finished
    assert len(said) == 1


def test_a_pipe_in_place_of_the_record_is_not_read(recipe: Recipe) -> None:
    folder = Path(recipe.train.output_dir)
    folder.mkdir()
    os.mkfifo(folder / "run.json")
    assert find_start(recipe, "auto") == Start()


@pytest.mark.parametrize("name", ["sweep.yaml", "sweep.json"])
def test_the_directory_of_a_sweep_is_refused(
    name: str, recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Those of its members are not."""
    folder = Path(recipe.train.output_dir)
    (folder / "members/r-1").mkdir(parents=True)
    (folder / name).touch()
    message = f"train.output_dir: {folder}: contains a sweep; choose another directory"
    for resume, overwrite in ((None, False), ("auto", False), (None, True)):
        with pytest.raises(UserError) as caught:
            find_start(recipe, resume, overwrite=overwrite)
        assert str(caught.value) == message
    for options in ([], ["--overwrite"]):
        assert run(["train", str(tmp_path / "recipe.yaml"), *options]) == 2
        assert ": contains a sweep; choose another directory\n" in capsys.readouterr().err
    member = {"train.output_dir": str(folder / "members/r-1")}
    assert find_start(load_recipe(tmp_path / "recipe.yaml", member), None) == Start()


def test_a_directory_that_cannot_be_created(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    train = recipe.train.model_copy(update={"output_dir": str(tmp_path / "file/run")})
    recipe = recipe.model_copy(update={"train": train})
    with pytest.raises(UserError, match=r"train\.output_dir"), exclusive_run(recipe, Start()):
        pass


def test_a_directory_that_is_deleted_before_the_adapter_is_written(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = Loop.finish

    def deletes(loop: Loop) -> dict[str, float]:
        found = finish(loop)
        shutil.rmtree(tmp_path / "run")
        return found

    monkeypatch.setattr(Loop, "finish", deletes)
    adapter = tmp_path / "run" / "adapter"
    message = f"was deleted or renamed during the run; saved {adapter}$"
    with pytest.raises(TrainingError, match=message):
        train(recipe_for(tmp_path, tiny_llama, "completion"))
    assert (adapter / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", ["adapter", "checkpoints"])
def test_a_file_in_place_of_a_directory(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, tiny_llama, "completion")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to("nowhere")
    with pytest.raises(UserError, match=f"/{name}: exists and is not a directory"):
        train(recipe)
    assert [file.name for file in (tmp_path / "run").iterdir()] == [name]


def test_a_directory_whose_name_is_too_long(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, tiny_llama, "completion", train__output_dir="x" * 300)
    with pytest.raises(UserError, match=r"train\.output_dir.*: cannot be created: File name too"):
        train(recipe)
