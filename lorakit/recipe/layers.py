"""``layers``: which of the model's layers are adapted."""

from __future__ import annotations

import re
from collections.abc import Iterable

_RANGE = re.compile(r"\s*([0-9]{1,6})\s*(?:-\s*([0-9]{1,6})\s*)?")
MAX_LAYER = 9_999


def parse_layers(text: str) -> tuple[int, ...]:
    """``"0-5,11"`` -> (0, 1, 2, 3, 4, 5, 11): indices from 0, a range includes both its ends.

    Sorted, each once. Raises ValueError for anything else, a range that runs backwards included.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} is neither a layer nor a range of layers")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"the range {part.strip()!r} runs backwards")
        if last > MAX_LAYER:
            raise ValueError(f"layer {last} is beyond any model; at most {MAX_LAYER}")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def layer_indices(layers: Iterable[int] | str) -> set[int]:
    """The layers that a recipe's ``layers`` chooses, a list or a text for ``parse_layers``."""
    return set(parse_layers(layers) if isinstance(layers, str) else layers)


def format_layers(layers: Iterable[int]) -> str:
    """(0, 1, 2, 7) -> ``"0-2,7"``, which ``parse_layers`` reads."""
    found: list[list[int]] = []
    for layer in sorted(set(layers)):
        if found and layer == found[-1][-1] + 1:
            found[-1] = [found[-1][0], layer]
        else:
            found.append([layer])
    return ",".join("-".join(map(str, span)) for span in found)
