"""Tiny random models of the families whose roles lorakit knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

_LLAMA = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_BERT = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_NO_KV = {key: value for key, value in _LLAMA.items() if key != "head_dim"}

#: Name -> configuration class, its arguments, and the prefix of the model class.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _LLAMA),
    "qwen2": ("Qwen2", _LLAMA),
    "qwen3": ("Qwen3", _LLAMA),
    "mistral": ("Mistral", _LLAMA),
    "gemma2": ("Gemma2", _LLAMA | {"query_pre_attn_scalar": 4}),
    "gemma3": ("Gemma3Text", _LLAMA | {"query_pre_attn_scalar": 4}),
    "phi": ("Phi", _NO_KV),
    "phi3": ("Phi3", _NO_KV),
    "gpt2": ("GPT2", _GPT2),
    "gpt_neox": ("GPTNeoX", _BERT | {"rotary_pct": 1.0}),
    "opt": ("OPT", _BERT | {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "bloom": ("Bloom", {"vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 4}),
    "bert": ("Bert", _BERT),
    "roberta": ("Roberta", _BERT | {"pad_token_id": 1}),
    "distilbert": (
        "DistilBert",
        {"vocab_size": 64, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4},
    ),
    "deberta_v2": (
        "DebertaV2",
        _BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 16},
    ),
    "electra": ("Electra", _BERT | {"embedding_size": 16}),
    "albert": ("Albert", _BERT | {"embedding_size": 16}),
    "modernbert": ("ModernBert", _BERT | {"reference_compile": False}),
    "t5_encoder": (
        "T5",
        {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4},
    ),
}  # fmt: skip
_CLASSES = {
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"),
    "gpt2": ("GPT2LMHeadModel", "GPT2ForSequenceClassification"),
    "t5_encoder": ("T5EncoderModel", "T5EncoderModel"),
}
CAUSAL = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi", "phi3", "gpt2",
          "gpt_neox", "opt", "bloom")  # fmt: skip
ENCODERS = ("bert", "roberta", "distilbert", "deberta_v2", "electra", "albert", "modernbert")
ALL = tuple(_CONFIGS)


def tiny(
    family: str, classifier: bool | None = None, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """Return a random model in evaluation mode: a classifier with three labels for encoders (or on
    request), else a causal model. ``changes`` update the configuration."""
    name, arguments = _CONFIGS[family]
    if classifier is None:
        classifier = family in ENCODERS
    causal_class, classifier_class = _CLASSES.get(
        family, (f"{name}ForCausalLM", f"{name}ForSequenceClassification")
    )
    if classifier:
        changes = {"num_labels": 3, **changes}
    config = getattr(tf, f"{name}Config")(**(arguments | changes))
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(tf, classifier_class if classifier else causal_class)(config)
    torch.random.set_rng_state(state)
    return model.eval()


def save_classifier(folder: Path, tokenizer: Path, names: list[str], **changes: Any) -> Path:
    """Write a tiny BERT with a random head for the labels ``names``, and return ``folder``."""
    model = tiny(
        "bert", classifier=True, vocab_size=300, id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)}, **changes,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that texts are told apart
            if parameter.ndim > 1:
                parameter.normal_(generator=generator)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def token_ids(rows: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Return random ids that no family uses for padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 64, (rows, length), generator=generator)


def randomized(model: nn.Module) -> nn.Module:
    """Change everything that trains, as training would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=token_ids()).logits
    return out
