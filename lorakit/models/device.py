"""Where a model runs that no launcher places."""

from __future__ import annotations

import torch

from lorakit.recipe.hardware import has_accelerator


def default_device() -> torch.device:
    """The machine's accelerator (CUDA, ROCm, Apple), or the CPU. ``ACCELERATE_USE_CPU`` and an
    empty ``CUDA_VISIBLE_DEVICES`` hide it, as they do in training."""
    if has_accelerator():
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.backends.mps.is_available():
            return torch.device("mps")
    return torch.device("cpu")
