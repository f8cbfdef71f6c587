from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.progress import BarColumn, TextColumn

from lorakit.terminal.progress_bar import ProgressBar


@pytest.mark.parametrize("width", [12, 40, 80])
def test_the_bar_leaves_room_for_what_ctrl_c_echoes(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    bar = ProgressBar(TextColumn("step 5/10"), BarColumn(None), TextColumn("loss 0.5"))
    bar.add_task("", total=2)
    out = io.StringIO()
    Console(file=out, width=width).print(bar.get_renderable())
    (line,) = out.getvalue().splitlines()
    assert len(line) == width - 3
