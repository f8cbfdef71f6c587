"""Layer ranges, the values of ``adapter.layers``: ``"0-5,11"``."""

from __future__ import annotations

import re
from collections.abc import Iterable

_RANGE = re.compile(r"\s*([0-9]{1,6})\s*(?:-\s*([0-9]{1,6})\s*)?")
MAX_LAYER = 9_999


def parse_layers(text: str) -> tuple[int, ...]:
    """Parse layer ranges: ``"0-2,11"`` gives (0, 1, 2, 11). Indices start at 0, ends are included.

    The result is sorted and unique. Raises ValueError for anything else, reversed ranges included.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} is neither a layer index nor a range")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"range {part.strip()!r} is reversed")
        if last > MAX_LAYER:
            raise ValueError(f"layer index {last} is too large; at most {MAX_LAYER}")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def layer_indices(layers: Iterable[int] | str) -> set[int]:
    """Return the layer indices that a value of ``adapter.layers`` selects."""
    return set(parse_layers(layers) if isinstance(layers, str) else layers)


def format_layers(layers: Iterable[int]) -> str:
    """Format layer indices as ranges for ``parse_layers``: ``"0-2,7"``."""
    found: list[list[int]] = []
    for layer in sorted(set(layers)):
        if found and layer == found[-1][-1] + 1:
            found[-1] = [found[-1][0], layer]
        else:
            found.append([layer])
    return ",".join("-".join(map(str, span)) for span in found)
