"""Whether this machine has an accelerator, asked of the system and not of torch."""

from __future__ import annotations

import os
import platform
from pathlib import Path

_DEVICES = ("nvidiactl", "nvidia0", "kfd", "dxg")
_TRUE = frozenset({"1", "true", "yes", "y", "on", "t"})


def has_accelerator() -> bool:
    """True with a CUDA, ROCm or Apple device that the environment does not hide.

    ``CUDA_VISIBLE_DEVICES`` empty or -1, and ``ACCELERATE_USE_CPU``, hide what there is.
    """
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in _TRUE:
        return False
    if platform.system() == "Darwin":
        return platform.machine() == "arm64"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return False
    return any(Path("/dev", name).exists() for name in _DEVICES)
