"""The tokenizer: a pad token where it has none, EOS left as it is."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorakit.errors import ModelError

#: Tokens that families keep for padding, before a token that means something is taken.
_RESERVED = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|endoftext|>")


def load_tokenizer(name: str, hub: dict[str, Any]) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """The tokenizer, and notes on what was changed. Raises ModelError if there is none.

    No label is ever masked by the pad token's id, so that EOS is learnt also where both are one.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **hub)
    except Exception as error:  # a missing file, a bad one, or the network: all say the same
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(said[:2]) or type(error).__name__
        raise ModelError(f"model.name_or_path: {name}: no usable tokenizer: {reason}") from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"model.name_or_path: {name}: {type(tokenizer).__name__} has no fast form "
            "(tokenizer.json), which lorakit needs"
        )
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is not None:
        return tokenizer, []
    pad = _pad_token(tokenizer)
    if pad is None:
        raise ModelError(f"model.name_or_path: {name}: the tokenizer has neither a pad, an unknown "
                         "nor an EOS token")  # fmt: skip
    tokenizer.pad_token = pad
    return tokenizer, [f"the tokenizer has no pad token: {pad!r} pads; EOS stays as it is"]


def _pad_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    vocabulary = tokenizer.get_vocab()
    eos = tokenizer.eos_token
    for token in _RESERVED:
        if token in vocabulary and token != eos:
            return token
    last: str | None = tokenizer.unk_token or eos
    return last
