"""``lorakit.predict`` finds the entities that transformers' pipeline finds on the merged model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForTokenClassification, ByT5Tokenizer, pipeline

import lorakit
from lorakit.cli.main import run
from lorakit.errors import ModelError, UserError
from tests.training.tagged import tagged_recipe, tagged_rows, write_word_pieces

TEXTS = [
    "Anna met Bertolt Br-echt in New Yorkshire",
    "Rome.",
    "annabel is in Romeo, u.s. (New-York)",
    "a 日本 Anna",
    "",
] * 3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The adapter, and the merged model."""
    folder = tmp_path_factory.mktemp("entities")
    base = write_word_pieces(folder / "base")
    adapter = lorakit.train(tagged_recipe(folder, base)).adapter_dir
    lorakit.merge(base, adapter, folder / "merged")
    return adapter, folder / "merged"


def expected(model: Path, texts: list[str]) -> list[list[dict[str, Any]]]:
    find = pipeline(
        "token-classification", model=str(model), aggregation_strategy="first", device="cpu"
    )
    return [find(text) if text else [] for text in texts]  # type: ignore[misc]


def assert_equal(found: list[dict[str, Any]], wanted: list[list[dict[str, Any]]]) -> None:
    for row, entities in zip(found, wanted, strict=True):
        assert list(row) == ["entities"]
        for own, other in zip(row["entities"], entities, strict=True):
            assert list(own) == ["entity_group", "score", "word", "start", "end"]
            assert own["score"] == pytest.approx(other["score"], abs=1e-5)
            assert {**own, "score": 0} == {**other, "score": 0}


def test_of_the_adapter_and_of_the_merged_model(models: tuple[Path, Path]) -> None:
    wanted = expected(models[1], TEXTS)
    assert sum(map(len, wanted)) > 10
    for model in models:
        assert_equal(lorakit.predict(model, TEXTS, batch_size=4), wanted)


def test_of_words(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tagged_rows(3)
    texts = [" ".join(row["tokens"]) for row in rows]
    found = lorakit.predict(models[1], rows)
    assert_equal(found, expected(models[1], texts))
    file, output = tmp_path / "rows.jsonl", tmp_path / "out.csv"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(["predict", str(models[1]), "--input", str(file)]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == found
    assert run(["predict", str(models[0]), "--input", str(file), "--output", str(output)]) == 0
    header, *lines = output.read_text().splitlines()
    assert (header, len(lines)) == ("entities", 3)


def test_what_is_refused(models: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="takes single texts, not pairs; allowed: one text column"):
        lorakit.predict(models[0], [("a", "b")])
    with pytest.raises(UserError, match="allowed: text"):
        lorakit.predict(models[0], [{"tokens": ["a", 1]}])
    assert run(["generate", str(models[0]), "--prompt", "a"]) == 2


def test_a_slow_tokenizer_is_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    AutoModelForTokenClassification.from_pretrained(models[1]).save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="ByT5Tokenizer has no fast implementation"):
        lorakit.predict(tmp_path, ["Anna"])
