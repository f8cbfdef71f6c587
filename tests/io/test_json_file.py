"""Files of strangers that should contain a JSON object."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorakit.io.json_file import read_json_object


def test_an_object(tmp_path: Path) -> None:
    (tmp_path / "file").write_text('{"a": [1, "\u00e9"]}', encoding="utf-8")
    assert read_json_object(tmp_path / "file") == {"a": [1, "\u00e9"]}
    with pytest.raises(FileNotFoundError):
        read_json_object(tmp_path / "missing")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"[1]", r"expected a JSON object, found \[1\]"),
        (b"{", "invalid JSON: "),
        (b'{"a": "\xff"}', "invalid JSON: "),
        (b"[" * 200_000, "invalid JSON: "),
        (b'{"a": ' + b"1" * 5000 + b"}", "4300 digits"),
    ],
)
def test_other_contents(content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=problem):
        read_json_object(tmp_path / "file")


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match=r"^not a regular file$"):
            read_json_object(path)
