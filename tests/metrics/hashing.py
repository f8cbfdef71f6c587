"""A hash of the tokens of many texts."""

from __future__ import annotations

import hashlib
import json


def tokens_hash(texts: list[list[str]]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
