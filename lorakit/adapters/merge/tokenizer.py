"""Chooses the merged model's tokenizer: that of the base or that of the adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorakit.errors import AdapterError, shown

#: Files of a tokenizer, including its chat template.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"
_FAST, _SETTINGS, _TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_OLD_TEMPLATE = "chat_template.json"
_MAP, _ADDED = "special_tokens_map.json", "added_tokens.json"
#: Files with only a vocabulary, which slow tokenizers and other programs read.
_VOCABULARIES = (
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "spm.model",
    "sentencepiece.bpe.model", "source.spm", "target.spm", "bpe.codes", "tekken.json",
)  # fmt: skip
_SPECIAL = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip


@dataclass(frozen=True)
class Tokenizer:
    """``written``: files of the adapter; ``replaced``: omitted files of the base -> reason. Both
    are empty if the base's tokenizer is kept."""

    written: Mapping[str, bytes] = field(default_factory=dict)
    replaced: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def eos_id(self) -> int | None:
        """The id of EOS in the files of the adapter, if they have one."""
        eos = _special(self.written)["eos_token"]
        vocabulary, _, added = _tokens(self.written.get(_FAST))
        known = {**(vocabulary if isinstance(vocabulary, dict) else {}), **added}
        return known.get(eos)


def choose_tokenizer(
    base: Path, adapter: Path, *, needs_pad: bool = False, rows: int | None = None
) -> Tokenizer:
    """Choose the adapter's tokenizer if it is complete (``tokenizer_config.json`` and a vocabulary)
    and differs from the base's in tokens, special tokens or chat template.

    ``tokenizer_class`` remains the base's, and so does the chat template if the adapter has none. A
    pad token that only the adapter has counts as a difference if the model ``needs_pad``. ``rows``
    is the number of rows of the embedding. Raises AdapterError if a file of the adapter is corrupt.
    """
    files = _files(adapter)
    if not files:
        return Tokenizer()
    _check_json(adapter, files)
    vocabulary = [name for name in files if name == _FAST or name in _VOCABULARIES]
    if _SETTINGS not in files or not vocabulary:
        listed = ", ".join(sorted(files))
        return Tokenizer(notes=(f"{adapter}: incomplete tokenizer ({listed}); using the base's",))
    own = _files(base)
    if own and _is_same(files, own, needs_pad):
        return Tokenizer()
    _check_fast(adapter, files)
    notes = _vocabulary_note(files.get(_FAST), rows)
    if not own:
        return Tokenizer(written=files, notes=notes)
    same = files.get(_FAST) == own.get(_FAST) or _tokens(files.get(_FAST)) == _tokens(
        own.get(_FAST)
    )
    reason = "replaced by the adapter's tokenizer"
    replaced = {}
    keeps_template = not _templates(files) and bool(_templates(own))
    for name in own:
        is_vocabulary = name in _VOCABULARIES
        if name in files or (keeps_template and _is_template(name)):
            continue
        # The vocabulary is the same, or cannot be compared: the file remains valid.
        if not (is_vocabulary and (same or _FAST not in own)):
            replaced[name] = reason
    settings = _edited(files[_SETTINGS], own.get(_SETTINGS), keeps_template)
    note = (
        f"using the adapter's tokenizer, which differs from the base's: {', '.join(sorted(files))}"
        + ("; the chat template is the base's" if keeps_template else "")
    )
    return Tokenizer(files | {_SETTINGS: settings}, replaced, (note, *notes))


def _vocabulary_note(fast: bytes | None, rows: int | None) -> tuple[str, ...]:
    """A note if there are tokens without a row in the embedding."""
    vocabulary, _, added = _tokens(fast)
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary or ()))
    count = max((*ids, *added.values()), default=-1) + 1
    if rows is None or count <= rows:
        return ()
    return (
        f"the adapter's tokenizer has {count:,} tokens, and the model's embedding {rows:,} rows: "
        f"texts with token ids from {rows} on cannot be encoded for this model",
    )


def _files(directory: Path) -> dict[str, bytes]:
    names = {*TOKENIZER_FILES, *_VOCABULARIES}
    found = {n: (directory / n).read_bytes() for n in names if (directory / n).is_file()}
    if (directory / TEMPLATES).is_dir():
        for path in (directory / TEMPLATES).glob("*.jinja"):
            found[f"{TEMPLATES}/{path.name}"] = path.read_bytes()
    return found


