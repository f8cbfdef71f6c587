"""Capture CUDA graphs; a capture that fails leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """Capture what the block launches, with memory from ``pool``. Raises RuntimeError if that is
    not possible.

    torch then leaves its capture stream current, and kernels that libraries launch on the default
    stream, as bitsandbytes does, would read what other kernels have not written yet.
    """
    stream = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            yield
    finally:
        torch.cuda.set_stream(stream)


def generator_of(device: torch.device) -> torch.Generator:
    """The default generator of a GPU."""
    return torch.cuda.default_generators[device.index or 0]


def restore_generator(device: torch.device, state: Tensor) -> None:
    """Restore the state after a failed capture, which leaves the generator in one in which it
    cannot be used eagerly."""
    fresh = torch.Generator(device)
    fresh.set_state(state)
    generator_of(device).graphsafe_set_state(fresh)
