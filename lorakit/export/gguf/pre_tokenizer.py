"""Which of llama.cpp's pre-tokenizers splits texts as ``tokenizer.json`` does.

llama.cpp has the regular expressions in its code, and a GGUF file names one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lorakit.errors import ModelError, shown

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_OTHERS = r" ?[^\s\p{L}\p{N}]+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}\p{{L}}+|\p{{N}}{{1,3}}|{_OTHERS}[\r\n]*|{_REST}"
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"{_WORD}[{_UPPER}]*[{_LOWER}]+|{_WORD}[{_UPPER}]+[{_LOWER}]*|\p{{N}}"
    rf"|{_OTHERS}[\r\n/]*|{_REST}"
)
#: The regular expression of byte-level tokenizers that name none.
_GPT2 = "byte-level"
_DIGITS = "each digit"
#: The steps in order -> llama.cpp's name.
_NAMES = {
    (_GPT2,): "gpt-2",
    (_DIGITS, _GPT2): "smollm",
    (_LLAMA3,): "llama-bpe",
    (_QWEN2,): "qwen2",
    (_TEKKEN,): "tekken",
}


def pre_tokenizer_name(fast: Mapping[str, Any], name: str) -> str:
    """llama.cpp's name of the pre-tokenizer of a byte-level ``tokenizer.json``. Raises ModelError,
    which starts with the model's ``name``, for one that llama.cpp does not have or that lorakit
    does not know."""
    steps = tuple(_steps(fast.get("pre_tokenizer") or {}))
    if steps not in _NAMES or (fast.get("normalizer") or {}).get("type") not in (None, "NFC"):
        parts = {key: fast.get(key) for key in ("normalizer", "pre_tokenizer")}
        raise ModelError(
            f"{name}: tokenizer.json: {shown(parts, 160)}: cannot be written as GGUF; allowed: the "
            f"pre-tokenizers {', '.join(_NAMES.values())} of llama.cpp"
        )
    return _NAMES[steps]


def _steps(part: Mapping[str, Any]) -> Iterator[str]:
    kind = part.get("type")
    if kind == "Sequence":
        for inner in part["pretokenizers"]:
            yield from _steps(inner)
    elif kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        pattern = part["pattern"]
        yield pattern.get("Regex", f"string {shown(pattern)}")
    elif kind == "Digits" and part.get("individual_digits"):
        yield _DIGITS
    elif kind == "ByteLevel" and not part.get("add_prefix_space"):
        if part.get("use_regex", True):
            yield _GPT2
    else:
        yield f"unknown: {kind}"
