"""PEFT's ``init_lora_weights``, as far as it matters when an adapter is read.

Nothing here imports PEFT, torch or transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from lorakit.errors import AdapterError, shown

INITIALIZATION = "init_lora_weights"
#: Those that only set the factors, which the adapter contains.
_OF_FACTORS = (True, False, None, "gaussian", "eva", "mica", "orthogonal")
#: Those that also change the base weights, in a way that depends on nothing else. ``loftq``,
#: ``corda`` and ``lora_ga`` depend on values that are not saved.
_OF_BASE = re.compile(r"pissa(?:_niter_\d{1,3})?|(?i:olora)")


def check_initialization(config: Mapping[str, Any], where: str, say: Callable[[str], None]) -> None:
    """Raise AdapterError for an initialization that cannot be repeated; ``say`` receives a note
    about one that is repeated approximately."""
    value = config.get(INITIALIZATION, True)
    if isinstance(value, str) and reinitializes(config) and "_niter_" in value:
        say(
            f"{where}: {INITIALIZATION} = {value}: PEFT approximates the base's singular vectors "
            "from new random values each time, so the adapter's output is approximate"
        )
    if reinitializes(config) or any(value is known or value == known for known in _OF_FACTORS):
        return
    allowed = ", ".join(map(shown, _OF_FACTORS))
    raise AdapterError(
        f"{where}: {INITIALIZATION} = {shown(value)}: not supported; allowed: {allowed}, pissa, "
        "pissa_niter_N, olora; others may change the base by values that the adapter lacks"
    )


def reinitializes(config: Mapping[str, Any]) -> bool:
    """Whether PEFT changes the base weights when it loads the adapter (PiSSA, OLoRA)."""
    value = config.get(INITIALIZATION)
    return isinstance(value, str) and _OF_BASE.fullmatch(value) is not None
