"""Two answers about attention masks that transformers asks the device for, given from the host.

To choose the fastest attention, transformers looks whether a mask hides anything and whether
positions restart within a row. Both read a tensor's value, so that every forward pass waits for
the device. Here both are known beforehand: a caller says whether its rows are packed, and an
encoder's mask is only passed where something is padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import masking_utils

_PACKED = "find_packed_sequence_indices"
_HIDES_NOTHING = "_ignore_bidirectional_mask_sdpa"


@contextmanager
def host_masks(device: torch.device, packed: bool = False) -> Iterator[None]:
    """Run a forward pass without those two waits; on the CPU, where nothing waits, as it is.
    ``packed``: positions restart within a row, and transformers shall make the mask for that.

    A version of transformers without these functions runs as it is too: slower, not wrong.
    """
    own: dict[str, Any] = {_HIDES_NOTHING: _only_without_mask}
    if not packed:
        own[_PACKED] = _never_packed
    before = {name: getattr(masking_utils, name, None) for name in own}
    if device.type == "cpu" or None in before.values():
        yield
        return
    try:
        for name, answer in own.items():
            setattr(masking_utils, name, answer)
        yield
    finally:
        for name, original in before.items():
            setattr(masking_utils, name, original)


def _never_packed(position_ids: Any) -> None:
    return None


def _only_without_mask(
    padding_mask: Any, kv_length: int, local_attention_size: int | None = None
) -> bool:
    local = local_attention_size is not None and kv_length >= local_attention_size
    return padding_mask is None and not local
