from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lorakit.data.encode import encode_split
from lorakit.data.examples import ChatExample, Example, Segment, TextExample
from lorakit.data.sources import Split
from lorakit.pipeline.preview import DescribedRow, describe_row, preview, summarize
from lorakit.tasks.base import Row
from tests.training.runs import completion_rows, recipe_for, write_rows

MIXED = "日本語 🚀 👩‍👩‍👧 ಠ_ಠ naïve\n\tend "


def split_of(*rows: dict[str, Any]) -> Split:
    return Split("train", rows, "rows", "0")


def pair(row: Row) -> Example:
    return TextExample((Segment(row["p"], trained=False), Segment(row["c"], trained=True)))


def chat(row: Row) -> Example:
    return ChatExample(({"role": "user", "content": row["p"]},
                        {"role": "assistant", "content": row["c"]}))  # fmt: skip


def described(path: Path, row: dict[str, str], to_example: Any, length: int = 512) -> DescribedRow:
    tokenizer = AutoTokenizer.from_pretrained(path)
    (found,) = describe_row(split_of(row), 0, to_example, tokenizer, length)
    return found


def trained_text(row: DescribedRow) -> str:
    return "".join(piece.text for piece in row.pieces if piece.trained)


@pytest.mark.parametrize("model", ["smollm2", "tiny_llama"])
@pytest.mark.parametrize("to_example", [pair, chat])
def test_pieces_contain_whole_characters(
    model: str, to_example: Any, request: pytest.FixtureRequest
) -> None:
    """Most characters of MIXED consist of several tokens, none of which decodes alone."""
    path = request.getfixturevalue(model)
    row = described(path, {"p": f"{MIXED}?", "c": f"{MIXED}!"}, to_example)
    text = "".join(piece.text for piece in row.pieces)
    end = "<|im_end|>" if model == "smollm2" else "</s>"
    assert "\ufffd" not in text
    assert f"{MIXED}?" in text
    assert trained_text(row) == f"{MIXED}!{end}"
    assert [piece.text for piece in row.pieces if piece.special and piece.trained] == [end]
    assert len(row.input_ids) == len(row.tokens) == len(row.loss_mask) > len(row.pieces)


def test_a_character_of_two_kinds_belongs_to_the_later_piece(tiny_llama: Path) -> None:
    """Nothing precedes a row's first token, so it is never trained, whatever the task says."""
    row = described(tiny_llama, {"p": "", "c": "日本"}, pair)
    assert row.loss_mask == (False,) + (True,) * 6
    assert [(piece.text, piece.trained) for piece in row.pieces] == [("日本", True), ("</s>", True)]


def test_data_with_the_replacement_character(tiny_llama: Path) -> None:
    row = described(tiny_llama, {"p": "a\ufffd", "c": "\ufffdb"}, pair)
    assert [piece.text for piece in row.pieces] == ["a\ufffd", "\ufffdb", "</s>"]


def test_truncated_rows(tiny_llama: Path) -> None:
    long = {"p": "12345", "c": "abc"}
    whole, truncated, cut = (described(tiny_llama, long, pair, n) for n in (9, 6, 3))
    assert [(row.truncated, row.cut) for row in (whole, truncated, cut)] == [
        (False, False), (True, False), (True, True)]  # fmt: skip
    assert ["".join(p.text for p in row.pieces) for row in (whole, truncated, cut)] == [
        "12345abc</s>", "45abc</s>", "abc"]  # fmt: skip


def test_word_pieces_keep_their_spaces(minilm: Path) -> None:
    def words(row: Row) -> Example:
        return TextExample((Segment(row["p"], False), Segment(row["c"], True)), eos=False)

    row = described(minilm, {"p": "unaffable pythonistas", "c": "snowboarded tokenization"}, words)
    assert [piece.text for piece in row.pieces] == [
        "[CLS]", " unaffable pythonistas", " snowboarded tokenization"]  # fmt: skip
    assert any(token.startswith("##") for token in row.tokens)


def test_byte_fallback_tokens(tmp_path: Path) -> None:
    """A tokenizer like Llama 2's: word marks, byte fallback, and no leading space."""
    names = ["<s>", "</s>", "<unk>", "▁", *"abcdefgh", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges=[],
                                   unk_token="<unk>", byte_fallback=True))  # fmt: skip
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    row = described(tmp_path, {"p": "日本 abc", "c": "🚀 def ಠ"}, pair)
    assert [(piece.text, piece.trained) for piece in row.pieces] == [
        ("日本 abc", False), ("🚀 def ಠ", True), ("</s>", True)]  # fmt: skip


def test_file_and_row_of_a_row(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"p": "a", "c": str(i)} for i in range(4)]
    split = Split("train", rows, "both", "0", ((tmp_path / "1", 3), (tmp_path / "2", 1)))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    (row,) = describe_row(split, 3, pair, tokenizer, 64)
    assert row.where == f"{tmp_path / '2'}, row 1"
    assert trained_text(row) == "3</s>"


def test_summary_counts(tiny_llama: Path) -> None:
    """Compare with counts made row by row from the text: a byte is a token."""
    texts = [("ab", "xyz"), ("", "q"), ("12345", "6789"), ("p", "123456789")]
    split = split_of(*({"p": p, "c": c} for p, c in texts))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    summary = summarize(encode_split(split, pair, tokenizer, 8), {tokenizer.eos_token_id}, 8)
    lengths = [min(len(p) + len(c) + 1, 8) for p, c in texts]
    trained = [min(len(c) + 1, 8) for _, c in texts]
    trained = [n - (n == length) for n, length in zip(trained, lengths, strict=True)]
    assert (summary.rows, summary.tokens) == (4, sum(lengths))
    assert (summary.min_length, summary.max_length) == (min(lengths), max(lengths))
    assert summary.mean_length == pytest.approx(np.mean(lengths))
    assert summary.trained_tokens == sum(trained)
    assert summary.trained_share == sum(trained) / sum(lengths)
    assert (summary.truncated_rows, summary.cut_completions, summary.rows_without_eos) == (2, 1, 1)
    assert summary.lost_tokens == sum(max(len(p) + len(c) + 1 - 8, 0) for p, c in texts)


def test_first_rows_of_a_mixture(tiny_llama: Path, tmp_path: Path) -> None:
    path = []
    for name, weight in (("a", 1), ("b", 100)):
        write_rows(tmp_path / f"{name}.jsonl", completion_rows(200))
        path.append({"path": str(tmp_path / f"{name}.jsonl"), "weight": weight})
    recipe = recipe_for(tmp_path, tiny_llama, "completion", task__path=path)
    said: list[str] = []
    assert preview(recipe, limit=10, say=said.append).training_rows == 11
    assert not any("an epoch draws" in note for note in said)
    preview(recipe, say=said.append)
    assert any(note.startswith("train: an epoch draws 202 rows by weight: ") for note in said)


def test_a_tokenizer_with_two_ends(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    bare = split_of({"t": "ab."}, {"t": "ab"})

    def text(row: Row) -> Example:
        return TextExample((Segment(row["t"], trained=True),), eos=False)

    stop = tokenizer.convert_tokens_to_ids(".")
    encoded = encode_split(bare, text, tokenizer, 8)
    assert summarize(encoded, {tokenizer.eos_token_id, stop}, 64).rows_without_eos == 1
    assert json.dumps(vars(summarize(encoded, set(), 64)))
