"""Names of members: short, and safe as the names of files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

#: A name that a user may give.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,@-]*")
#: Files have up to 255 bytes, of which a temporary file needs some.
MAX_NAME = 120
_UNSAFE = re.compile(r"[^A-Za-z0-9._+=,@-]+")
_DIGEST = 8


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """The shortest ends of dotted ``keys`` that tell them apart: ``r`` for ``adapter.r``."""
    keys = list(dict.fromkeys(keys))
    return {key: _shortest(key, keys) for key in keys}


def _shortest(key: str, keys: list[str]) -> str:
    parts = key.split(".")
    for length in range(1, len(parts)):
        end = parts[-length:]
        if sum(other.split(".")[-length:] == end for other in keys) == 1:
            return ".".join(end)
    return key


def value_text(value: Any) -> str:
    """A value in a name or a table: ``q+v`` for a list, ``0.0003`` for 3e-4, ``\\n`` for a line
    break."""
    if isinstance(value, str):
        return value if value.isprintable() else json.dumps(value, ensure_ascii=True)[1:-1]
    if isinstance(value, list) and value and all(isinstance(v, str | int | float) for v in value):
        return "+".join(map(value_text, value))
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return json.dumps(value, ensure_ascii=False)


def member_name(settings: Mapping[str, Any], keys: Mapping[str, str]) -> str:
    """``r=4,target_modules=q+v,seed=1``; ``keys`` are the short names of keys."""
    return safe_name(",".join(f"{keys[key]}={value_text(v)}" for key, v in settings.items()))


def safe_name(text: str) -> str:
    """``text`` as the name of a file: other characters become ``_``, and a long name ends in a
    digest."""
    name = _UNSAFE.sub("_", text)
    if len(name) <= MAX_NAME:
        return name
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST]
    return f"{name[: MAX_NAME - _DIGEST - 1]}-{digest}"


def distinct(names: Iterable[str]) -> list[str]:
    """``names`` with a number after those that are taken, also where only the case differs."""
    taken: set[str] = set()
    found = []
    for name in names:
        number, unique = 1, name
        while unique.casefold() in taken:
            number += 1
            unique = f"{name}-{number}"
        taken.add(unique.casefold())
        found.append(unique)
    return found
