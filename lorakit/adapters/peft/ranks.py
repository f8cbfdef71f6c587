"""The rank and the scaling of each module in ``adapter_config.json``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from lorakit.errors import AdapterError


def peft_rank(settings: Mapping[str, Any], name: str) -> int:
    """The rank that ``adapter_config.json`` gives the module ``name``."""
    return int(_by_pattern(settings.get("rank_pattern"), name, settings.get("r", 8)))


def peft_alpha(settings: Mapping[str, Any], name: str) -> float:
    """The lora_alpha that ``adapter_config.json`` gives the module ``name``."""
    alpha = _by_pattern(settings.get("alpha_pattern"), name, settings.get("lora_alpha", 8))
    return float(alpha)


def peft_scaling(settings: Mapping[str, Any], name: str, r: int) -> float:
    """The factor of B A: lora_alpha / r, or lora_alpha / sqrt(r) with ``use_rslora``.

    Raises AdapterError if it is not finite.
    """
    alpha = peft_alpha(settings, name)
    scaling = alpha / (math.sqrt(r) if settings.get("use_rslora") else r)
    if not math.isfinite(scaling):
        raise AdapterError(f"{name}: lora_alpha = {alpha}: allowed: a finite number")
    return scaling


def peft_alpha_of(scaling: float, r: int, use_rslora: bool) -> float:
    """The lora_alpha for ``scaling``, rounded to ten digits to drop floating-point noise."""
    return round(scaling * (math.sqrt(r) if use_rslora else r), 10)


def exact_settings(
    scalings: Mapping[str, tuple[int, float]], use_rslora: bool
) -> dict[str, dict[str, float]]:
    """The ``rank_pattern`` and ``alpha_pattern`` that give each module of ``scalings``, and no
    other, its r and its factor of B A."""
    exact = {f"^{re.escape(name)}": own for name, own in scalings.items()}
    return {
        "rank_pattern": {key: r for key, (r, _) in exact.items()},
        "alpha_pattern": {
            key: scaling * (math.sqrt(r) if use_rslora else r)
            for key, (r, scaling) in exact.items()
        },
    }


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first key, a regular expression, that matches a dotted suffix of ``name``,
    as in PEFT."""
    for pattern, value in (patterns or {}).items():
        if _compiled(pattern).match(name):
            return value
    return default


@lru_cache(maxsize=8192)  # more than re keeps: an adapter may have a pattern for each module
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")
