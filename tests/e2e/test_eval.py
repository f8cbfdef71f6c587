from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lorakit
from lorakit.cli.console import check_writable, write_output
from lorakit.cli.main import run
from tests.e2e.evaluations import evaluated, recipe_file, write_adapter
from tests.tasks.wikisql_files import ROWS, TABLE, write_database, write_lines
from tests.training.runs import recipe_for, run_json

REPO = Path(__file__).resolve().parents[2]
ROWS_E2E = [
    {"meaning_representation": f"name[{name}], food[{food}]", "human_reference": f"{name}: {food}"}
    for name, food in (("Kettle", "Thai"), ("Zizou", "fish"), ("Kettle", "Thai"))
]
ROWS_SST2 = [{"sentence": "x" * n + " film", "label": n % 2} for n in range(1, 9)]


@pytest.fixture
def wikisql(tiny_llama: Path, tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    write_lines(data / "dev.jsonl", ROWS)
    write_lines(data / "dev.tables.jsonl", [TABLE])
    write_database(data / "dev.db", TABLE)
    return recipe_file(tmp_path, tiny_llama, "wikisql", data, max_new_tokens=4)


@pytest.fixture
def sst2(tiny_bert: Path, tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    write_lines(data / "validation.jsonl", ROWS_SST2)
    write_lines(data / "test.jsonl", [{"sentence": "hidden", "label": -1}])
    return recipe_file(tmp_path, tiny_bert, "glue/sst2", data)


@pytest.fixture
def e2e_nlg(tiny_llama: Path, tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    write_lines(data / "validation.jsonl", ROWS_E2E)
    return recipe_file(tmp_path, tiny_llama, "e2e_nlg", data, max_new_tokens=4, num_beams=2)


@pytest.fixture
def stsb(tiny_bert: Path, tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"sentence1": "x" * n, "sentence2": "y", "label": n / 2} for n in range(1, 9)]
    write_lines(data / "validation.jsonl", rows)
    return recipe_file(tmp_path, tiny_bert, "glue/stsb", data)


@pytest.fixture
def classification(tiny_bert: Path, tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"text": "x" * n, "label": "abc"[n % 3]} for n in range(1, 9)]
    write_lines(data / "validation.jsonl", rows)
    return recipe_file(tmp_path, tiny_bert, "classification", data, labels=["a", "b", "c"])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    assert run(["eval", *map(str, arguments)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
    return err


def test_base_and_adapter_of_a_causal_model(
    wikisql: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = evaluated(capsys, wikisql, "--base")
    assert base["task"] == "wikisql"
    assert base["split"] == "validation"
    assert base["examples"] == 3
    assert set(base["metrics"]) == {"loss", "perplexity", "lf_accuracy", "ex_accuracy"}
    assert evaluated(capsys, wikisql, "--base") == base
    write_adapter(tiny_llama, tmp_path / "run" / "adapter", "causal")
    adapted = evaluated(capsys, wikisql)
    assert adapted["metrics"]["loss"] != base["metrics"]["loss"]
    assert evaluated(capsys, wikisql, "--adapter", tmp_path / "run" / "adapter") == adapted
    assert evaluated(capsys, wikisql, "--limit", 2)["examples"] == 2
    recipe = lorakit.load_recipe(wikisql)
    assert lorakit.evaluate(recipe) == adapted["metrics"]
    assert lorakit.evaluate(recipe, base=True) == base["metrics"]
    first = lorakit.evaluate(recipe, adapter=tmp_path / "run" / "adapter", limit=1)
    assert first["loss"] != adapted["metrics"]["loss"]


def test_eval_has_the_metrics_that_training_has_reported(tiny_llama: Path, tmp_path: Path) -> None:
    """Also in bfloat16, where each operator rounds differently."""
    recipe = recipe_for(
        tmp_path, tiny_llama, "completion", model__dtype="bfloat16", train__learning_rate=5e-2
    )
    assert lorakit.evaluate(recipe, base=True) != lorakit.train(recipe).metrics
    assert lorakit.evaluate(recipe) == run_json(tmp_path / "run")["metrics"]


def test_the_head_comes_from_the_adapter(
    sst2: Path, tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["eval", str(sst2), "--base", "--json"]) == 0
    first, err = capsys.readouterr()
    assert "no weights for classifier" in err
    assert "seed 5" in err
    assert run(["eval", str(sst2), "--base", "--json"]) == 0
    assert capsys.readouterr().out == first
    write_adapter(tiny_bert, tmp_path / "run/adapter", "encoder", ["negative", "positive"])
    assert run(["eval", str(sst2), "--json"]) == 0
    out, err = capsys.readouterr()
    assert "no weights" not in err
    other = evaluated(capsys, sst2, "--set", "train.seed=6")
    assert other == json.loads(out), "nothing of the head is drawn"
    assert other["metrics"]["loss"] != json.loads(first)["metrics"]["loss"]


@pytest.mark.parametrize("task", ["sst2", "stsb", "classification", "wikisql", "e2e_nlg"])
def test_saved_predictions_score_the_same(
    task: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = request.getfixturevalue(task)
    saved, output = tmp_path / "predictions.jsonl", tmp_path / "result.json"
    found = evaluated(capsys, recipe, "--base", "--save-predictions", saved, "--output", output)
    assert json.loads(output.read_text(encoding="utf-8")) == found
    assert len(saved.read_text(encoding="utf-8").splitlines()) == found["examples"]
    again = evaluated(capsys, recipe, "--predictions", saved)
    losses = {"loss", "perplexity"}
    assert again["metrics"] == {k: v for k, v in found["metrics"].items() if k not in losses}
    assert (
        set(again["metrics"])
        == {
            "sst2": {"accuracy"},
            "stsb": {"pearson", "spearmanr"},
            "classification": {"accuracy", "f1"},
            "wikisql": {"lf_accuracy", "ex_accuracy"},
            "e2e_nlg": {"bleu", "nist", "rouge_l", "cider"},
        }[task]
    )
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["data", "predictions.jsonl", "recipe.yaml", "result.json"]


def test_scoring_predictions_loads_no_model_library(sst2: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "p.jsonl", [{"prediction": 1}] * 8)
    code = (
        "import sys; from lorakit.cli.main import run\n"
        f"assert run(['eval', {str(sst2)!r}, '--predictions', {str(file)!r}]) == 0\n"
        "print([name for name in ('transformers', 'accelerate') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO,
        env=os.environ,
    )  # fmt: skip
    *table, last = done.stdout.splitlines()
    assert last == "[]"
    assert table[0] == "glue/sst2, validation: 8 examples"
    assert [line.split() for line in table[1:]] == [["accuracy", "0.5000"]]


def test_official_wikisql_predictions(
    wikisql: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        {"query": ROWS[0]["sql"]},
        {"error": "no idea"},
        {"prediction": 'SELECT MAX("Score") FROM t WHERE "Score (2)" > 2'},
    ]
    file = write_lines(tmp_path / "p.jsonl", lines)
    metrics = evaluated(capsys, wikisql, "--predictions", file)["metrics"]
    assert metrics == {"lf_accuracy": 2 / 3, "ex_accuracy": 2 / 3}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"prediction": 1}'] * 7, "7 predictions; the split has 8 rows"),
        (['{"prediction": 1}'] * 9, "9 predictions; the split has 8 rows"),
        ([*['{"prediction": 1}'] * 7, '{"prediction": 2}'], "p.jsonl:8: 2; allowed: a label id"),
        (
            ['{"prediction": 1}', '{"prediction": "1"}', *['{"prediction": 1}'] * 6],
            'p.jsonl:2: "1"',
        ),
        (['{"prediction": NaN}', *['{"prediction": 1}'] * 7], "p.jsonl:1: not JSON: NaN"),
        ([*['{"prediction": 1}'] * 7, "1"], "p.jsonl:8: 1: missing key 'prediction'"),
        (['{"predictions": 1}'] * 8, "p.jsonl:1: "),
        (["", *['{"prediction": 1}'] * 8], "p.jsonl:1: not JSON"),
        (['{"prediction": 1'] * 8, "p.jsonl:1: not JSON"),
        (["[" * 100_000], "not JSON"),
        ([], "0 predictions; the split has 8 rows"),
    ],
)
def test_invalid_predictions(
    sst2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[str], message: str
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    assert message in refused(capsys, sst2, "--predictions", file)


@pytest.mark.parametrize(
    ("task", "good", "bad", "allowed"),
    [
        ("stsb", "2.5", '"2.5"', '"2.5"; allowed: a finite number'),
        ("stsb", "2.5", "1e999", "Infinity; allowed: a finite number"),
        ("stsb", "2.5", "Infinity", "not JSON: Infinity is not a JSON number"),
        ("classification", "2", "3", "3; allowed: a label id, 0 to 2"),
        ("classification", "2", "-1", "-1; allowed: a label id, 0 to 2"),
        ("classification", "2", "null", "null; allowed: a label id, 0 to 2"),
        ("wikisql", '"SELECT"', "7", "7; allowed: text, "),
        ("wikisql", '"SELECT"', "NaN", "not JSON: NaN is not a JSON number"),
        ("e2e_nlg", '"Kettle"', "7", "7; allowed: text"),
        ("e2e_nlg", '"Kettle"', '["Kettle"]', '["Kettle"]; allowed: text'),
        ("e2e_nlg", '"Kettle"', "NaN", "not JSON: NaN is not a JSON number"),
    ],
)
def test_an_invalid_prediction_of_each_task(
    task: str,
    good: str,
    bad: str,
    allowed: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = request.getfixturevalue(task)
    capsys.readouterr()  # what making the model printed
    count = 3 if task in ("wikisql", "e2e_nlg") else 8
    file = tmp_path / "p.jsonl"
    lines = [f'{{"prediction": {value}}}\n' for value in [*[good] * (count - 1), bad]]
    file.write_text("".join(lines), encoding="utf-8")
    message = refused(capsys, recipe, "--predictions", file)
    assert f"{file}:{count}: {allowed}" in message
    assert len(message.splitlines()) == 1
    file.write_text("".join(lines[:1]), encoding="utf-8")
    message = refused(capsys, recipe, "--predictions", file)
    assert f"{file}: 1 prediction; the split has {count} rows" in message


def test_missing_files_are_named(
    sst2: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, sst2)
    assert str(tmp_path / "run" / "adapter") in message
    assert "--base" in message
    nowhere = tmp_path / "nowhere"
    assert refused(capsys, sst2, "--adapter", nowhere).startswith(
        f"error: --adapter {nowhere}: no such adapter directory"
    )
    assert refused(capsys, sst2, "--adapter", "runs/nope").startswith(
        "error: --adapter runs/nope: "
    )
    assert "no split 'other'" in refused(capsys, sst2, "--base", "--split", "other")
    assert "test.jsonl, row 1: label = -1" in refused(capsys, sst2, "--base", "--split", "test")
    predictions = tmp_path / "p.jsonl"
    predictions.write_text('{"prediction": 1}\n', encoding="utf-8")
    assert "hidden" in refused(capsys, sst2, "--split", "test", "--predictions", predictions)
    assert "No such file" in refused(capsys, sst2, "--predictions", tmp_path / "none.jsonl")
    write_adapter(tiny_llama, tmp_path / "run" / "adapter", "causal")
    assert "the adapter is for causal language models" in refused(capsys, sst2)


def test_an_adapter_with_other_labels_is_rejected(
    sst2: Path, tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tiny_bert, tmp_path / "run" / "adapter", "encoder", ["positive", "negative"])
    assert "trained on the labels positive, negative" in refused(capsys, sst2)


def test_class_names_come_from_the_adapter(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "a", "label": "up"}, {"text": "b", "label": "down"}]
    data = write_lines(tmp_path / "v.jsonl", rows)
    recipe = recipe_file(tmp_path, tiny_bert, "classification", data)
    recipe.write_text(
        recipe.read_text().replace(f'"{data}"', json.dumps({"validation": str(data)}))
    )
    write_adapter(tiny_bert, tmp_path / "run" / "adapter", "encoder", ["up", "down", "still"])
    assert evaluated(capsys, recipe)["examples"] == 2
    assert "task.labels = null" in refused(capsys, recipe, "--base")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "--adapter", "a"], "--adapter and --base are mutually exclusive"),
        (["--base", "--predictions", "p"], "--base and --predictions are mutually exclusive"),
        (["--predictions", "p", "--save-predictions", "q"], "are mutually exclusive"),
        (["--base", "--output", "no/such/file"], "directory no/such does not exist"),
        (["--base", "--save-predictions", "."], "is a directory"),
    ],
)
def test_conflicting_options(
    sst2: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str, in_tmp: Path
) -> None:
    before = sorted(in_tmp.rglob("*"))
    assert message in refused(capsys, sst2, *arguments)
    assert sorted(in_tmp.rglob("*")) == before


