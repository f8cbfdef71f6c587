from __future__ import annotations

import pytest

from lorakit.errors import printable


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a line\nanother\ttabbed", "a line\nanother\ttabbed"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("title\x1b]0;x\x07", r"title\x1b]0;x\x07"),
        ("over\rwritten\x08", r"over\rwritten\x08"),
        ("\x9b31m\x00\u202e\u2066\u2028", r"\x9b31m\x00\u202e\u2066\u2028"),
        ("é 漢字 \u00a0 नमस\u200dते 👩\u200d🔬", "é 漢字 \u00a0 नमस\u200dते 👩\u200d🔬"),
    ],
)
def test_only_what_controls_a_terminal_is_escaped(text: str, want: str) -> None:
    assert printable(text) == want
