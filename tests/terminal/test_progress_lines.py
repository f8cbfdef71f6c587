"""Progress as lines of a log."""

from __future__ import annotations

import pytest

from lorakit.terminal.progress_lines import progress_lines


def test_lines_are_rare_and_the_last_one_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    said: list[str] = []
    report = progress_lines(said.append, seconds=10)
    for seconds, done in ((5.0, 1), (10.0, 2), (15.0, 3), (20.0, 4), (21.0, 5), (22.0, 5)):
        clock[0] = seconds
        report("generated", done, 5)
    assert said == ["generated 2/5", "generated 4/5", "generated 5/5"]
    report("evaluated", 5, 5)
    assert len(said) == 3, "what took no time needs no line"
