"""Forward passes that do not wait for the device to inspect attention masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import masking_utils

#: Functions of transformers that read a tensor on the host, or ask whether they may.
_FIND_PACKED = "find_packed_sequence_indices"
_IGNORE_MASK = "_ignore_bidirectional_mask_sdpa"
_IS_TRACING = "is_tracing"
_is_tracing: Any = getattr(masking_utils, _IS_TRACING, None)


@contextmanager
def host_masks(device: torch.device, packed: bool = False) -> Iterator[None]:
    """Run forward passes without waiting for the device to inspect attention masks.

    To choose the fastest attention, transformers checks whether a mask hides anything and whether
    positions restart within a row; both read a tensor on the host. Here both are known: callers
    pass a mask only if something is padded, and ``packed`` says that positions restart, in which
    case transformers builds its mask. While a CUDA graph is captured, some versions build one even
    if nothing is padded, so that the graph could not use the fastest attention.

    Does nothing on the CPU, which never waits. A function that transformers lacks is left out.
    """
    replacements: dict[str, Any] = {_IGNORE_MASK: _ignores_mask, _IS_TRACING: _is_tracing_mask}
    if not packed:
        replacements[_FIND_PACKED] = _never_packed
    if device.type == "cpu":
        yield
        return
    before = {n: getattr(masking_utils, n) for n in replacements if hasattr(masking_utils, n)}
    try:
        for name in before:
            setattr(masking_utils, name, replacements[name])
        yield
    finally:
        for name, original in before.items():
            setattr(masking_utils, name, original)


def _never_packed(position_ids: Any) -> None:
    return None


def _is_tracing_mask(mask: Any = None) -> bool:
    """Of no mask, no value is read."""
    return mask is not None and bool(_is_tracing(mask))


def _ignores_mask(
    padding_mask: Any, kv_length: int, local_attention_size: int | None = None
) -> bool:
    local = local_attention_size is not None and kv_length >= local_attention_size
    return padding_mask is None and not local
