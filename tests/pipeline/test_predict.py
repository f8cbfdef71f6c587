"""``lorakit.predict`` gives what transformers' pipeline gives on the merged model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, TextClassificationPipeline, pipeline

import lorakit
from lorakit.errors import UserError
from tests.e2e.evaluations import write_adapter
from tests.families import save_classifier
from tests.training.runs import recipe_for

TEXTS = ["a", "the longest of these texts, by far", "", "not so long", "b c"] * 3
PAIRS = [("a", "b"), ("a longer first text", "x"), ("c", "and a longer second text, too")]
NAMES = ["bad", "fair", "very good"]


def reference(model: Path) -> TextClassificationPipeline:
    found = pipeline("text-classification", model=str(model), device="cpu", dtype=torch.float32)
    assert isinstance(found, TextClassificationPipeline)
    return found


def expected(model: Path, texts: list[Any]) -> list[dict[str, float]]:
    """Return the pipeline's scores by label."""
    given = [{"text": t[0], "text_pair": t[1]} if isinstance(t, tuple) else t for t in texts]
    classify = reference(model)
    scores = [classify(text, top_k=None) for text in given]
    return [{score["label"]: score["score"] for score in row} for row in scores]


def assert_close(found: dict[str, float], wanted: dict[str, float]) -> None:
    assert found.keys() == wanted.keys()
    for name, p in wanted.items():
        assert math.isclose(found[name], p, abs_tol=1e-5), (found, wanted)


