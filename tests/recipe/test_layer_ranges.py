from __future__ import annotations

import pytest

from lorakit.recipe.layer_ranges import parse_layers


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("0-5,11", (0, 1, 2, 3, 4, 5, 11)),
        ("3", (3,)),
        (" 7 , 1 - 2 ", (1, 2, 7)),
        ("2,2,1-2", (1, 2)),
        ("4-4", (4,)),
    ],
)
def test_parse(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "5-2", "1,,2", "-1", "1-", "1-2-3", "1.5", "0-99999999"])
def test_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"layer|range"):
        parse_layers(text)
