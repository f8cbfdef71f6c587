"""Runs on a stream of rows."""

from __future__ import annotations

import gzip
import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.errors import BadRow, DataError, Interrupted, RecipeError, UserError
from lorakit.recipe.sections import Recipe
from lorakit.training.engine.eager import EagerEngine
from lorakit.training.run import dry_run, train
from tests.training.runs import (
    adapter_bytes,
    completion_rows,
    log_lines,
    recipe_for,
    run_json,
    tree,
    write_recipe_file,
    write_rows,
)


def streamed(folder: Path, model: Path, **changes: Any) -> Recipe:
    return recipe_for(
        folder, model,
        **({"task__streaming": True, "task__shuffle_buffer_rows": 10, "train__epochs": None,
            "train__max_steps": 6, "train__save_every_steps": 2} | changes),
    )  # fmt: skip


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_trains_and_resumes_exactly(
    tiny_llama: Path, tmp_path: Path, packing: bool
) -> None:
    changes = {"task__packing": packing, "train__per_device_batch_size": 2 if packing else 8}
    recipe = streamed(tmp_path, tiny_llama, **changes)
    said: list[str] = []
    train(recipe, say=said.append)
    run = Path(recipe.train.output_dir)
    unit = "bins of 128 tokens" if packing else "rows"
    assert any(
        f"a stream of rows, {2 if packing else 8} {unit} per step: 6 steps;" in s for s in said
    )
    record = run_json(run)
    assert (record["steps"], record["exit_reason"]) == (6, "completed")
    assert record["data"]["train"]["rows"] is record["data"]["train"]["tokens"] is None
    assert record["data"]["validation"]["rows"] == 8
    assert [line["epoch"] for line in log_lines(run)] == [None] * 6
    other = lorakit.load_recipe(run / "recipe.yaml", {"train.output_dir": str(tmp_path / "other")})
    said.clear()
    train(other, resume=str(run / "checkpoints" / "step-4"), say=said.append)
    assert adapter_bytes(Path(other.train.output_dir)) == adapter_bytes(run)
    assert any("skipping the rows" in line for line in said)


def test_every_row_of_a_pass_is_trained_once(tiny_llama: Path, tmp_path: Path) -> None:
    """30 rows in three steps of ten: all tokens are trained."""
    changes = {"train__max_steps": 3, "train__per_device_batch_size": 10,
               "train__group_by_length": False}  # fmt: skip
    recipe = streamed(tmp_path / "stream", tiny_llama, **changes)
    train(recipe)
    whole = recipe_for(tmp_path / "whole", tiny_llama, train__epochs=1)
    train(whole)
    found, want = (run_json(Path(r.train.output_dir)) for r in (recipe, whole))
    assert found["trained_tokens"] == want["trained_tokens"]


