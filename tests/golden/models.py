"""Tiny models and tokenizers that are bit-equal on every machine. The weights are an integer hash
of the parameter's name and the element's index, so they do not depend on a random number generator.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

_POSITIONS = 320
_CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def uniform(count: int, seed: int) -> np.ndarray[Any, Any]:
    """Return ``count`` float64 values in [-1, 1): SplitMix64 of the counter, exact on every
    machine."""
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64(seed) * np.uint64(0xD1342543DE82EF95)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0


def fill(model: torch.nn.Module) -> None:
    """Fill matrices uniformly with variance 1 / columns, norm weights near 1, other vectors near
    0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = uniform(parameter.numel(), zlib.crc32(name.encode()))
            if parameter.ndim > 1:
                values *= (3.0 / parameter.shape[-1]) ** 0.5
            else:
                values = 0.1 * values + name.endswith("weight")
            parameter.copy_(torch.from_numpy(values).view_as(parameter))


def _ascii_tokenizer(special: list[str]) -> Tokenizer:
    """Return a tokenizer with one token per printable ASCII character, so that generated text shows
    every token."""
    printable = {"\u010a", "\u0120", *map(chr, range(33, 127))}  # byte-level for "\n" and " "
    names = special + sorted(printable)
    tokenizer = Tokenizer(BPE({name: index for index, name in enumerate(names)}, merges=[]))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _causal_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_ascii_tokenizer(["<s>", "</s>"]), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def _encoder_tokenizer() -> PreTrainedTokenizerFast:
    special = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
    }
    backend = _ascii_tokenizer(list(special.values()))
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, **special)


def _llama(tokens: int) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokens, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=_POSITIONS,
            bos_token_id=0, eos_token_id=1, pad_token_id=None,
        )
    )  # fmt: skip


def _gpt2(tokens: int) -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=tokens, n_embd=16, n_layer=2, n_head=4, n_positions=_POSITIONS,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def _bert(tokens: int) -> PreTrainedModel:
    return BertModel(
        BertConfig(
            vocab_size=tokens, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=_POSITIONS, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


_MODELS: dict[str, tuple[Callable[[int], PreTrainedModel], Callable[[], Any]]] = {
    "llama": (_llama, _causal_tokenizer),
    "gpt2": (_gpt2, _causal_tokenizer),
    "bert": (_bert, _encoder_tokenizer),
}


def write_models(folder: Path) -> None:
    """Write each model to ``folder/NAME`` for transformers to load."""
    for name, (build, build_tokenizer) in _MODELS.items():
        tokenizer = build_tokenizer()
        model = build(len(tokenizer)).eval()
        fill(model)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
