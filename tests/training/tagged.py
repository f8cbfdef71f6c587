"""A tiny BERT with word pieces, and rows of tagged words."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from tests.families import tiny
from tests.training.runs import recipe_for, write_rows

TAGS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
_WORDS = ["anna", "bert", "york", "new", "rome", "is", "in", "met"]
_SENTENCES = [
    (["Anna", "met", "Bertolt", "Br-echt", "in", "New", "Yorkshire"],
     ["B-PER", "O", "B-PER", "I-PER", "O", "B-LOC", "I-LOC"]),
    (["Rome", "."], ["B-LOC", "O"]),
    (["annabel", "is", "in", "Romeo", "u.s."], ["B-PER", "O", "O", "B-LOC", "I-LOC"]),
]  # fmt: skip


def tagged_rows(count: int) -> list[dict[str, Any]]:
    rows = []
    for index in range(count):
        tokens, tags = _SENTENCES[index % 3]
        start = index % 2
        rows.append({"tokens": tokens[start:], "tags": tags[start:]})
    return rows


def write_word_pieces(folder: Path, **changes: Any) -> Path:
    """Write a tiny BERT without a head, whose tokenizer splits words into pieces."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    letters = [*string.ascii_lowercase, ".", "-", *(f"##{c}" for c in string.ascii_lowercase)]
    names = [*special, *_WORDS, *letters]
    backend = Tokenizer(models.WordPiece({n: i for i, n in enumerate(names)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_input_names=["input_ids", "attention_mask"], model_max_length=64,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    model = tiny(
        "bert", classifier=True, vocab_size=len(names), hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, **changes,
    )  # fmt: skip
    model.base_model.save_pretrained(folder)
    return folder


def tagged_recipe(folder: Path, base: Path, **changes: Any) -> Any:
    data = folder / "data"
    if not data.exists():
        write_rows(data / "train.jsonl", tagged_rows(16))
        write_rows(data / "validation.jsonl", tagged_rows(6))
    keys = {
        "task__max_length": 64, "train__max_steps": 30, "train__epochs": None,
        "train__learning_rate": 3e-2, **changes,
    }  # fmt: skip
    return recipe_for(folder, base, "token_classification", **keys)
