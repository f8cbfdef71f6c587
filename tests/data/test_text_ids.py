"""Texts get the ids that the tokenizer itself returns, however they are tokenized."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.byt5 import ByT5Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX as QWEN35

from lorakit.data.text_ids import TextTokenizer, WordIds, has_separate_words

LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
#: Joined at random: words, and what tokenizers treat specially next to spaces.
PIECES = [
    *("the", "lazy", "dog", "don't", "We'LL", "Straße", "naïve", "e\u0301", "日本語", "한국", "été", "x_1"),
    *("0", "12", "2024", "٣", "½", ".", ",", "...", "(", ")", "-", "'", "'s", '"', "😀", "\u0301", "\u200d"),
    *("\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\u2028", "\x0b", "\x1c", "\x85", "\0"),
    *("<s>", "</s>", "<|user|>", "[LEFT]", "[WORD]", "   "),
]  # fmt: skip


def texts(count: int, seed: int = 0) -> list[str]:
    choose = random.Random(seed)

    def text() -> str:
        return "".join(
            choose.choice(PIECES) + choose.choice(["", " ", " ", " ", "  "])
            for _ in range(choose.randrange(25))
        )

    return ["", " ", "a", " a", "a ", *(text() for _ in range(count))]


def split(pattern: str, **changed: Any) -> Any:
    given = {"pattern": Regex(pattern), "behavior": "isolated", **changed}
    return pre_tokenizers.Split(**given)


def byte_level(*before: Any, regex: bool = True, prefix: bool = False) -> Any:
    last = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    return pre_tokenizers.Sequence([*before, last]) if before else last


def trained(pre_tokenizer: Any, normalizer: Any = None, added: Sequence[Any] = ()) -> Any:
    """A BPE tokenizer whose merges span spaces where the pre-tokenizer lets them."""
    backend = Tokenizer(models.BPE())
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    alphabet = [*pre_tokenizers.ByteLevel.alphabet(), " ", *"".join(PIECES)]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    backend.train_from_iterator(texts(300, seed=1), trainer)
    backend.add_tokens(["<|user|>", AddedToken("[LEFT]", lstrip=True), *added])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


def own_ids(tokenizer: Any, some: list[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(some, add_special_tokens=False).input_ids
    return found


def check(tokenizer: Any, some: list[str]) -> None:
    wanted = own_ids(tokenizer, some)
    tokenize = TextTokenizer(tokenizer)
    for _ in range(2):  # the second time, most words are known
        found = tokenize(some)
        assert [ids.tolist() for ids in found] == wanted


SEPARATE = {
    "gpt2": lambda: trained(byte_level()),
    "prefix": lambda: trained(byte_level(prefix=True)),
    "digits": lambda: trained(byte_level(pre_tokenizers.Digits(individual_digits=True))),
    "runs of digits": lambda: trained(byte_level(pre_tokenizers.Digits(), prefix=True)),
    "llama3": lambda: trained(byte_level(split(LLAMA3), regex=False)),
    "qwen2": lambda: trained(byte_level(split(QWEN2), regex=False), normalizers.NFC()),
    "qwen3.5": lambda: trained(byte_level(split(QWEN35), regex=False), normalizers.NFC()),
    "several": lambda: trained(byte_level(pre_tokenizers.Digits(), split(QWEN2), regex=True)),
    "spaces": lambda: trained(byte_level(), None, ["  ", "   "]),
    "word": lambda: trained(byte_level(), None, [AddedToken("[WORD]", single_word=True), "dog"]),
    "space first": lambda: trained(byte_level(), None, [" the", " ("]),
}
OTHERS = {
    "spans words": lambda: trained(byte_level(regex=False)),
    "no steps": lambda: trained(None),
    "split at spaces": lambda: trained(byte_level(split(" "), regex=False)),
    "merged": lambda: trained(byte_level(split(QWEN2, behavior="merged_with_next"), regex=False)),
    "inverted": lambda: trained(byte_level(split(QWEN2, invert=True), regex=False)),
    "metaspace": lambda: trained(pre_tokenizers.Metaspace(prepend_scheme="first")),
    "bert": lambda: trained(pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()),
    "strips": lambda: trained(byte_level(), normalizers.Strip()),
    "takes spaces": lambda: trained(byte_level(), None, [AddedToken("dog", rstrip=True)]),
    "two words": lambda: trained(byte_level(), None, ["lazy dog", "the "]),
}  # fmt: skip


@pytest.mark.parametrize("kind", SEPARATE)
def test_words_are_tokenized_as_within_their_text(kind: str) -> None:
    tokenizer = SEPARATE[kind]()
    assert has_separate_words(tokenizer.backend_tokenizer)
    check(tokenizer, texts(3000))


@pytest.mark.parametrize("kind", OTHERS)
def test_texts_whose_words_depend_on_each_other_are_tokenized_whole(kind: str) -> None:
    tokenizer = OTHERS[kind]()
    assert not has_separate_words(tokenizer.backend_tokenizer)
    check(tokenizer, texts(500))


def test_a_random_tokenizer_is_called_for_every_text() -> None:
    """BPE dropout draws the tokens of a word anew each time."""
    tokenizer = trained(byte_level())
    tokenizer.backend_tokenizer.model.dropout = 0.5
    assert not has_separate_words(tokenizer.backend_tokenizer)


class Upper(PreTrainedTokenizerFast):  # type: ignore[misc]
    """Changes texts before they are tokenized, as some tokenizers do."""

    def _encode_plus(self, text: Any, *arguments: Any, **named: Any) -> Any:
        return super()._encode_plus([t.upper() for t in text], *arguments, **named)


def test_a_tokenizer_that_does_more_is_called_itself() -> None:
    backend = trained(byte_level()).backend_tokenizer
    check(Upper(tokenizer_object=backend), texts(100))
    check(ByT5Tokenizer(), texts(100))


def test_the_settings_of_the_last_call_are_ignored() -> None:
    tokenizer = trained(byte_level())
    tokenizer(["a b c d", "a"], truncation=True, max_length=2, padding="max_length")
    check(tokenizer, texts(50))


@pytest.mark.parametrize("whole", [False, True])
def test_special_tokens_are_split_if_the_tokenizer_splits_them(whole: bool) -> None:
    tokenizer = trained(byte_level())
    tokenizer.split_special_tokens = not whole
    (ids,) = TextTokenizer(tokenizer)(["a <s> b"])
    assert (tokenizer.convert_tokens_to_ids("<s>") in ids) == whole
    check(tokenizer, texts(200))


def test_no_texts() -> None:
    assert TextTokenizer(trained(byte_level()))([]) == []


def counted(tokenizer: Any) -> tuple[Callable[[Sequence[str]], list[array[int]]], list[str]]:
    """A function for ``WordIds``, and the list of all that it is called with."""
    asked: list[str] = []

    def encode(some: Sequence[str]) -> list[array[int]]:
        asked.extend(some)
        return [array("i", ids) for ids in own_ids(tokenizer, list(some))] if some else []

    return encode, asked


def test_words_are_remembered_but_not_long_ones() -> None:
    tokenizer = trained(byte_level())
    encode, asked = counted(tokenizer)
    words = WordIds(encode)
    long = "long" * 20
    for _ in range(2):
        found = words.ids([f"the lazy {long} dog", "a dog"])
        assert [ids.tolist() for ids in found] == own_ids(
            tokenizer, [f"the lazy {long} dog", "a dog"]
        )
    assert [asked.count(word) for word in (" lazy", " dog", f" {long}")] == [1, 1, 2]


def test_no_more_words_are_remembered_than_a_limit_and_new_words_must_be_few() -> None:
    def encode(some: Sequence[str]) -> list[array[int]]:
        asked.extend(some)
        return [array("i", [len(text)]) for text in some]

    asked: list[str] = []
    words = WordIds(encode)
    batches = [" ".join(str(n) for n in range(begin, begin + 50_000)) for begin in (0, 50_000)]
    words.ids(batches[:1])
    words.ids(batches[:1])
    assert len(asked) == 50_000
    assert words.worthwhile
    for _ in range(2):  # these are too many
        words.ids(batches[1:])
    assert len(asked) == 3 * 50_000 - 1  # the first word is remembered separately
    assert not words.worthwhile
