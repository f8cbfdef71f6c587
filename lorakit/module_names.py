"""Module names: abbreviated in messages, matched by targets, and as in a multimodal base."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import product

from lorakit.recipe.layer_ranges import format_layers, parse_layers

#: Prefixes that a multimodal class adds to the names of its text part (Qwen3.5, Gemma 3, Llama 4).
_WRAPPERS = ("model", "language_model", "text_model")
_BASE_PREFIXES = ("model.language_model.", "language_model.model.", "model.text_model.")

_ATTENTION = r"(?:^|\.)(?:\w*attn|\w*attention|SelfAttention|EncDecAttention|attention\.output)\."
#: Role -> pattern of its names in the model families (Llama, Qwen, Mistral, Gemma, Phi, OPT:
#: q_proj; BERT, RoBERTa, ELECTRA, ALBERT: query; DeBERTa-v2: query_proj; DistilBERT: q_lin; T5: q).
ROLES = {
    "q": r"(?:^|\.)(?:q_proj|query|query_proj|q_lin|q)$",
    "k": r"(?:^|\.)(?:k_proj|key|key_proj|k_lin|k)$",
    "v": r"(?:^|\.)(?:v_proj|value|value_proj|v_lin|v)$",
    "o": rf"(?:^|\.)(?:o_proj|o)$|{_ATTENTION}(?:out_proj|dense|out_lin|Wo|c_proj)$",
}


def layer_of(name: str) -> int | None:
    """The index of the layer that a module or parameter belongs to."""
    match = re.search(r"\.([0-9]{1,9})\.", f".{name}.")
    return int(match[1]) if match else None


def describe_modules(names: Sequence[str]) -> str:
    """Abbreviate the names to ``model.layers.{0-2,7}.self_attn.q_proj``, with every layer index."""
    return ", ".join(_described(names))


def _described(names: Sequence[str]) -> list[str]:
    groups: dict[str, list[tuple[int, ...]]] = {}
    for name in names:
        stem = re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", name)
        numbers = tuple(int(part) for part in name.split(".")[1:] if part.isdigit())
        groups.setdefault(stem, []).append(numbers)
    return [text for stem, found in groups.items() for text in _compressed(stem, found)]


def _compressed(stem: str, found: Sequence[tuple[int, ...]]) -> list[str]:
    """Fill the placeholders of ``stem`` with ranges that cover exactly the tuples ``found``."""
    columns = [sorted(set(column)) for column in zip(*found, strict=True)]
    if set(found) == set(product(*columns)):
        spans = (format_layers(c) if len(c) == 1 else f"{{{format_layers(c)}}}" for c in columns)
        return [stem.format(*spans)]
    rest: dict[tuple[int, ...], list[int]] = {}
    for numbers in found:
        rest.setdefault(numbers[1:], []).append(numbers[0])
    merged: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for tail, heads in rest.items():
        merged.setdefault(tuple(sorted(heads)), []).append(tail)
    return [
        text
        for firsts, tails in merged.items()
        for text in _compressed(stem, [(first, *tail) for first in firsts for tail in tails])
    ]


def matches(target: str, name: str) -> bool:
    """Whether ``target``, a suffix or ``re:`` and a pattern, matches the module ``name``."""
    if target.startswith("re:"):
        return re.fullmatch(target[3:], name) is not None
    return is_suffix(target, name)


def is_suffix(suffix: str, name: str) -> bool:
    """Whether ``suffix`` consists of the last parts of the dotted ``name``."""
    return name == suffix or name.endswith(f".{suffix}")


def base_names(name: str) -> list[str]:
    """The names that the classes of multimodal bases give the module ``name`` of a text part."""
    bare = ".".join(without_wrappers(name))
    return [prefix + bare for prefix in _BASE_PREFIXES] if bare != name else []


def without_wrappers(name: str) -> list[str]:
    """The parts of ``name`` after the wrappers that it begins with (``model.language_model``)."""
    parts = name.split(".")
    first = next((at for at, part in enumerate(parts) if part not in _WRAPPERS), len(parts))
    return parts[first:]


def covering_targets(wanted: Sequence[str], others: Sequence[str]) -> list[str]:
    """Targets that match all of ``wanted`` and none of ``others``: suffixes where possible, else
    patterns."""
    taken = {end for name in others for end in _ends(name)}
    chosen: dict[str, None] = {}
    numbered: list[str] = []
    for name in wanted:
        end = next((e for e in _ends(name) if e not in taken and not e[0].isdigit()), name)
        if not any(part.isdigit() for part in end.split(".")):
            chosen[end] = None
            continue
        pattern = "re:.*" + r"\.".join(r"\d+" if p.isdigit() else re.escape(p) for p in _last(name))
        if any(matches(pattern, other) for other in others):
            numbered.append(name)
        else:
            chosen[pattern] = None
    return [*chosen, *(f"re:{_as_pattern(text)}" for text in _described(numbered))]


def _last(name: str) -> list[str]:
    """The parts of ``name`` from the last one that is not a number."""
    parts = name.split(".")
    at = max((i for i, part in enumerate(parts) if not part.isdigit()), default=0)
    return parts[at:]


def _as_pattern(described: str) -> str:
    """The pattern of a name whose numbers are ranges, as in ``layers.{0-1,3}.q_proj``."""
    pieces = re.split(r"\{([^}]*)\}", described)
    return "".join(
        f"(?:{'|'.join(map(str, parse_layers(piece)))})" if at % 2 else re.escape(piece)
        for at, piece in enumerate(pieces)
    )


def as_yaml_list(targets: Sequence[str]) -> str:
    """Format ``targets`` as in a recipe."""
    texts = (t if re.fullmatch(r"[A-Za-z_][\w.]*", t) else json.dumps(t) for t in targets)
    return f"[{', '.join(texts)}]"


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[at:]) for at in reversed(range(len(parts)))]