@pytest.fixture(scope="module")
def adapter(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes") / "adapter"
    write_adapter(tiny_bert, folder, "encoder", NAMES)
    return folder


@pytest.fixture(scope="module")
def merged(tiny_bert: Path, adapter: Path) -> Path:
    lorakit.merge(tiny_bert, adapter, adapter.parent / "merged")
    return adapter.parent / "merged"


@pytest.mark.parametrize("texts", [TEXTS, PAIRS], ids=["texts", "pairs"])
def test_classes_of_the_adapter_and_of_the_merged_model(
    tiny_bert: Path, adapter: Path, merged: Path, texts: list[Any]
) -> None:
    found = lorakit.predict(adapter, texts, batch_size=4)
    for row, scores in zip(found, expected(merged, texts), strict=True):
        assert list(row) == ["label", "score", "scores"]
        assert_close(row["scores"], scores)
        assert list(row["scores"]) == NAMES
        assert row["label"] == max(scores, key=scores.__getitem__)
        assert row["score"] == row["scores"][row["label"]]
    assert len({row["score"] for row in found}) > 1
    for other in (
        lorakit.predict(tiny_bert, texts, adapter, batch_size=4),
        lorakit.predict(merged, texts, batch_size=4),
    ):
        for row, same in zip(found, other, strict=True):
            assert_close(row["scores"], same["scores"])


def test_regression(tiny_bert: Path, tmp_path: Path) -> None:
    write_adapter(tiny_bert, tmp_path / "adapter", "encoder")
    lorakit.merge(tiny_bert, tmp_path / "adapter", tmp_path / "merged")
    found = lorakit.predict(tmp_path / "adapter", TEXTS)
    for row, scores in zip(found, expected(tmp_path / "merged", TEXTS), strict=True):
        assert list(row) == ["score"]
        assert_close(row, {"score": next(iter(scores.values()))})


def test_several_labels(tiny_bert: Path, tmp_path: Path) -> None:
    base = save_classifier(
        tmp_path / "base", tiny_bert, NAMES, problem_type="multi_label_classification"
    )
    found = lorakit.predict(base, TEXTS)
    for row, scores in zip(found, expected(base, TEXTS), strict=True):
        assert list(row) == ["label", "score", "labels", "scores"]
        assert_close(row["scores"], scores)
        assert row["labels"] == [name for name in NAMES if scores[name] >= 0.5]
        assert row["score"] == row["scores"][row["label"]] == max(row["scores"].values())
    assert {len(row["labels"]) for row in found} != {0}


def test_the_tokenizer_and_the_pad_token_are_those_of_the_training(tmp_path: Path) -> None:
    """A decoder classifies by the last token before the padding."""
    from tests.adapters.directories import write_adapter as write_random
    from tests.adapters.directories import write_base

    base = write_base(tmp_path / "base", "llama", classifier=True, vocab_size=300)
    write_random(base, tmp_path / "adapter", scale=1.0, id2label=dict(enumerate(NAMES)))
    tokenizer = AutoTokenizer.from_pretrained(_byte_tokenizer(tmp_path / "tokenizer"))
    tokenizer.save_pretrained(tmp_path / "adapter")
    sidecar = tmp_path / "adapter" / "lorakit.json"
    stored = json.loads(sidecar.read_text()) | {"pad_token_id": tokenizer.pad_token_id}
    sidecar.write_text(json.dumps(stored))
    texts = ["a", "abc", "a longer text"]
    together = lorakit.predict(base, texts, tmp_path / "adapter")
    alone = [lorakit.predict(base, text, tmp_path / "adapter")[0] for text in texts]
    for row, other in zip(together, alone, strict=True):
        assert_close(row["scores"], other["scores"])
    assert len({row["score"] for row in together}) == 3
    model, found = lorakit.load_with_tokenizer(None, tmp_path / "adapter")
    assert found.pad_token == tokenizer.pad_token
    assert model.config.pad_token_id == found.pad_token_id


def _byte_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_a_trained_adapter_knows_its_base_its_columns_and_its_length(
    tiny_bert: Path, tmp_path: Path
) -> None:
    run = lorakit.train(recipe_for(tmp_path, tiny_bert, "glue/sst2", train__epochs=1))
    sidecar = json.loads((run.adapter_dir / "lorakit.json").read_text())
    assert sidecar["text_columns"] == ["sentence"]
    assert sidecar["max_length"] == 128
    long = "x" * 200
    notes: list[str] = []
    rows = [{"sentence": long, "text": "b", "idx": 3}, {"sentence": "a", "text": "b", "idx": 4}]
    found = lorakit.predict(run.adapter_dir, rows, say=notes.append)
    (note,) = notes
    assert note == "texts: 1 of 2 rows truncated to 128 tokens; 74 tokens (36.1% of all) lost"
    assert {*found[0]["scores"]} == {"negative", "positive"}
    same = lorakit.predict(run.adapter_dir, [long[:126], "a"])
    for row, other in zip(found, same, strict=True):
        assert_close(row["scores"], other["scores"])
    whole = lorakit.predict(run.adapter_dir, [long], max_length=202)
    assert whole[0] != found[0]


@pytest.mark.parametrize(
    ("columns", "trained", "chosen"),
    [
        (["sentence1", "sentence2", "label", "idx"], None, ["sentence1", "sentence2"]),
        (["premise", "hypothesis", "comment"], None, ["premise", "hypothesis"]),
        (["question", "sentence", "idx"], None, ["question", "sentence"]),
        (["id", "text", "date"], None, ["text"]),
        (["text", "text_pair"], None, ["text", "text_pair"]),
        (["review", "label"], None, ["review"]),
        (["a", "b", "text"], ["b"], ["b"]),
        (["premise", "hypothesis"], ["sentence1", "sentence2"], ["premise", "hypothesis"]),
        (["text", "text_pair"], ["review"], ["text"]),
        (["a", "b"], None, None),
        (["text", "sentence"], None, None),
        (["text"], ["sentence1", "sentence2"], None),
    ],
)
def test_columns_are_found_where_there_is_no_choice(
    tmp_path: Path, adapter: Path, columns: list[str], trained: Any, chosen: Any
) -> None:
    own = _copy(adapter, tmp_path / "adapter", text_columns=trained)
    rows = [{name: f"the {name}" for name in columns}]
    if chosen is None:
        with pytest.raises(UserError, match="texts: cannot tell which column is the text") as error:
            lorakit.predict(own, rows)
        assert f"the columns are {', '.join(map(repr, columns))}; hint: --text-col" in str(
            error.value
        )
        return
    wanted = [tuple(f"the {name}" for name in chosen)] if len(chosen) > 1 else [f"the {chosen[0]}"]
    assert lorakit.predict(own, rows) == lorakit.predict(own, wanted)


def test_named_columns(adapter: Path, tmp_path: Path) -> None:
    rows = [{"a": "x", "b": "y", "text": "z"}]
    assert lorakit.predict(adapter, rows, text_column="b") == lorakit.predict(adapter, "y")
    found = lorakit.predict(adapter, rows, text_column="b", text_pair_column="a")
    assert found == lorakit.predict(adapter, [("y", "x")])
    with pytest.raises(UserError, match="--text-column c: texts: no column 'c'; the columns are"):
        lorakit.predict(adapter, rows, text_column="c")
    with pytest.raises(UserError, match="--text-pair-column: requires --text-column"):
        lorakit.predict(adapter, rows, text_pair_column="a")
    notes: list[str] = []
    own = _copy(adapter, tmp_path / "adapter", text_columns=["sentence1", "sentence2"])
    assert lorakit.predict(own, ["a"], say=notes.append) == lorakit.predict(adapter, ["a"])
    lorakit.predict(own, rows, text_column="b", say=notes.append)
    assert notes == [
        "warning: the adapter was trained on pairs of texts (sentence1, sentence2), but the input "
        "has single texts"
    ] * 2  # fmt: skip


def _copy(adapter: Path, folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    for file in adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    info = json.loads((adapter / "lorakit.json").read_text())
    (folder / "lorakit.json").write_text(json.dumps(info | changes))
    return folder


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (None, {}, "texts and file: allowed: one of them"),
        ([], {}, "at least one text"),
        (["a", ("b", "c")], {}, "pairs and texts; allowed: one of these kinds"),
        ([("a", "b", "c")], {}, 'texts, row 1: column \'text\' = ["a", "b", "c"]; allowed: text'),
        (["a", 3], {}, "texts, row 2: column 'text' = 3; allowed: text"),
        (["a", "\ud800"], {}, "texts, row 2: column 'text': invalid UTF-8 text at character 1"),
        (["a"], {"batch_size": 0}, "batch_size = 0: allowed: 1 or more"),
        (["a"], {"max_length": 2}, "max_length = 2: allowed for this model: 3 to 256"),
        (["a"], {"max_length": 257}, "max_length = 257: allowed for this model: 3 to 256"),
        (["a"], {"dtype": "int8"}, "--dtype = int8: allowed: float32, bfloat16, float16"),
        (["a"], {"file": "x.csv"}, "texts and file: allowed: one of them"),
    ],
)
def test_bad_input(adapter: Path, texts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        lorakit.predict(adapter, texts, **options)
    assert "\n" not in str(error.value)


def test_models_that_do_not_classify(tiny_bert: Path, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bert without a classification head; allowed: a classif"):
        lorakit.predict(tiny_bert, ["a"])
    with pytest.raises(UserError, match="causal language model; hint: use lorakit generate"):
        lorakit.predict(tiny_llama, ["a"])
    write_adapter(tiny_llama, tmp_path / "adapter", "causal")
    with pytest.raises(UserError, match="adapter is for a causal language model; hint: use lor"):
        lorakit.predict(tmp_path / "adapter", ["a"])


def test_labels_with_the_same_name(tiny_bert: Path, tmp_path: Path) -> None:
    base = save_classifier(tmp_path / "base", tiny_bert, NAMES)
    config = json.loads((base / "config.json").read_text())
    labels = {"id2label": {"0": "a", "1": "b", "2": "a"}}
    (base / "config.json").write_text(json.dumps(config | labels))
    with pytest.raises(UserError, match="its labels include 'a' more than once"):
        lorakit.predict(base, ["a"])


def test_loading_with_the_tokenizer(
    tiny_bert: Path, tiny_llama: Path, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    write_adapter(tiny_llama, tmp_path / "causal", "causal")
    causal = tmp_path / "causal"
    for base, directory, arguments in (
        (tiny_bert, adapter, [(tiny_bert, adapter), (None, adapter), (adapter,), (merged,)]),
        (tiny_llama, causal, [(tiny_llama, causal), (None, causal), (causal,)]),
    ):
        wanted = lorakit.load(base, directory)
        for given in arguments:
            model, tokenizer = lorakit.load_with_tokenizer(*given)
            inputs = tokenizer("a text", return_tensors="pt")
            with torch.no_grad():
                found, logits = model(**inputs).logits, wanted(**inputs).logits
            torch.testing.assert_close(found, logits, atol=1e-4, rtol=1e-4)
            assert tokenizer.pad_token_id is not None
            assert not model.training
    with pytest.raises(UserError, match="trainable = True: allowed with an adapter only"):
        lorakit.load_with_tokenizer(tiny_llama, trainable=True)
    with pytest.raises(UserError, match="base = None: allowed"):
        lorakit.load_with_tokenizer(None)
