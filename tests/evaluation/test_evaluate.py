from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lorakit import registry
from lorakit.data.encode import EncodedSplit, encode_split
from lorakit.data.sources import Split
from lorakit.errors import DataError, EvaluationError
from lorakit.evaluation.evaluate import EvalData, Evaluation, evaluate_model
from lorakit.evaluation.progress import EvaluationStopped
from lorakit.evaluation.prompts import encode_prompts, fit_prompts
from lorakit.injection import inject
from lorakit.methods.lora import LoraConfig
from lorakit.models.load import Pretrained, load_pretrained
from lorakit.recipe.sections import ModelSection
from tests.tasks.wikisql_files import ROWS, TABLE, write_database, write_lines

PAIRS = [
    {"prompt": "a b c", "completion": " d"},
    {"prompt": "one two three four five", "completion": " six seven"},
    {"prompt": "x", "completion": " yyyyyyyyyyyyyyyy"},
    {"prompt": "", "completion": "nothing before"},
    {"prompt": "short", "completion": " s"},
]


class Case:
    """A model, a task and an encoded split."""

    def __init__(self, loaded: Pretrained, task: str, split: Split, **keys: Any) -> None:
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.task = registry.tasks()[task]
        self.config = self.task.Config(name=task, max_length=200, **keys)
        self.split = split
        self.encoded: EncodedSplit = encode_split(
            split, lambda row: self.task.example(row, self.config), self.tokenizer, 200
        )

    def evaluate(self, **options: Any) -> Evaluation:
        prompts = None
        if self.task.generates(self.config):
            prompts = encode_prompts(self.task, self.config, self.split, self.tokenizer, None)
        data = EvalData(self.task, self.config, self.split, self.encoded, prompts)
        options = {"batch_size": 2, "seed": 0, **options}
        return evaluate_model(self.model, self.tokenizer, data, **options)


def split_of(rows: list[dict[str, Any]]) -> Split:
    return Split("validation", rows, "rows", "0")


def causal(folder: Path, dtype: str = "float32") -> Case:
    section = ModelSection(name_or_path=str(folder), dtype=dtype)
    loaded = load_pretrained(section, "causal")
    return Case(loaded, "completion", split_of(PAIRS), eval_generate="never")


def encoder(folder: Path, task: str, rows: list[dict[str, Any]], labels: Any) -> Case:
    section = ModelSection(name_or_path=str(folder), dtype="float32")
    loaded = load_pretrained(section, "encoder", labels, seed=3)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.dim() > 1:  # so that random weights tell one text from another
                parameter.mul_(20)
    return Case(loaded, task, split_of(rows))


def test_loss_is_the_mean_over_the_trained_tokens(tiny_llama: Path) -> None:
    case = causal(tiny_llama)
    losses = []
    for index in range(len(case.encoded)):
        row = case.encoded[index]
        ids = torch.from_numpy(row.input_ids.copy()).long()
        with torch.no_grad():
            logits = case.model(input_ids=ids.unsqueeze(0)).logits[0].double()
        kept = torch.from_numpy(row.loss_mask[1:].copy())
        losses.append(F.cross_entropy(logits[:-1][kept], ids[1:][kept], reduction="none"))
    wanted = float(torch.cat(losses).mean())
    for batch_size in (1, 2, 5):
        metrics = case.evaluate(batch_size=batch_size).metrics
        assert metrics["loss"] == pytest.approx(wanted, rel=1e-6)
        assert metrics["perplexity"] == pytest.approx(math.exp(wanted), rel=1e-5)
        assert set(metrics) == {"loss", "perplexity"}


