"""What ``lorakit init`` never replaces."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import lorakit
from lorakit.errors import UserError


def test_data_is_not_replaced(tiny_bert: Path, in_tmp: Path) -> None:
    Path("rows.csv").write_text("text,label\n" + "good,a\nbad,b\n" * 20)
    before = Path("rows.csv").read_bytes()
    with pytest.raises(UserError, match="is a file of the data"):
        lorakit.init_recipe(
            "rows.csv", model=str(tiny_bert), data="rows.csv", hardware="cpu", overwrite=True
        )
    assert Path("rows.csv").read_bytes() == before


def test_a_pipe_is_not_replaced(tiny_bert: Path, in_tmp: Path) -> None:
    os.mkfifo("pipe")
    Path("rows.csv").write_text("text,label\n" + "good,a\nbad,b\n" * 20)
    with pytest.raises(UserError, match="is a device or a pipe"):
        lorakit.init_recipe(
            "pipe", model=str(tiny_bert), data="rows.csv", hardware="cpu", overwrite=True
        )
    assert Path("pipe").is_fifo()
