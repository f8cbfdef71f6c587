"""A base that already is a classifier keeps its labels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lorakit
from lorakit.cli.main import run
from tests.e2e.evaluations import write_adapter
from tests.families import save_classifier
from tests.tasks.wikisql_files import write_lines
from tests.training.runs import tree

ROWS = [
    {"text": "good", "label": "positive"},
    {"text": "bad", "label": "negative"},
    {"text": "fine", "label": "positive"},
    {"text": "lovely", "label": "positive"},
]


def recipe_for(
    folder: Path, base: Path, rows: list[dict[str, Any]], task: str, **keys: Any
) -> Path:
    folder.mkdir(exist_ok=True)
    data = write_lines(folder / "rows.jsonl", rows)
    recipe = {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "adapter": {"r": 2},
        "task": {
            "name": task, "path": {"train": str(data), "validation": str(data)},
            "max_length": 32, **keys,
        },
        "train": {"output_dir": str(folder / "run"), "epochs": 1, "log_every_steps": 1},
    }  # fmt: skip
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe), encoding="utf-8")
    return file


def scores(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, float]:
    capsys.readouterr()
    code = run(["eval", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    found: dict[str, float] = json.loads(out)["metrics"]
    return found


def said_by_transformers(base: Path, texts: list[tuple[str, ...]]) -> list[str]:
    """Return the classes that plain transformers predicts."""
    model = AutoModelForSequenceClassification.from_pretrained(base).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    names = []
    for text in texts:
        with torch.no_grad():
            best = model(**tokenizer(*text, return_tensors="pt")).logits.argmax()
        names.append(model.config.id2label[int(best)])
    return names


def test_a_head_that_always_says_positive(
    minilm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The head has 0 = positive, 1 = negative, while the data's own order has negative first."""
    names = {0: "positive", 1: "negative"}
    model = AutoModelForSequenceClassification.from_pretrained(
        minilm, num_labels=2, id2label=names, label2id={name: i for i, name in names.items()}
    )
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([2.0, -2.0]))
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(minilm).save_pretrained(tmp_path / "base")
    recipe = recipe_for(tmp_path / "work", tmp_path / "base", ROWS, "classification")

    assert scores(capsys, recipe, "--base")["accuracy"] == 0.75
    for labels in (["positive", "negative"], ["negative", "positive"]):
        given = json.dumps(labels)
        assert scores(capsys, recipe, "--base", "--set", f"task.labels={given}")["accuracy"] == 0.75
    assert run(["preview", str(recipe), "--count", "0"]) == 0
    note = "the base's classification head keeps the order of its labels: positive, negative"
    assert note in capsys.readouterr().err

    assert run(["train", str(recipe)]) == 0
    err = capsys.readouterr().err
    assert note in err
    assert "labels: negative 1, positive 3" in err
    adapter = tmp_path / "work" / "run" / "adapter"
    assert scores(capsys, recipe)["accuracy"] == 0.75
    assert lorakit.load(tmp_path / "base", adapter).config.id2label == names
    assert run(["merge", str(tmp_path / "base"), str(adapter), str(tmp_path / "merged")]) == 0
    texts = [(row["text"],) for row in ROWS]
    assert said_by_transformers(tmp_path / "merged", texts) == ["positive"] * 4


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        (None, ["positive", "positive"]),  # no training split
        (["positive"] * 2, ["positive", "negative", "positive"]),  # one label in it
        (["positive", "negative"], ["neutral", "positive", "negative"]),  # one less
        (["Positive"] * 2, ["Positive", "NEGATIVE"]),
        (None, [0, 2, 0]),  # indices
    ],
)
def test_a_named_head_gives_the_labels_that_the_train_split_lacks(
    train: list[str] | None, validation: list[Any], tiny_bert: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    names = ["positive", "negative", "neutral"]
    base = save_classifier(tmp_path / "base", tiny_bert, names)
    rows = [{"text": "a" * (3 * n + 1), "label": label} for n, label in enumerate(validation)]
    recipe = recipe_for(tmp_path / "work", base, rows, "classification")
    path = {"validation": str(tmp_path / "work" / "rows.jsonl")}
    if train is not None:
        given = [{"text": "ab", "label": label} for label in train]
        path["train"] = str(write_lines(tmp_path / "work" / "train.jsonl", given))
    written = json.loads(recipe.read_text())
    written["task"]["path"] = path
    recipe.write_text(json.dumps(written))
    said = said_by_transformers(base, [(row["text"],) for row in rows])
    gold = [names[label] if isinstance(label, int) else label.lower() for label in validation]
    right = [name == label for name, label in zip(said, gold, strict=True)]

    saved = tmp_path / "saved.jsonl"
    found = scores(capsys, recipe, "--base", "--save-predictions", saved)
    assert found["accuracy"] == pytest.approx(sum(right) / len(right))
    again = scores(capsys, recipe, "--predictions", saved)
    assert again == {key: pytest.approx(found[key]) for key in again}
    assert run(["eval", str(recipe), "--base", "--set", "model.new_head=true"]) == 2
    assert run(["preview", str(recipe), "--split", "validation"]) == 0
    line = "task.labels: taken from the base's classification head: "
    assert line in capsys.readouterr().err
    if train is not None:
        assert run(["train", str(recipe), "--set", "train.learning_rate=1e-9"]) == 0
        assert line in capsys.readouterr().err
        assert scores(capsys, recipe) == pytest.approx(found, abs=1e-4)


def test_a_head_that_lacks_a_label_changes_no_error(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "a", "label": "other"}, {"text": "b", "label": "other"}]
    for names in (["positive", "negative", "neutral"], ["LABEL_0", "LABEL_1", "LABEL_2"]):
        base = save_classifier(tmp_path / names[0], tiny_bert, names)
        recipe = recipe_for(tmp_path / "work", base, rows, "classification")
        assert run(["train", str(recipe)]) == 2
        assert "has only one label, other" in capsys.readouterr().err
    rows = [{"text": "a", "label": label} for label in ("Positive", "positive ", "negative")]
    recipe = recipe_for(tmp_path / "work", tmp_path / "positive", rows, "classification")
    assert run(["train", str(recipe)]) == 2
    err = capsys.readouterr().err
    assert 'one of which matches several labels of the task: Positive, "positive " (labels' in err


