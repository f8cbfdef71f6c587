"""Matching a task's labels to the head of a base."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig

from lorakit.errors import ModelError
from lorakit.models.heads import find_labels, head_labels, plan_head
from lorakit.models.load import load_pretrained
from lorakit.recipe.sections import ModelSection
from tests.families import tiny


@pytest.mark.parametrize(
    ("labels", "names", "found"),
    [
        (["negative", "positive"], ["positive", "negative"], [1, 0]),
        (["negative", "positive"], ["NEGATIVE", "POSITIVE"], [0, 1]),
        (["not_entailment", "entailment"], ["Entailment", "not entailment "], [1, 0]),
        # What is there as it stands goes before what is there but for its case.
        (["a", "A"], ["A", "a"], [1, 0]),
        (["a", "b"], ["A", "a", "b"], [1, 2]),
        (["a", "A"], ["a", "b"], None),
        (["a", "b"], ["a ", "A", "b"], None),
        (["c", "a"], ["a", "b", "c"], [2, 0]),
        (["a", "d"], ["a", "b", "c"], None),
        (["0", "2"], ["a", "b", "c"], [0, 2]),
        (["1", "3"], ["a", "b", "c"], None),
        (["1", "2"], ["2", "1"], [1, 0]),
        (["0", "1"], ["1", "2"], None),
        (["1", "2"], ["1 star", "2 stars"], None),
    ],
)
def test_labels_are_found_by_name_then_by_index(
    labels: list[str], names: list[str], found: list[int] | None
) -> None:
    assert find_labels(labels, names) == found


def config(names: list[str], **keys: Any) -> BertConfig:
    return BertConfig(id2label=dict(enumerate(names)), label2id={}, **keys)


def test_an_unnamed_head_takes_the_labels_in_order() -> None:
    plan = plan_head(["no", "yes"], config(["LABEL_0", "LABEL_1"]), False, "base")
    assert plan.labels == ["no", "yes"]
    assert plan.note is not None
    assert "has unnamed classes; matched in order: LABEL_0 = no, LABEL_1 = yes" in plan.note
    assert plan_head(["0", "1"], config(["LABEL_0", "LABEL_1"]), False, "base").labels == ["0", "1"]
    assert plan_head(["no", "yes"], config(["0", "1"]), False, "base").labels == ["no", "yes"]
    assert plan_head(["1", "0"], config(["0", "1"]), False, "base").labels == ["0", "1"]
    three = config(["LABEL_0", "LABEL_1", "LABEL_2"])
    assert plan_head(["0", "2"], three, False, "base").labels == head_labels(three)


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (["a", "b", "d"], ["a", "b"], "has 2 labels (a, b), but not the task's d"),
        (["x", "y"], ["a", "b"], "has 2 labels (a, b), and the task has 2 (x, y)"),
        (["x", "y"], ["LABEL_0", "LABEL_1", "LABEL_2"], "and the task has 2 (x, y)"),
        (["a", "A"], ["a", "b"], "one of which matches several labels of the task: a, A"),
        (["a", "1"], ["a", "b"], "the task's labels mix names and indices of these: a, 1"),
        (["a", "b"], ["score"], "has one output, and the task has 2 labels (a, b)"),
        (None, ["a", "b"], "and the task is a regression, which has one output"),
    ],
)
def test_a_head_that_does_not_fit_is_refused_or_replaced(
    labels: list[str] | None, names: list[str], message: str
) -> None:
    with pytest.raises(ModelError) as raised:
        plan_head(labels, config(names), False, "base")
    assert message in str(raised.value)
    assert "model.new_head: true" in str(raised.value)
    plan = plan_head(labels, config(names), True, "base")
    assert (plan.labels, plan.fresh) == (labels, True)


def test_a_multi_label_head_is_noted() -> None:
    both = config(["a", "b"], problem_type="multi_label_classification")
    note = plan_head(["a", "b"], both, False, "base").note
    assert note is not None
    assert "multi-label rows" in note


@pytest.fixture
def base(request: pytest.FixtureRequest, tiny_bert: Path, tmp_path: Path) -> Path:
    """A classifier with a head for a, b, c and the byte-level tokenizer of the tests."""
    names = {0: "a", 1: "b", 2: "c"}
    model = tiny(request.param, classifier=True, vocab_size=300, id2label=names)
    model.save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_bert / name, tmp_path / "base")
    return tmp_path / "base"


def loaded(base: Path, labels: list[str] | None, **keys: Any) -> Any:
    section = ModelSection(name_or_path=str(base), dtype="float32", **keys)
    return load_pretrained(section, "encoder", labels, seed=3)


@pytest.mark.parametrize("base", ["bert", "roberta", "modernbert", "gpt2"], indirect=True)
def test_the_stored_head_is_kept_or_replaced(base: Path) -> None:
    kept = loaded(base, ["c", "a"])
    assert head_labels(kept.model.config) == ["a", "b", "c"]
    assert kept.new_modules == ()
    outside = [
        name
        for name, _ in kept.model.named_parameters()
        if not name.startswith(f"{kept.model.base_model_prefix}.")
    ]
    new = loaded(base, ["c", "b", "a"], new_head=True)
    assert head_labels(new.model.config) == ["c", "b", "a"]
    assert {name.rpartition(".")[0] for name in outside} == set(new.new_modules)
    for name, value in kept.model.named_parameters():
        same = torch.equal(value, new.model.get_parameter(name))
        drawn = name in outside and value.std() > 0  # a bias starts at zero in either
        assert same != drawn, name
    again = loaded(base, ["c", "b", "a"], new_head=True)
    for name in outside:
        assert torch.equal(new.model.get_parameter(name), again.model.get_parameter(name))
    assert loaded(base, None, new_head=True).model.config.num_labels == 1


@pytest.mark.parametrize("base", ["bert"], indirect=True)
def test_class_names_without_weights_are_not_a_head(base: Path) -> None:
    """A bare encoder whose configuration names classes."""
    full = loaded(base, ["a", "b", "c"]).model
    for classes in (["BertModel"], ["BertForSequenceClassification"]):
        full.bert.config.architectures = classes
        full.bert.save_pretrained(base)
        (base / "config.json").write_text(
            (base / "config.json").read_text().replace('"BertModel"', f'"{classes[0]}"')
        )
        bare = loaded(base, ["x", "y"])
        assert head_labels(bare.model.config) == ["x", "y"]
        assert bare.new_modules == ("classifier",)
        assert bare.notes == ()