def test_a_task_evaluated_by_its_loss_has_no_predictions(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_lines(data / "validation.jsonl", [{"text": "to be"}, {"text": "or not"}])
    recipe = recipe_file(tmp_path, tiny_llama, "text", data)
    assert set(evaluated(capsys, recipe, "--base")["metrics"]) == {"loss", "perplexity"}
    saved = tmp_path / "p.jsonl"
    assert "evaluated by its loss" in refused(capsys, recipe, "--base", "--save-predictions", saved)
    write_lines(saved, [{"prediction": "a"}] * 2)
    assert "no metric" in refused(capsys, recipe, "--predictions", saved)


def test_nan_weights_exit_with_1(
    wikisql: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tiny_llama, tmp_path / "run" / "adapter", "causal", scale=1e37)
    output = tmp_path / "result.json"
    assert "loss = nan" in refused(capsys, wikisql, "--output", output, code=1)
    assert not output.exists()


def test_outputs_must_not_be_inputs(
    sst2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    data = tmp_path / "data" / "validation.jsonl"
    same = tmp_path / "same"
    assert "is the recipe" in refused(capsys, sst2, "--base", "--output", sst2)
    assert "a data file of the task" in refused(capsys, sst2, "--base", "--save-predictions", data)
    assert "the file of --output" in refused(
        capsys, sst2, "--base", "--output", same, "--save-predictions", same
    )
    assert {file: file.read_bytes() for file in before} == before
    assert not same.exists()


def test_token_ids_beyond_the_embeddings(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "small")
    data = write_lines(tmp_path / "v.jsonl", [{"text": "to be"}])
    recipe = recipe_file(tmp_path, tmp_path / "small", "text", data)
    recipe.write_text(
        recipe.read_text().replace(f'"{data}"', json.dumps({"validation": str(data)}))
    )
    assert "does not match the model" in refused(capsys, recipe, "--base")
    assert run(["generate", str(tmp_path / "small"), "--prompt", "to be"]) == 2
    assert "does not match the model" in capsys.readouterr().err


def test_links_and_pipes_are_kept(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_output(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    check_writable("--output", pipe)
    write_output(pipe, "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert pipe.is_fifo()


def test_base_and_adapter_are_mutually_exclusive_in_python(tmp_path: Path) -> None:
    import lorakit
    from lorakit.errors import UserError

    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: {name_or_path: x}\nadapter: {}\ntask: {name: text, path: d.jsonl}\n"
        "train: {output_dir: run}\n"
    )
    with pytest.raises(UserError, match="base=True and adapter='a'"):
        lorakit.evaluate(lorakit.load_recipe(file), "a", base=True)


def test_only_a_default_length_is_fitted_to_the_window(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = shutil.copytree(tiny_llama, tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100}))
    data = tmp_path / "data"
    data.mkdir()
    write_lines(data / "validation.jsonl", [{"prompt": "one two", "completion": " three"}])
    for name in ("completion", "auto"):
        file = recipe_file(tmp_path, small, name, data)
        assert run(["eval", str(file), "--base"]) == 0
        said = capsys.readouterr().err
        assert "task.max_new_tokens: 93 instead of the default 128; validation has prompts" in said
        assert "of up to 7 tokens, and the model's window is 100 tokens" in said
        assert "lose their beginning" not in said
    rows = [{"prompt": "one two" * count, "completion": " three"} for count in (10, 13)]
    write_lines(data / "validation.jsonl", rows)
    assert run(["eval", str(file), "--base"]) == 0
    said = capsys.readouterr().err
    assert "task.max_new_tokens: 16 instead of the default 128" in said
    assert "validation: 1 of 2 prompts lose their beginning: they have more than the 84" in said
    said = refused(capsys, file, "--base", "--set", "task.max_new_tokens=128")
    assert "task.max_new_tokens = 128: no room for a prompt" in said
    assert "allowed: at most 99" in said


def test_the_default_max_length_fits_the_positions(
    tiny_bert: Path, sst2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = json.loads(sst2.read_text())
    del recipe["task"]["max_length"]
    sst2.write_text(json.dumps(recipe))
    assert run(["eval", str(sst2), "--base"]) == 0
    said = "task.max_length: 256 instead of the default 512: the model has 256 positions"
    assert said in capsys.readouterr().err
    assert "task.max_length = 512: the model has 256 positions" in refused(
        capsys, sst2, "--base", "--set", "task.max_length=512"
    )
