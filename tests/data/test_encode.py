from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from lorakit.data.encode import EncodedSplit, check_token_ids, encode_split
from lorakit.data.examples import ClassificationExample, Segment, TextExample
from lorakit.data.notes import split_notes
from lorakit.data.sources import Split
from lorakit.data.texts import encode_prompt, special_prefix
from lorakit.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    """One token per byte, no BOS."""
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def with_bos(tiny_llama: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def bert(tiny_bert: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_bert)


def pair(prompt: str, completion: str, eos: bool = True) -> TextExample:
    return TextExample((Segment(prompt, trained=False), Segment(completion, trained=True)), eos)


def encoded(examples: list[Any], tokenizer: Any, max_length: int = 100) -> EncodedSplit:
    rows = [{"example": example} for example in examples]
    split = Split("train", rows, "data.jsonl", "0")
    return encode_split(split, lambda row: row["example"], tokenizer, max_length)


def read(split: EncodedSplit, index: int, tokenizer: Any) -> tuple[str, str]:
    """The text of a row, and its trained text."""
    row = split[index]
    return tokenizer.decode(row.input_ids), tokenizer.decode(row.input_ids[row.loss_mask])


def test_completion_and_eos_are_trained(tokenizer: Any) -> None:
    split = encoded([pair("2+2=", " 4"), pair("é", "ü"), pair("", "ab", eos=False)], tokenizer)
    assert len(split) == 3
    assert read(split, 0, tokenizer) == ("2+2= 4</s>", " 4</s>")
    assert read(split, 1, tokenizer) == ("éü</s>", "ü</s>")
    assert read(split, 2, tokenizer) == ("ab", "ab")
    assert split.lengths.tolist() == [7, 5, 2]
    # A row's first token is the target of none: "a" of the last row counts for nothing.
    assert split.trained_tokens == 3 + 3 + 1
    assert (split.counts.truncated_rows, split.counts.cut_completions) == (0, 0)
    assert split.labels is None
    assert split.token_type_ids is None


def test_eos_is_trained_even_if_it_is_the_padding(tokenizer: Any) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    split = encoded([pair("a", "b")], tokenizer)
    assert split[0].loss_mask.tolist() == [False, True, True]
    assert split[0].input_ids[-1] == tokenizer.pad_token_id


def test_bos_precedes_the_prompt_and_eos_follows_once(with_bos: Any) -> None:
    assert special_prefix(with_bos) == [0]
    split = encoded([pair("abc", "de")], with_bos)
    assert read(split, 0, with_bos) == ("<s>abcde</s>", "de</s>")
    prompt = TextExample((Segment("abc", trained=False),), eos=False)
    assert encode_prompt(prompt, with_bos, 100) == split[0].input_ids[:4].tolist()


def test_a_text_with_bos_or_eos_gets_no_second_one(with_bos: Any) -> None:
    chat = TextExample((Segment("<s>ab</s>\n", trained=True),))
    split = encoded([pair("<s>abc", "de</s>"), pair("abc", "d</s>e"), chat], with_bos)
    assert read(split, 0, with_bos) == ("<s>abcde</s>", "de</s>")
    assert read(split, 1, with_bos) == ("<s>abcd</s>e</s>", "d</s>e</s>")
    assert read(split, 2, with_bos) == ("<s>ab</s>\n", "<s>ab</s>\n")
    prompt = TextExample((Segment("<s>abc", trained=False),), eos=False)
    assert encode_prompt(prompt, with_bos, 100) == split[0].input_ids[:4].tolist()
    short = encoded([pair("<s>abcd", "ef</s>")], with_bos, max_length=6)
    assert read(short, 0, with_bos) == ("<s>cdef</s>", "ef</s>")


def test_no_prefix_without_bos(tokenizer: Any, bert: Any) -> None:
    assert special_prefix(tokenizer) == []
    assert special_prefix(bert) == [2]


@pytest.mark.parametrize(
    ("max_length", "whole", "trained", "cut"),
    [
        (9, "<s>abcdef</s>", "ef</s>", False),
        (8, "<s>abcdef</s>", "ef</s>", False),
        (6, "<s>cdef</s>", "ef</s>", False),
        (4, "<s>ef</s>", "ef</s>", False),
        (3, "<s>ef", "ef", True),
        (2, "<s>e", "e", True),
    ],
)
def test_long_rows_lose_the_beginning_of_the_prompt_first(
    with_bos: Any, max_length: int, whole: str, trained: str, cut: bool
) -> None:
    split = encoded([pair("abcd", "ef")], with_bos, max_length)
    assert read(split, 0, with_bos) == (whole, trained)
    assert split.counts.truncated_rows == (max_length < 8)
    assert split.counts.lost_tokens == max(8 - max_length, 0)
    assert split.counts.tokens == min(8, max_length)
    assert split.counts.cut_completions == cut
    prompt = TextExample((Segment("abcd", trained=False),), eos=False)
    ids = encode_prompt(prompt, with_bos, max_length)
    assert len(ids) <= max_length
    assert with_bos.decode(ids) == "<s>" + "abcd"[-(max_length - 1) :]


@pytest.mark.parametrize("max_length", [2, 3, 5, 8, 12])
@pytest.mark.parametrize("model", ["tokenizer", "with_bos"])
def test_the_parts_of_a_document_predict_each_of_its_tokens_once(
    request: pytest.FixtureRequest, model: str, max_length: int
) -> None:
    tokenizer = request.getfixturevalue(model)
    for length in range(1, 20):
        text = "abcdefghijklmnopqrstuvwxyz"[:length]
        segments = (Segment(text, trained=True),)
        (whole,) = predicted(encoded([TextExample(segments)], tokenizer))
        split = encoded([TextExample(segments, splits=True)], tokenizer, max_length)
        parts = predicted(split)
        assert [token for part in parts for token in part] == whole
        assert set(split.lengths[:-1]) <= {max_length}
        assert split.counts.lost_tokens == split.counts.truncated_rows == 0
        was_split = {"split_documents": 1, "document_parts": len(parts)} if len(parts) > 1 else {}
        assert split.counts.notes == was_split
    (note,) = split_notes(split, Split("train", [{}], "d", "0"), max_length)
    assert f"1 of 1 documents are longer than {max_length} tokens and became {len(split)}" in note


def predicted(split: EncodedSplit) -> list[list[int]]:
    """The tokens of each row that count in the loss."""
    return [row.input_ids[1:][row.loss_mask[1:]].tolist() for row in split]


def test_segments_alternate(tokenizer: Any) -> None:
    segments = (Segment("a", False), Segment("b", True), Segment("c", False), Segment("d", True))
    split = encoded([TextExample(segments), TextExample((*segments[:3],))], tokenizer)
    assert read(split, 0, tokenizer) == ("abcd</s>", "bd</s>")
    assert read(split, 1, tokenizer) == ("abc</s>", "b")


def test_a_row_without_trained_tokens_is_named(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"^data\.jsonl, row 2: nothing to train on$"):
        encoded([pair("a", "b"), pair("a", "", eos=False)], tokenizer)
    # The loss is on the token after the first: a single trained one has none before it.
    with pytest.raises(DataError, match=r"row 1: nothing to train on$"):
        encoded([pair("", "a", eos=False)], tokenizer)
    with pytest.raises(DataError, match=r"row 1: nothing to train on within task.max_length = 1"):
        encoded([pair("", "abc")], tokenizer, max_length=1)


def test_a_row_that_the_task_refuses_is_named(tokenizer: Any) -> None:
    def refuse(row: Any) -> Any:
        raise DataError("column 'x' is empty")

    split = Split("train", [{}], "data.jsonl", "0")
    with pytest.raises(DataError, match=r"^data\.jsonl, row 1: column 'x' is empty$"):
        encode_split(split, refuse, tokenizer, 10)


def test_more_rows_than_are_tokenized_at_once(tokenizer: Any) -> None:
    done: list[int] = []
    rows = [{"n": n} for n in range(2500)]
    split = encode_split(
        Split("train", rows, "data", "0"), lambda row: pair(f"{row['n']}", "x"), tokenizer, 50,
        done.append,
    )  # fmt: skip
    assert done == [1000, 2000, 2500]
    for index in (0, 999, 1000, 2499):
        assert read(split, index, tokenizer) == (f"{index}x</s>", "x</s>")
    assert split.input_ids.dtype == np.uint16
    assert split.loss_mask.nbytes == len(split.input_ids)


def test_pairs_have_types_and_labels(bert: Any) -> None:
    examples = [ClassificationExample("ab", "c", 1), ClassificationExample("x" * 30, "yz", 0)]
    split = encoded(examples, bert, max_length=12)
    assert split.labels == (1, 0)
    assert bert.decode(split[0].input_ids) == "[CLS]ab[SEP]c[SEP]"
    types = split[0].token_type_ids
    assert types is not None
    assert types.tolist() == [0, 0, 0, 0, 1, 1]
    assert bert.decode(split[1].input_ids) == f"[CLS]{'x' * 7}[SEP]yz[SEP]"
    assert (split.counts.truncated_rows, split.counts.cut_completions) == (1, 0)
    assert split[1].label == 0
    single = encoded([ClassificationExample("ab", None, 0.5)], bert)
    assert bert.decode(single[0].input_ids) == "[CLS]ab[SEP]"
    assert single.labels == (0.5,)


@pytest.mark.parametrize(("second", "special"), [(None, 2), ("x" * 9, 3)])
def test_an_encoder_needs_room_besides_its_special_tokens(
    bert: Any, second: str | None, special: int
) -> None:
    examples = [ClassificationExample("x" * 9, second, 0)]
    expected = f"task.max_length = {special}: .* allowed: {special + 1} or more"
    with pytest.raises(DataError, match=expected):
        encoded(examples, bert, max_length=special)
    assert encoded(examples, bert, max_length=special + 1).lengths.tolist() == [special + 1]


def test_ids_outside_of_the_embedding(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    split = encoded([pair("a", "b")], tokenizer)
    largest = max(int(split.input_ids.max()), tokenizer.pad_token_id or 0)
    check_token_ids(split, tokenizer, largest + 1)
    with pytest.raises(
        DataError, match=f"produces id {largest}, but the model has {largest} embed"
    ):
        check_token_ids(split, tokenizer, largest)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    with pytest.raises(DataError, match=f"produces id {tokenizer.pad_token_id}, "):
        check_token_ids(split, tokenizer, largest + 1)