def test_glue_ids_and_scores_stay_those_of_glue(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GLUE's order is entailment, neutral, contradiction; the head has CONTRADICTION first."""
    order = ["CONTRADICTION", "ENTAILMENT", "NEUTRAL"]
    glue = ["entailment", "neutral", "contradiction"]
    base = save_classifier(tmp_path / "base", tiny_bert, order)
    rows = [{"premise": "a" * n, "hypothesis": "b" * (n % 5), "label": n % 3} for n in range(1, 13)]
    said = said_by_transformers(base, [(row["premise"], row["hypothesis"]) for row in rows])
    assert len(set(said)) > 1
    right = [name.lower() == glue[row["label"]] for name, row in zip(said, rows, strict=True)]
    recipe = recipe_for(tmp_path / "work", base, rows, "glue/mnli")
    saved = tmp_path / "saved.jsonl"
    want = sum(right) / len(rows)
    found = scores(capsys, recipe, "--base", "--save-predictions", saved)
    assert found["accuracy"] == pytest.approx(want)
    ids = [json.loads(line)["prediction"] for line in saved.read_text().splitlines()]
    assert [glue[index] for index in ids] == [name.lower() for name in said]
    assert scores(capsys, recipe, "--predictions", saved)["accuracy"] == pytest.approx(want)

    assert run(["train", str(recipe), "--set", "train.learning_rate=1e-9"]) == 0
    err = capsys.readouterr().err
    assert "entailment = ENTAILMENT, neutral = NEUTRAL, contradiction = CONTRADICTION" in err
    assert scores(capsys, recipe) == pytest.approx(found, abs=1e-5)
    sidecar = json.loads((tmp_path / "work" / "run" / "adapter" / "lorakit.json").read_text())
    assert sidecar["id2label"] == {str(index): name for index, name in enumerate(order)}
    assert sidecar["labels"] == glue


def test_training_starts_from_the_loss_of_the_heads_own_classes(
    tiny_bert: Path, tmp_path: Path
) -> None:
    base = save_classifier(tmp_path / "base", tiny_bert, ["c", "a", "b"])
    rows = [{"text": "x" * n, "label": "abc"[n % 3]} for n in range(1, 9)]
    recipe = recipe_for(tmp_path / "work", base, rows, "classification")
    model = AutoModelForSequenceClassification.from_pretrained(base).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    losses = []
    for row in rows:
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], return_tensors="pt")).logits
        gold = torch.tensor([["c", "a", "b"].index(row["label"])])
        losses.append(float(torch.nn.functional.cross_entropy(logits, gold)))
    config = json.loads((base / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (base / "config.json").write_text(json.dumps(config))
    result = lorakit.train(lorakit.load_recipe(recipe, {"train.learning_rate": 1e-9}))
    lines = (tmp_path / "work" / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert result.metrics["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_a_class_that_the_data_lacks_is_a_wrong_prediction(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_classifier(tmp_path / "base", tiny_bert, ["c", "a", "b"])
    texts = [chr(97 + n) * (n % 5 + 1) for n in range(16)]
    said = said_by_transformers(base, [(text,) for text in texts])
    rows = [{"text": text, "label": "ab"[n % 2]} for n, text in enumerate(texts)]
    right = [name == row["label"] for name, row in zip(said, rows, strict=True)]
    assert "c" in said and any(right)
    recipe = recipe_for(tmp_path / "work", base, rows, "classification")
    saved = tmp_path / "saved.jsonl"
    found = scores(capsys, recipe, "--base", "--save-predictions", saved)
    assert found["accuracy"] == pytest.approx(sum(right) / len(rows))
    assert saved.read_text().count('{"error": "the class c"}') == said.count("c")
    again = scores(capsys, recipe, "--predictions", saved)
    assert again == pytest.approx({name: found[name] for name in ("accuracy", "f1")})


def test_whole_numbers_are_the_heads_ids(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_classifier(tmp_path / "base", tiny_bert, ["zero", "one", "two"])
    rows = [{"text": "x" * n, "label": n % 3} for n in range(1, 10)]
    said = said_by_transformers(base, [(row["text"],) for row in rows])
    names = ["zero", "one", "two"]
    right = [names.index(name) == row["label"] for name, row in zip(said, rows, strict=True)]
    recipe = recipe_for(tmp_path / "work", base, rows, "classification")
    assert scores(capsys, recipe, "--base")["accuracy"] == pytest.approx(sum(right) / len(rows))
    rows[4]["label"] = 3
    recipe = recipe_for(tmp_path / "more", base, rows, "classification")
    assert run(["eval", str(recipe), "--base"]) == 2
    assert "has 3 labels (zero, one, two), but not the task's 3" in capsys.readouterr().err


def test_another_head_is_replaced_only_where_the_recipe_says_so(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_classifier(tmp_path / "base", tiny_bert, ["a", "b", "c"])
    recipe = recipe_for(tmp_path / "work", base, ROWS, "classification")
    before = tree(tmp_path)
    for command in (["train"], ["train", "--dry-run"], ["eval", "--base"], ["preview"]):
        assert run([command[0], str(recipe), *command[1:]]) == 2, command
        err = capsys.readouterr().err
        assert "has 3 labels (a, b, c), and the task has 2 (negative, positive)" in err
        assert "model.new_head: true" in err
    assert tree(tmp_path) == before

    new = ["--set", "model.new_head=true"]
    assert run(["train", str(recipe), *new]) == 0
    assert "replacing the base's head (a, b, c) with a new one" in capsys.readouterr().err
    trained = tmp_path / "work" / "run"
    assert scores(capsys, recipe, *new) == scores(capsys, recipe)
    assert scores(capsys, trained / "recipe.yaml") == scores(capsys, recipe)
    assert lorakit.load(base, trained / "adapter").config.id2label == {0: "negative", 1: "positive"}


def test_an_adapter_of_peft_has_the_order_of_its_base(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import LoraConfig, get_peft_model

    base = save_classifier(tmp_path / "base", tiny_bert, ["c", "a", "b"])
    rows = [{"text": chr(97 + n) * (n % 5 + 1), "label": "abc"[n % 3]} for n in range(12)]
    recipe = recipe_for(tmp_path / "work", base, rows, "classification")
    model = AutoModelForSequenceClassification.from_pretrained(base)
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    get_peft_model(model, config).save_pretrained(tmp_path / "peft")
    found = scores(capsys, recipe, "--adapter", tmp_path / "peft")
    assert found == pytest.approx(scores(capsys, recipe, "--base"))


def test_an_adapter_with_a_head_in_another_order_keeps_that(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As written by versions of lorakit that did not keep the order of a base's head."""
    base = save_classifier(tmp_path / "base", tiny_bert, ["c", "a", "b"])
    bare = AutoModelForSequenceClassification.from_pretrained(base).bert
    bare.save_pretrained(tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_bert / name, tmp_path / "bare")
    write_adapter(tmp_path / "bare", tmp_path / "adapter", "encoder", ["a", "b", "c"])
    rows = [{"text": chr(97 + n) * (n % 5 + 1), "label": "abc"[n % 3]} for n in range(12)]
    recipe = recipe_for(tmp_path / "work", base, rows, "classification")
    model = lorakit.load(base, tmp_path / "adapter")
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    tokenizer = AutoTokenizer.from_pretrained(base)
    right = 0
    for row in rows:
        with torch.no_grad():
            best = model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax()
        right += model.config.id2label[int(best)] == row["label"]
    found = scores(capsys, recipe, "--adapter", tmp_path / "adapter")
    assert found["accuracy"] == pytest.approx(right / len(rows))


def test_a_head_is_a_classifiers(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path / "work", tiny_llama, [{"text": "a"}], "text")
    with pytest.raises(lorakit.errors.RecipeError, match="the task has no classification head"):
        lorakit.load_recipe(recipe, {"model.new_head": True})