def test_truncated_rows_are_reported_at_the_end(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = streamed(tmp_path, tiny_llama, task__max_length=48)
    said: list[str] = []
    train(recipe, say=said.append)
    (line,) = [line for line in said if line.startswith("train: ")]
    assert re.search(r"rows truncated to 48 tokens; \d+ tokens \(\d+\.\d% of all\) lost; ", line)


@pytest.mark.parametrize("streaming", [False, True])
def test_long_documents_become_rows_and_resume_exactly(
    tiny_llama: Path, tmp_path: Path, streaming: bool
) -> None:
    documents = [{"text": " ".join(row.values())} for row in completion_rows(30)]
    for split in ("train", "validation"):
        write_rows(tmp_path / "data" / f"{split}.jsonl", documents)
    changes = {"task__streaming": streaming, "task__long_documents": "split",
               "train__per_device_batch_size": 4, "task__max_length": 16}  # fmt: skip
    file = write_recipe_file(tmp_path, tiny_llama, "text", train__max_steps=60, train__epochs=None,
                             train__save_every_steps=55, **changes)  # fmt: skip
    recipe = lorakit.load_recipe(file)
    said: list[str] = []
    train(recipe, say=said.append)
    run = Path(recipe.train.output_dir)
    assert any(line.startswith("train: 30 of 30 documents are longer than 16") for line in said)
    other = lorakit.load_recipe(run / "recipe.yaml", {"train.output_dir": str(tmp_path / "other")})
    train(other, resume=str(run / "checkpoints" / "step-55"))
    assert adapter_bytes(tmp_path / "other") == adapter_bytes(run)


def bad_row_run(folder: Path, model: Path, index: int, text: str, **changes: Any) -> Recipe:
    """Train on a stream of 1,000 rows whose row at ``index`` is ``text``, in windows of 200
    rows."""
    write_rows(folder / "data" / "train.jsonl", list(completion_rows(1000)))
    write_rows(folder / "data" / "validation.jsonl", list(completion_rows(8)))
    put_line(folder / "data" / "train.jsonl", index, text)
    settings = {"train__max_steps": 60, "train__per_device_batch_size": 4,
                "task__shuffle_buffer_rows": 10, "train__save_every_steps": None,
                "train__eval_every_steps": 60, "train__log_every_steps": 50} | changes  # fmt: skip
    return streamed(folder, model, **settings)


def put_line(file: Path, index: int, *texts: str) -> None:
    lines = file.read_text().splitlines()
    file.write_text("".join(f"{line}\n" for line in [*lines[:index], *texts, *lines[index + 1 :]]))


REFUSED = '{"prompt": "red", "completion": 3}'
UNREADABLE = '{"prompt": "red", "completion": "blue'
GOOD = '{"prompt": "red green", "completion": " blue one two"}'


@pytest.mark.parametrize(
    ("text", "what"),
    [(REFUSED, "column 'completion' = 3"), (UNREADABLE, "not JSON: Invalid control character")],
)
def test_a_bad_row_saves_a_checkpoint(
    tiny_llama: Path, tmp_path: Path, text: str, what: str
) -> None:
    """The resumed run ends like one whose row was never bad."""
    recipe = bad_row_run(tmp_path / "bad", tiny_llama, 300, text)
    run, file = Path(recipe.train.output_dir), tmp_path / "bad" / "data" / "train.jsonl"
    for resume in (None, "auto"):  # nothing is mended yet the second time
        with pytest.raises(BadRow) as caught:
            train(recipe, resume=resume)
        message = str(caught.value)
        assert message.startswith(f"{file}, row 301: {what}")
        saved = run / "checkpoints" / "step-50"
        assert f"; stopped at step 50 of 60; saved {saved}; correct or remove the row" in message
        assert message.endswith("then resume with --resume auto")
        record = run_json(run)
        assert (record["exit_reason"], record["steps"]) == ("failed", 50)
        assert not (run / "adapter").exists()

    put_line(file, 300, GOOD)
    said: list[str] = []
    train(recipe, resume="auto", say=said.append)
    assert f"{file}: changed since a bad row ended the run; earlier rows are not checked" in said
    whole = bad_row_run(tmp_path / "whole", tiny_llama, 300, GOOD)
    train(whole)
    assert adapter_bytes(run) == adapter_bytes(Path(whole.train.output_dir))
    assert run_json(run)["bad_row"] is False


def stopped_run(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Train until SIGTERM arrives during ``step``."""
    own = EagerEngine.step

    def signalled(engine: EagerEngine, *batches: Any) -> Any:
        if engine.steps == step - 1:
            signal.raise_signal(signal.SIGTERM)
        return own(engine, *batches)

    with monkeypatch.context() as patch:
        patch.setattr(EagerEngine, "step", signalled)
        with pytest.raises(Interrupted, match=f"interrupted at step {step} of "):
            train(recipe)


def test_a_run_stopped_before_a_bad_row_resumes_once_it_is_corrected(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = bad_row_run(tmp_path, tiny_llama, 300, REFUSED)
    run, file = Path(recipe.train.output_dir), tmp_path / "data" / "train.jsonl"
    stopped_run(recipe, monkeypatch, 50)
    record = run_json(run)
    assert (record["exit_reason"], record["bad_row"]) == ("interrupted", True)
    put_line(file, 300, GOOD)
    assert train(recipe, resume="auto").steps == 60
    assert run_json(run)["bad_row"] is False


def test_a_run_stopped_before_a_changed_file(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file must be restored, which no row's correction does."""
    recipe = bad_row_run(tmp_path, tiny_llama, 0, GOOD, train__max_steps=250)
    file, own = tmp_path / "data" / "train.jsonl", EagerEngine.step

    def changed(engine: EagerEngine, *batches: Any) -> Any:
        if engine.steps == 0:
            with file.open("a") as opened:
                opened.write(f"{GOOD}\n")
        return own(engine, *batches)

    monkeypatch.setattr(EagerEngine, "step", changed)
    stopped_run(recipe, monkeypatch, 200)
    record = run_json(Path(recipe.train.output_dir))
    assert (record["exit_reason"], record["bad_row"]) == ("interrupted", False)


def test_a_run_that_resumes_at_its_last_step_keeps_its_rows(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = bad_row_run(tmp_path, tiny_llama, 0, GOOD)
    stopped_run(recipe, monkeypatch, 60)
    train(recipe, resume="auto")
    record = run_json(Path(recipe.train.output_dir))
    assert record["exit_reason"] == "completed"
    assert record["data"]["train"]["rows_read"] == 400


def test_a_prefetched_step_does_not_count(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after step 50, the last of a window: the next window's rows, which are read by then,
    are not among those of the run, and the resumed run ends like one that was never stopped."""
    recipe = bad_row_run(tmp_path / "stopped", tiny_llama, 300, GOOD)
    run = Path(recipe.train.output_dir)
    stopped_run(recipe, monkeypatch, 50)
    assert run_json(run)["data"]["train"]["rows_read"] == 200
    train(recipe, resume="auto")
    assert run_json(run)["data"]["train"]["rows_read"] == 400
    whole = bad_row_run(tmp_path / "whole", tiny_llama, 300, GOOD)
    train(whole)
    assert adapter_bytes(run) == adapter_bytes(Path(whole.train.output_dir))


def test_a_bad_row_before_the_first_step(tiny_llama: Path, tmp_path: Path) -> None:
    """The row comes after the first rows, which are checked before anything is written, and within
    the first window."""
    recipe = bad_row_run(tmp_path, tiny_llama, 205, UNREADABLE, task__shuffle_buffer_rows=300)
    with pytest.raises(BadRow, match=r"row 206: not JSON.*; stopped at step 0 of 60; saved .*-0;"):
        train(recipe)
    put_line(tmp_path / "data" / "train.jsonl", 205)  # the line is gone
    result = train(recipe, resume="auto")
    assert result.steps == 60
    bad = bad_row_run(tmp_path / "head", tiny_llama, 100, REFUSED)
    with pytest.raises(DataError, match=r"row 101: column 'completion' = 3; allowed: text$"):
        train(bad)
    assert not Path(bad.train.output_dir).exists()


def test_other_changes_of_the_data_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = bad_row_run(tmp_path, tiny_llama, 300, REFUSED)
    file = tmp_path / "data" / "train.jsonl"
    with pytest.raises(BadRow):
        train(recipe)
    put_line(file, 0, GOOD)
    with pytest.raises(UserError, match="the train data has changed since the run started"):
        train(recipe, resume="auto")


def test_fewer_rows_than_were_trained_on_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = bad_row_run(tmp_path, tiny_llama, 500, REFUSED)
    settings = recipe.train.model_copy(update={"max_steps": 150})
    recipe = recipe.model_copy(update={"train": settings})
    file, run = tmp_path / "data" / "train.jsonl", Path(recipe.train.output_dir)
    with pytest.raises(BadRow, match="stopped at step 100 of 150"):
        train(recipe)
    assert run_json(run)["data"]["train"]["rows_read"] == 400
    lines = file.read_text().splitlines(keepends=True)
    before = tree(run)
    for kept in (lines[:399], lines[:250]):
        file.write_text("".join(kept))
        with pytest.raises(UserError) as caught:
            train(recipe, resume="auto")
        assert str(caught.value) == (
            f"--resume: {file}: has {len(kept):,} rows, but the run has trained on its first 400; "
            "hint: restore the rows, or start a new run"
        )
        assert tree(run) == before
    file.write_text("".join(lines[:400]))
    assert train(recipe, resume="auto").steps == 150


def test_a_truncated_file(tiny_llama: Path, tmp_path: Path) -> None:
    """The file must be repaired, not a row."""
    recipe = bad_row_run(tmp_path, tiny_llama, 0, GOOD)
    plain, packed = (tmp_path / "data" / f"train.jsonl{suffix}" for suffix in ("", ".gz"))
    whole = gzip.compress("".join(f'{GOOD[:-2]} {n * 7919}"}}\n' for n in range(800)).encode())
    plain.unlink()
    packed.write_bytes(whole[: len(whole) * 2 // 3])
    settings = recipe.train.model_copy(update={"max_steps": 2000})
    recipe = recipe.model_copy(update={"train": settings})
    with pytest.raises(BadRow) as caught:
        train(recipe)
    message = str(caught.value)
    assert message.startswith(f"{packed}: cannot be read: Compressed file ended before")
    assert "; replace the file with a complete one, then resume with --resume auto" in message
    assert "row" not in message.removeprefix(str(packed))


def test_a_file_that_changes_during_the_run(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = bad_row_run(tmp_path, tiny_llama, 0, GOOD, train__max_steps=1000)
    file = tmp_path / "data" / "train.jsonl"
    before = file.read_bytes()

    def say(text: str) -> None:
        if "steps" in text:  # the plan, after the first rows were read
            file.write_bytes(before + before)

    with pytest.raises(DataError) as caught:
        train(recipe, say=say)
    assert not isinstance(caught.value, BadRow)
    assert "has changed since it was first read; stopped at step " in str(caught.value)
    assert "; restore the file, then resume with --resume auto" in str(caught.value)
    with pytest.raises(UserError, match="the train data has changed since the run started"):
        train(recipe, resume="auto")


def test_shards_and_arrays_are_streamed(tiny_llama: Path, tmp_path: Path) -> None:
    """Like the same rows in one file."""
    rows = completion_rows(60)
    plain = streamed(tmp_path / "plain", tiny_llama)
    write_rows(tmp_path / "plain" / "data" / "train.jsonl", rows)
    train(plain)
    recipe = streamed(tmp_path / "shards", tiny_llama)
    folder = tmp_path / "shards" / "data"
    (folder / "train.jsonl").unlink()
    (folder / "train-00000-of-00003.json").write_text(json.dumps(rows[:20], indent=1))
    write_rows(folder / "train-00001-of-00003.jsonl", rows[20:40])
    (folder / "train-00002-of-00003.json.gz").write_bytes(
        gzip.compress(json.dumps(rows[40:]).encode())
    )
    train(recipe)
    runs = [Path(r.train.output_dir) for r in (plain, recipe)]
    assert adapter_bytes(runs[0]) == adapter_bytes(runs[1])


def test_unsupported_streams_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.max_steps"):
        streamed(tmp_path, tiny_llama, train__max_steps=None, train__epochs=1)
    recipe = streamed(tmp_path, tiny_llama, task__name="wikisql")
    with pytest.raises(UserError, match=r"task\.streaming = true: wikisql uses a file format"):
        train(recipe)
    plan = dry_run(streamed(tmp_path, tiny_llama), lambda text: None)
    assert (plan["train_rows"], plan["steps"], plan["steps_per_epoch"]) == (None, 6, None)
