from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lorakit.evaluation.generation import generate_text
from lorakit.evaluation.progress import EvaluationStopped, ProgressMonitor
from lorakit.evaluation.sampling import Decoding
from tests.families import tiny

PROMPTS = [[70, 71, 72], [80, 81], [90, 70, 80, 60, 50], [71]]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A model of one visible character per token, few enough to enumerate all continuations,
    and confident about some of them."""
    model = tiny("llama", vocab_size=96, eos_token_id=1)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(25)
    return model


def log_probabilities(model: PreTrainedModel, ids: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids)).logits[:, -1].double().log_softmax(-1)


def best_of_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    penalty: float,
    stop: str | None,
) -> str:
    """Return the best continuation of at most two tokens, by enumeration."""
    first = log_probabilities(model, [prompt])[0]
    second = log_probabilities(model, [[*prompt, token] for token in range(len(first))])
    candidates = []
    for a, score in enumerate(first.tolist()):
        text = tokenizer.decode([a], skip_special_tokens=True)
        if a == tokenizer.eos_token_id or text == stop:
            candidates.append((score, ""))
            continue
        for b, more in enumerate(second[a].tolist()):
            ended = tokenizer.decode([b], skip_special_tokens=True)
            end = "" if b == tokenizer.eos_token_id or ended == stop else ended
            candidates.append(((score + more) / 2**penalty, text + end))
    return max(candidates)[1]


@pytest.mark.parametrize(("penalty", "stops"), [(0.8, False), (0.0, True), (3.0, True)])
def test_as_many_beams_as_tokens_find_the_global_best(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, penalty: float, stops: bool
) -> None:
    # With the most likely first token as stop sequence its continuation is empty, and short.
    likeliest = int(log_probabilities(model, [PROMPTS[0]])[0, 2:].argmax()) + 2
    stop = tokenizer.decode([likeliest]) if stops else None
    how = Decoding(2, num_beams=96, length_penalty=penalty, stop=(stop,) if stop else ())
    wanted = [best_of_all(model, tokenizer, prompt, penalty, stop) for prompt in PROMPTS]
    assert generate_text(model, tokenizer, PROMPTS, how) == wanted
    if stops and penalty == 0:
        assert wanted[0] == "", "a hypothesis is ranked where it reaches the stop sequence"


def test_ngrams_of_the_prompt_may_be_repeated(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = list(range(5, 45))
    for beams in (1, 3):
        how = Decoding(16, num_beams=beams, no_repeat_ngram_size=1)
        [text] = generate_text(model, tokenizer, [prompt], how)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert len(ids) == len(set(ids)) > 2
        assert set(ids) & set(prompt), "tokens of the prompt are allowed"


def test_a_model_without_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny("llama", vocab_size=96)
    model.generation_config.eos_token_id = None
    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    bare.pad_token, bare.eos_token = "!", None
    how = Decoding(6, num_beams=3, stop=("a", "b", "c", "d", "e", "A", "B", "C", "D", "E"))
    texts = generate_text(model, bare, PROMPTS, how)
    assert texts == [generate_text(model, bare, [prompt], how)[0] for prompt in PROMPTS]


def test_stops_between_two_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    asked = iter([False, False, True])
    monitor = ProgressMonitor(4, should_stop=lambda: next(asked))
    with pytest.raises(EvaluationStopped):
        generate_text(model, tokenizer, PROMPTS, Decoding(9, num_beams=2), monitor=monitor)


def test_capacity_counts_rows_and_beams(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakit.evaluation.hf_generate.MAX_TOKENS", 60)
    rows: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _model, _args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    generate_text(model, tokenizer, PROMPTS, Decoding(5, num_beams=3))
    assert max(rows) == 6, "2 rows of 3 beams and 10 tokens"
    rows.clear()
    generate_text(model, tokenizer, PROMPTS, Decoding(5, num_beams=3), batch_size=4)
    assert set(rows) == {12}
    handle.remove()
