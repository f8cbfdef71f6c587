from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lorakit.errors import DataError
from lorakit.evaluation.generation import generate_text, stream_text
from lorakit.evaluation.progress import EvaluationStopped, ProgressMonitor
from lorakit.evaluation.sampling import Decoding, before_stop
from lorakit.models.load import load_pretrained
from lorakit.recipe.sections import ModelSection
from tests.families import CAUSAL, tiny

TEXTS = ["a", "to be or not", "xyz" * 9, "a", "SELECT name FROM t", "!"]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return tiny("llama", vocab_size=len(tokenizer), eos_token_id=1)


@pytest.fixture
def prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return [tokenizer(text).input_ids for text in TEXTS]


def alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], tokens: int
) -> list[int]:
    """Greedy decoding with a full forward pass per token: no cache, no padding."""
    ids = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids], device=model.device)).logits
            ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", CAUSAL)
def test_a_batch_equals_single_prompts(
    family: str, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    model = tiny(family, vocab_size=len(tokenizer))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    wanted = [
        tokenizer.decode(alone(model, tokenizer, prompt, 10), skip_special_tokens=True)
        for prompt in prompts
    ]
    assert len(set(wanted)) > 2
    for batch_size in (1, 2, 8):
        assert wanted == generate_text(
            model, tokenizer, prompts, Decoding(10), batch_size=batch_size
        )


@pytest.mark.gpu
@pytest.mark.parametrize("family", CAUSAL)
def test_rows_end_on_the_gpu_as_on_the_cpu(
    family: str, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    model = tiny(family, vocab_size=len(tokenizer)).to("cuda")  # type: ignore[arg-type]
    full = [
        tokenizer.decode(alone(model, tokenizer, prompt, 24), skip_special_tokens=True)
        for prompt in prompts
    ]
    stop = (full[2][9:11],)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    found = generate_text(model, tokenizer, prompts, Decoding(24, stop=stop), batch_size=4)
    assert found == [before_stop(text, stop)[0] for text in full]


def test_finished_rows_leave_the_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    full = generate_text(model, tokenizer, prompts, Decoding(32))
    rows: list[int] = []
    model.register_forward_pre_hook(
        lambda _model, _args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    mark = full[2][3:5]
    stopped = generate_text(model, tokenizer, prompts, Decoding(32, stop=(mark,)))
    assert stopped == [before_stop(text, (mark,))[0] for text in full]
    ended = [text for text in {*full} if mark in text]
    assert 0 < len(ended) < len({*full})
    assert rows[0] == len({*TEXTS})
    assert rows[-1] <= len({*TEXTS}) - len(ended)


def test_ends_at_an_eos_of_the_generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = tokenizer("to be").input_ids
    ids = alone(model, tokenizer, prompt, 12)
    end = ids[5]
    first = ids.index(end)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    assert generate_text(model, tokenizer, [prompt], Decoding(12)) == [
        tokenizer.decode(ids[:first])
    ]


def test_ignores_the_checkpoints_sampling_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    wanted = generate_text(model, tokenizer, prompts, Decoding(12))
    own = GenerationConfig(
        do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0, num_beams=2,
        min_new_tokens=4, no_repeat_ngram_size=1, max_length=3, eos_token_id=1,
    )  # fmt: skip
    model.generation_config = own
    model.train()
    state = torch.get_rng_state()
    assert generate_text(model, tokenizer, prompts, Decoding(12)) == wanted
    assert torch.equal(state, torch.get_rng_state())
    assert model.generation_config is own
    assert model.training


def test_sampling_follows_the_seed_and_top_p(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    def sampled(seed: int, temperature: float, top_p: float = 1.0) -> list[str]:
        how = Decoding(12, temperature=temperature, top_p=top_p, seed=seed)
        return generate_text(model, tokenizer, prompts, how)

    greedy = generate_text(model, tokenizer, prompts, Decoding(12))
    assert sampled(1, 1.0) == sampled(1, 1.0)
    assert sampled(1, 1.0) != sampled(2, 1.0)
    texts = sampled(1, 1.0)
    assert texts[0] != texts[3], "equal prompts are sampled separately"
    assert sampled(1, 1.0, top_p=1e-6) == greedy


def test_prompts_that_leave_no_room_are_rejected(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(DataError, match=r"prompt 2: its 60 tokens .* window of 64 tokens"):
        generate_text(model, tokenizer, [[5], [5] * 60], Decoding(5))
    with pytest.raises(DataError, match="prompt 1: no token"):
        generate_text(model, tokenizer, [[]], Decoding(5))
    assert len(generate_text(model, tokenizer, [[5] * 60], Decoding(4))) == 1


@pytest.mark.parametrize(
    "how", [Decoding(20), Decoding(20, num_beams=2), Decoding(20, temperature=1.0)]
)
def test_each_answer_is_limited_to_the_window(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, how: Decoding
) -> None:
    prompts = [[5] * 60, [6, 7], [8] * 50, [9] * 60]
    texts = generate_text(model, tokenizer, prompts, replace(how, fit_window=True))
    for row, (limit, prompt) in enumerate(zip([4, 20, 14, 4], prompts, strict=True)):
        alone = replace(how, max_new_tokens=limit)
        assert texts[row] == generate_text(model, tokenizer, [prompt], alone, rows=[row])[0]
    with pytest.raises(DataError, match=r"prompt 1: its 64 tokens fill .* allowed: at most 63"):
        generate_text(model, tokenizer, [[5] * 64], replace(how, fit_window=True))


def test_a_pad_token_of_another_model_is_rejected(model: PreTrainedModel, tiny_llama: Path) -> None:
    other = AutoTokenizer.from_pretrained(tiny_llama)
    other.add_special_tokens({"pad_token": "<pad>"})
    with pytest.raises(
        DataError, match=r"its pad token has id 258, but the model has 258 embeddings"
    ):
        generate_text(model, other, [[5]], Decoding(2))


def test_progress_and_stopping(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    seen: list[tuple[int, int]] = []
    generate_text(
        model, tokenizer, prompts, Decoding(4), batch_size=2,
        monitor=ProgressMonitor(len(prompts), lambda *done: seen.append(done)),
    )  # fmt: skip
    assert seen[-1] == (6, 6)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    model.train()
    monitor = ProgressMonitor(len(prompts), should_stop=lambda: True)
    with pytest.raises(EvaluationStopped):
        generate_text(model, tokenizer, prompts, Decoding(4), monitor=monitor)
    assert model.training


@pytest.mark.parametrize(
    ("text", "stop", "cut", "ended"),
    [
        ("\n SELECT 1\nmore", ("\n",), "\n SELECT 1", True),
        ("\n\n", ("\n",), "\n\n", False),
        ("a;b\nc", ("\n", ";"), "a", True),
        ("abcde", ("abcd", "c"), "ab", True),
        ("abcde", ("bc", "abc"), "", True),
        ("abc", (), "abc", False),
        ("", ("\n",), "", False),
    ],
)
def test_stop_sequences_count_after_the_first_visible_character(
    text: str, stop: tuple[str, ...], cut: str, ended: bool
) -> None:
    assert before_stop(text, stop) == (cut, ended)


def test_streaming_equals_batch_generation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    pieces: list[str] = []
    text = stream_text(model, tokenizer, prompts[1], pieces.append, Decoding(20))
    assert [text] == generate_text(model, tokenizer, [prompts[1]], Decoding(20))
    assert "".join(pieces) == text
    with pytest.raises(DataError, match="window"):
        stream_text(model, tokenizer, [5] * 60, pieces.append, Decoding(20))


def test_smollm2_does_not_depend_on_the_batch(smollm2: Path) -> None:
    section = ModelSection(name_or_path=str(smollm2), dtype="float32")
    loaded = load_pretrained(section, "causal")
    texts = ["The capital of France is", "1, 2, 3,", 'columns: "A", "B"\nquestion: Which A?\nSQL:']
    ids = [loaded.tokenizer(text).input_ids for text in texts]
    one, many = (
        generate_text(loaded.model, loaded.tokenizer, ids, Decoding(8), batch_size=size)
        for size in (1, 3)
    )
    assert one == many
    assert "Paris" in one[0]
    assert one[1].startswith(" 4, 5")


def test_the_output_layer_gets_contiguous_states(tiny_llama: Path) -> None:
    """A frozen weight times a 3-D slice would copy the weight for each row."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    seen = []
    model.get_output_embeddings().register_forward_hook(
        lambda _module, inputs, _output: seen.append(inputs[0].is_contiguous())
    )
    tokenizer.pad_token = tokenizer.eos_token
    generate_text(model, tokenizer, [[5, 6, 7], [8, 9, 10]], Decoding(3))
    assert seen
    assert all(seen)
