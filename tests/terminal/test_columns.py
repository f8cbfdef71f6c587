from __future__ import annotations

from lorakit.terminal.columns import aligned


def test_aligned() -> None:
    rows = [["name", "r", "loss"], ["alpha", "16", "0.5"], [], ["b"]]
    assert aligned(rows) == "name    r  loss\nalpha  16   0.5\n\nb"
    assert aligned(rows[:2], left=0) == " name   r  loss\nalpha  16   0.5"
    assert aligned(rows[:2], left=3) == "name   r   loss\nalpha  16  0.5"


def test_wide_letters_take_two_columns() -> None:
    assert aligned([["学习", "1"], ["abc", "22"]]) == "学习   1\nabc   22"