def _check_json(directory: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        if not name.endswith(".json"):
            continue
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"{directory / name}: invalid JSON: {error}") from error
        if not isinstance(value, dict):
            raise AdapterError(f"{directory / name}: expected a JSON object, found {shown(value)}")


def _check_fast(directory: Path, files: Mapping[str, bytes]) -> None:
    """Raise AdapterError for a ``tokenizer.json`` that the tokenizers library rejects."""
    if _FAST not in files:
        return
    from tokenizers import Tokenizer as Fast

    try:
        Fast.from_str(files[_FAST].decode("utf-8"))
    except Exception as error:  # the library raises nothing more specific
        raise AdapterError(f"{directory / _FAST}: invalid tokenizer: {error}") from error


def _is_same(files: Mapping[str, bytes], own: Mapping[str, bytes], needs_pad: bool) -> bool:
    """Whether two tokenizers are equivalent, whichever version of transformers wrote them."""
    special, before = _special(files), _special(own)
    if before["pad_token"] is None and not needs_pad:
        del special["pad_token"], before["pad_token"]
    templates = _templates(files)
    if special != before or (templates and templates != _templates(own)):
        return False
    if _FAST not in files or _FAST not in own:
        slow = [name for name in {*files, *own} if name in _VOCABULARIES or name == _FAST]
        return all(files.get(name) == own.get(name) for name in slow)
    if files[_FAST] == own[_FAST]:
        return True
    one, other = _parsed(files[_FAST]), _parsed(own[_FAST])
    steps = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    same_steps = all(_plain(one.get(step)) == _plain(other.get(step)) for step in steps)
    return same_steps and _tokens(files[_FAST]) == _tokens(own[_FAST])


def _special(files: Mapping[str, bytes]) -> dict[str, Any]:
    settings = _parsed(files.get(_MAP)) | _parsed(files.get(_SETTINGS))
    return {key: _content(settings.get(key)) for key in _SPECIAL}


def _tokens(content: bytes | None) -> Any:
    """Vocabulary, merges and added tokens of ``tokenizer.json``."""
    fast = _parsed(content)
    model = fast.get("model") or {}
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m)
              for m in model.get("merges") or ()]  # fmt: skip
    added = {token["content"]: token["id"] for token in fast.get("added_tokens") or ()}
    return model.get("vocab"), merges, added


def _templates(files: Mapping[str, bytes]) -> dict[str, str]:
    """Name -> chat template, from every place where it may be stored."""
    inline = _parsed(files.get(_SETTINGS)).get("chat_template")
    found = {"default": inline} if isinstance(inline, str) else {}
    if isinstance(inline, list):
        found = {item["name"]: item["template"] for item in inline}
    stored = _parsed(files.get(_OLD_TEMPLATE)).get("chat_template")
    if isinstance(stored, str):
        found["default"] = stored
    for name, content in files.items():
        if name == _TEMPLATE or name.startswith(f"{TEMPLATES}/"):
            own = "default" if name == _TEMPLATE else Path(name).stem
            found[own] = content.decode("utf-8", "replace")
    return found


def _is_template(name: str) -> bool:
    return name in (_TEMPLATE, _OLD_TEMPLATE) or name.startswith(f"{TEMPLATES}/")


def _edited(content: bytes, base: bytes | None, keeps_template: bool) -> bytes:
    """``tokenizer_config.json`` with the base's ``tokenizer_class`` and, if it is kept, its chat
    template. Extra special tokens get their older name: transformers 4 rejects that of version 5.
    """
    settings, own = dict(_parsed(content)), _parsed(base)
    if "tokenizer_class" in own:
        settings["tokenizer_class"] = own["tokenizer_class"]
    if keeps_template and "chat_template" in own:
        settings["chat_template"] = own["chat_template"]
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if settings == _parsed(content):
        return content
    return (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, Mapping) else token


def _plain(part: Any) -> Any:
    """``part`` without null and false values, which only some versions write."""
    if isinstance(part, Mapping):
        return {k: _plain(v) for k, v in part.items() if v is not None and v is not False}
    return [_plain(item) for item in part] if isinstance(part, list) else part


@lru_cache(maxsize=8)
def _parsed(content: bytes | None) -> Any:
    """A JSON object, empty if the content is not one. Cached: do not modify."""
    try:
        value = json.loads(content or b"{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
