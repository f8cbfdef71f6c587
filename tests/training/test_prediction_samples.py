"""predictions.json: counts by class, and examples of right and wrong predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.pipeline.evaluation import evaluate_split
from lorakit.training.run import train
from tests.training.runs import recipe_for, write_rows


def predictions_json(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "predictions.json").read_text(encoding="utf-8"))
    return found


def test_a_classifier_has_a_confusion_matrix_and_examples(tiny_bert: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, tiny_bert, "glue/sst2", train__epochs=3)
    run = train(recipe)
    found = predictions_json(run.output_dir)
    assert (found["split"], found["rows"]) == ("validation", 8)
    assert found["step"] == json.loads((run.output_dir / "run.json").read_text())["best_step"]
    predicted = evaluate_split(recipe).predictions
    counts = [[0, 0], [0, 0]]
    for row, prediction in enumerate(predicted):
        counts[row % 2][prediction] += 1
    assert found["confusion"] == counts
    assert (counts[0][0] + counts[1][1]) / 8 == pytest.approx(run.metrics["accuracy"])
    rows = [json.loads(x) for x in (tmp_path / "data" / "validation.jsonl").open(encoding="utf-8")]
    assert sorted(example["row"] for example in found["examples"]) == list(range(1, 9))
    for example in found["examples"]:
        at = example["row"] - 1
        assert example["input"] == rows[at]["sentence"]
        assert example["reference"] == found["labels"][rows[at]["label"]]
        assert example["prediction"] == found["labels"][predicted[at]]
        assert example["right"] == (predicted[at] == rows[at]["label"])
    order = [example["right"] for example in found["examples"]]
    assert order == sorted(order), "wrong ones first"


def test_a_regression_has_its_worst_predictions(tiny_bert: Path, tmp_path: Path) -> None:
    for split, count in (("train", 30), ("validation", 30)):
        rows = [{"sentence": f"red {'green ' * (i % 9)}", "label": i / 7} for i in range(count)]
        write_rows(tmp_path / "data" / f"{split}.jsonl", rows)
    recipe = recipe_for(
        tmp_path, tiny_bert, "classification", task__text_column="sentence", task__regression=True
    )
    found = predictions_json(train(recipe).output_dir)
    assert "confusion" not in found
    pairs = [(float(e["reference"]), float(e["prediction"])) for e in found["examples"]]
    errors = [abs(reference - predicted) for reference, predicted in pairs]
    assert len(errors) == 20
    assert errors == sorted(errors, reverse=True)
    labels = {example["row"]: example["reference"] for example in found["examples"]}
    assert all(value == f"{(row - 1) / 7:.6g}" for row, value in labels.items())


def test_generated_texts_stand_beside_prompt_and_reference(
    tiny_llama: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(tmp_path, tiny_llama, task__eval_generate="end", task__max_new_tokens=4)
    run = train(recipe)
    rows = [json.loads(x) for x in (tmp_path / "data" / "validation.jsonl").open(encoding="utf-8")]
    texts = evaluate_split(recipe).predictions
    for example in predictions_json(run.output_dir)["examples"]:
        at = example["row"] - 1
        assert example["input"] == rows[at]["prompt"]
        assert example["reference"] == rows[at]["completion"]
        assert example["prediction"] == texts[at]
        assert example["right"] == (texts[at].strip() == rows[at]["completion"].strip())


def test_there_are_none_without_predictions(tiny_llama: Path, tmp_path: Path) -> None:
    run = train(recipe_for(tmp_path, tiny_llama))
    assert not (run.output_dir / "predictions.json").exists()


def test_those_of_another_step_do_not_remain(tiny_bert: Path, tmp_path: Path) -> None:
    """A run that is resumed after its best evaluation does not know what that predicted."""
    recipe = recipe_for(
        tmp_path, tiny_bert, "glue/sst2", train__epochs=2, train__eval_every_steps=1,
        train__save_every_steps=1, train__save_total_limit=None, train__lr_scheduler="constant",
    )  # fmt: skip
    run = train(recipe)
    file = run.output_dir / "predictions.json"
    best = predictions_json(run.output_dir)["step"]
    file.write_text(json.dumps({"step": best + 1}))
    last = run.output_dir / "checkpoints" / f"step-{run.steps}"
    lorakit.train(recipe, resume=str(last))
    assert not file.exists()


def test_a_task_that_fails_on_them_does_not_fail_the_run(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise KeyError("column")

    said: list[str] = []
    monkeypatch.setattr("lorakit.training.session.write_predictions", fail)
    run = train(recipe_for(tmp_path, tiny_bert, "glue/sst2", train__epochs=1), say=said.append)
    assert "warning: predictions.json: not written: KeyError: 'column'" in said
    assert json.loads((run.output_dir / "run.json").read_text())["exit_reason"] == "completed"


def test_calls_of_tools_stand_for_a_message_without_content(
    tiny_llama: Path, tmp_path: Path
) -> None:
    call = {"type": "function", "function": {"name": "one", "arguments": {"two": 3}}}
    messages = [
        {"role": "user", "content": "red green"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "blue"},
        {"role": "assistant", "content": "one two"},
    ]
    for split in ("train", "validation"):
        write_rows(tmp_path / "data" / f"{split}.jsonl", [{"messages": messages}] * 4)
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
        "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    recipe = recipe_for(
        tmp_path, tiny_llama, "chat", task__max_new_tokens=2, model__chat_template=str(template),
        task__eval_generate="end", train__epochs=1,
    )  # fmt: skip
    example = predictions_json(train(recipe).output_dir)["examples"][0]
    calls = json.dumps({"tool_calls": [call]})
    assert example["input"] == f"user: red green\nassistant: {calls}\ntool: blue"
    assert example["reference"] == "one two"