def test_a_chat_of_several_rows_counts_each_trained_token_once(tiny_llama: Path) -> None:
    section = ModelSection(name_or_path=str(tiny_llama), dtype="float32")
    loaded = load_pretrained(section, "causal")
    loaded.tokenizer.chat_template = (
        "{% for m in messages %}{{ '!' if loop.last and m.role == 'assistant' }}{{ m.content }}</s>"
        "{% endfor %}"
    )
    texts = [["a", "bc"], ["a", "bc", "d", "e"], ["one", "two", "three", "four", "5", "6"]]
    roles = ("user", "assistant")
    rows = [
        {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]}
        for turns in texts
    ]
    keys: dict[str, Any] = {"eval_generate": "end", "max_new_tokens": 2}
    case = Case(loaded, "chat", split_of(rows), **keys)
    assert len(case.encoded) == 6
    total, count = 0.0, 0
    for turns in texts:
        for turn in range(1, len(turns), 2):
            prompt = "".join(f"{text}</s>" for text in turns[:turn])
            before = case.tokenizer(prompt).input_ids
            ids = torch.tensor([case.tokenizer(f"{prompt}!{turns[turn]}</s>").input_ids])
            with torch.no_grad():
                logits = case.model(input_ids=ids).logits[0, len(before) - 1 : -1].double()
            answer = ids[0, len(before) :]
            total += float(F.cross_entropy(logits, answer, reduction="sum"))
            count += len(answer)
    assert case.encoded.trained_tokens == count
    found = case.evaluate()
    assert found.metrics["loss"] == pytest.approx(total / count, rel=1e-6)
    assert len(found.predictions) == len(rows)


def test_rng_state_mode_and_gradients_are_unchanged(tiny_llama: Path) -> None:
    case = causal(tiny_llama)
    inject(case.model, LoraConfig(r=2, lora_dropout=0.5))
    case.model.train()
    state = torch.get_rng_state()
    first = case.evaluate()
    assert torch.equal(state, torch.get_rng_state())
    assert case.model.training
    assert first == case.evaluate()
    assert all(parameter.grad is None for parameter in case.model.parameters())
    case.model.eval()
    case.evaluate()
    assert not case.model.training


def test_training_continues_after_an_evaluation(tiny_llama: Path) -> None:
    case = causal(tiny_llama)
    inject(case.model, LoraConfig(r=2))
    case.evaluate()
    ids = torch.arange(12).unsqueeze(0)
    case.model(input_ids=ids, labels=ids).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in case.model.parameters())


def test_bfloat16_is_summed_in_float32(tiny_llama: Path) -> None:
    exact, rounded = (
        causal(tiny_llama, dtype).evaluate().metrics["loss"] for dtype in ("float32", "bfloat16")
    )
    assert rounded == pytest.approx(exact, rel=2e-2)


def test_a_non_finite_loss_is_an_error(tiny_llama: Path) -> None:
    case = causal(tiny_llama)
    with torch.no_grad():
        case.model.get_output_embeddings().weight.fill_(math.nan)
    with pytest.raises(EvaluationError, match=r"rows: loss = nan, perplexity = "):
        case.evaluate()


def test_classification_predictions_and_loss(tiny_bert: Path) -> None:
    rows = [
        {"sentence1": "a" * n, "sentence2": "b c d"[: n % 5], "label": n % 2} for n in range(1, 12)
    ]
    case = encoder(tiny_bert, "glue/mrpc", rows, ["not_equivalent", "equivalent"])
    logits = []
    for index in range(len(rows)):
        row = case.encoded[index]
        assert row.token_type_ids is not None
        with torch.no_grad():
            logits.append(
                case.model(
                    input_ids=torch.from_numpy(row.input_ids.copy()).long().unsqueeze(0),
                    token_type_ids=torch.from_numpy(row.token_type_ids.copy()).long().unsqueeze(0),
                ).logits
            )
    every = torch.cat(logits)
    labels = torch.tensor([row["label"] for row in rows])
    assert len(set(every.argmax(1).tolist())) == 2, "the rows are told apart"
    for batch_size in (1, 3, 11):
        found = case.evaluate(batch_size=batch_size)
        assert found.predictions == every.argmax(1).tolist()
        assert found.metrics["loss"] == pytest.approx(float(F.cross_entropy(every, labels)))
        hits = (every.argmax(1) == labels).float().mean()
        assert found.metrics["accuracy"] == pytest.approx(float(hits))
        assert set(found.metrics) == {"loss", "accuracy", "f1"}


def test_regression_predictions_and_loss(tiny_bert: Path) -> None:
    rows = [
        {"sentence1": "a" * n, "sentence2": "bc" * (n % 3), "label": n / 3} for n in range(1, 8)
    ]
    case = encoder(tiny_bert, "glue/stsb", rows, None)
    found = case.evaluate(batch_size=3)
    assert all(isinstance(value, float) for value in found.predictions)
    assert len({round(value, 2) for value in found.predictions}) > 4, "the rows are told apart"
    errors = [(p - row["label"]) ** 2 for p, row in zip(found.predictions, rows, strict=True)]
    assert found.metrics["loss"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert case.evaluate(batch_size=7).predictions == pytest.approx(found.predictions, abs=1e-4)
    assert set(found.metrics) == {"loss", "pearson", "spearmanr"}


@pytest.fixture
def wikisql(tiny_llama: Path, tmp_path: Path) -> Case:
    write_lines(tmp_path / "dev.jsonl", ROWS)
    write_lines(tmp_path / "dev.tables.jsonl", [TABLE])
    write_database(tmp_path / "dev.db", TABLE)
    loaded = load_pretrained(ModelSection(name_or_path=str(tiny_llama), dtype="float32"), "causal")
    task = registry.tasks()["wikisql"]
    keys = {"path": str(tmp_path), "max_new_tokens": 5}
    split = task.load(task.Config(name="wikisql", **keys), "validation")
    return Case(loaded, "wikisql", split, **keys)


def test_generated_text_is_scored(wikisql: Case) -> None:
    seen: list[tuple[str, int, int]] = []
    found = wikisql.evaluate(on_progress=lambda *done: seen.append(done))
    assert set(found.metrics) == {"loss", "perplexity", "lf_accuracy", "ex_accuracy"}
    assert len(found.predictions) == 3
    assert all(isinstance(text, str) for text in found.predictions)
    assert seen == [("loss", 2, 3), ("loss", 3, 3), ("generated", 3, 3)]


def test_without_generation_only_the_loss_is_measured(wikisql: Case) -> None:
    found = wikisql.evaluate(generate=False)
    assert set(found.metrics) == {"loss", "perplexity"}
    assert found.predictions == []
    wikisql.config = wikisql.config.model_copy(update={"eval_generate": "never"})
    assert wikisql.evaluate() == found


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_stops_between_batches(wikisql: Case, batches: int) -> None:
    wikisql.model.train()
    asked = iter([False] * batches + [True])
    with pytest.raises(EvaluationStopped):
        wikisql.evaluate(should_stop=lambda: next(asked))
    assert wikisql.model.training


def test_prompts_are_truncated_from_the_left(wikisql: Case) -> None:
    whole = encode_prompts(
        wikisql.task, wikisql.config, wikisql.split, wikisql.tokenizer, window=None
    )
    assert wikisql.tokenizer.decode(whole[0]).endswith("question: Who wears 4?\nSQL:")
    for window, config in (
        (25, wikisql.config),
        (None, wikisql.config.model_copy(update={"max_length": 20})),
    ):
        cut = encode_prompts(wikisql.task, config, wikisql.split, wikisql.tokenizer, window)
        assert cut == [ids[-20:] for ids in whole]
    with pytest.raises(DataError, match=r"task\.max_new_tokens = 5: no room"):
        encode_prompts(wikisql.task, wikisql.config, wikisql.split, wikisql.tokenizer, window=5)


def test_prompts_truncated_to_the_window_are_reported(wikisql: Case) -> None:
    said: list[str] = []
    parts = (wikisql.task, wikisql.config, wikisql.split, wikisql.tokenizer)
    config, prompts = fit_prompts(*parts, 25, said.append)
    (line,) = said
    assert config == wikisql.config
    assert prompts == encode_prompts(*parts, window=25)
    rows = len(wikisql.split)
    assert f"{rows} of {rows} prompts lose their beginning" in line
    assert "more than the 20 tokens that task.max_new_tokens = 5 leaves" in line
    said.clear()
    longest = max(map(len, encode_prompts(*parts, window=None)))
    assert fit_prompts(*parts, longest + 5, said.append)[1] == encode_prompts(*parts, window=None)
    assert said == []
    fit_prompts(*parts, 100_000, said.append)
    assert said == []


def test_prompts_equal_what_precedes_the_completion_in_training(wikisql: Case) -> None:
    prompts = encode_prompts(
        wikisql.task, wikisql.config, wikisql.split, wikisql.tokenizer, window=None
    )
    for index, prompt in enumerate(prompts):
        row = wikisql.encoded[index]
        assert prompt == row.input_ids[~row.loss_mask].tolist()
        completion = wikisql.tokenizer.decode(row.input_ids[row.loss_mask])
        assert completion.startswith(" SELECT ")
        assert json.dumps(ROWS[index]["question"])[1:-1] in wikisql.tokenizer.decode(prompt)
